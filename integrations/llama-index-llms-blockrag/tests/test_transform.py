"""The prefetching transform, alone and in pipelines, in this process and in others."""

from __future__ import annotations

import copy
import json
import logging
import pickle

import pytest
from llama_index.core import VectorStoreIndex
from llama_index.core.ingestion import IngestionCache, IngestionPipeline
from llama_index.core.ingestion.pipeline import get_transformation_hash
from llama_index.core.schema import TextNode
from llama_index.llms.blockrag.base import BlockRAGLLM
from llama_index.llms.blockrag.embedding import LexicalEmbedding
from llama_index.llms.blockrag.nodes import node_blocks
from llama_index.llms.blockrag.transform import BlockKVTransform
from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore

from blockrag.errors import BlockRAGError

GOOD = [TextNode(id_=name, text=f"The text of {name}.", metadata={"title": name}) for name in "abc"]
TOO_LONG = TextNode(id_="long", text="word " * 20_000)


def keys(transform, nodes):
    model = transform.shared_model()
    return {model.block_key(block.token_ids) for block in node_blocks(model, nodes, transform.prompt_form)}


def stored(transform):
    return set(transform.shared_model().store.keys())


@pytest.fixture
def store_url(tmp_path):
    return f"disk://{tmp_path / 'kv'}"


@pytest.mark.parametrize("form", ["chat", "rag"])
def test_nodes_pass_unchanged_and_their_blocks_are_stored(form, store_url):
    transform = BlockKVTransform(model_name="demo", store_url=store_url, prompt_form=form)
    before = [node.model_dump() for node in GOOD]
    assert transform(GOOD) is GOOD
    assert [node.model_dump() for node in GOOD] == before
    assert stored(transform) == keys(transform, GOOD)
    assert transform([]) == []
    assert transform.failed == 0


async def test_asynchronously_too(store_url):
    transform = BlockKVTransform(store_url=store_url)
    assert await transform.acall(GOOD) is GOOD
    assert stored(transform) == keys(transform, GOOD)


def test_one_failure_never_loses_the_batch(store_url, caplog):
    transform = BlockKVTransform(store_url=store_url)
    nodes = [GOOD[0], TOO_LONG, TextNode(id_="empty", text=""), *GOOD[1:]]
    with caplog.at_level(logging.WARNING):
        assert transform(nodes) is nodes
    assert stored(transform) == keys(transform, GOOD)
    assert transform.failed == 1
    assert "1 of 5 nodes pass without KV states; the first is 'long': " in caplog.text
    strict = BlockKVTransform(store_url=store_url + "-strict", strict=True)
    with pytest.raises(BlockRAGError, match="the model can place"):
        strict(nodes)
    assert stored(strict) == keys(strict, GOOD)


def test_it_is_rebuilt_from_its_fields(store_url):
    transform = BlockKVTransform(model_name="demo", store_url=store_url, strict=True)
    fields = json.loads(json.dumps(transform.to_dict()))
    copies = [pickle.loads(pickle.dumps(transform)), copy.deepcopy(transform), BlockKVTransform.from_dict(fields)]
    for other in copies:
        assert other.to_dict() == transform.to_dict()
        assert other.shared_model() is transform.shared_model()
    assert fields["class_name"] == "BlockKVTransform"
    assert fields["fingerprint"] == transform.shared_model().fingerprint.digest


def test_another_model_is_another_cache_entry(store_url):
    one = BlockKVTransform(store_url=store_url)
    other = BlockKVTransform(store_url=store_url, precision="int8")
    assert one.fingerprint != other.fingerprint
    assert get_transformation_hash(GOOD, one) != get_transformation_hash(GOOD, other)
    with pytest.raises(ValueError, match="is not that of model 'demo' here"):
        BlockKVTransform(store_url=store_url, fingerprint=other.fingerprint)
    with pytest.raises(ValueError, match="no model_name"):
        BlockKVTransform(model_name=None)


def test_a_cache_hit_skips_it(store_url):
    transform = BlockKVTransform(store_url=store_url)
    pipeline = IngestionPipeline(transformations=[transform], cache=IngestionCache())
    pipeline.run(nodes=GOOD)
    transform.shared_model().store.delete_many(stored(transform))
    assert [node.node_id for node in pipeline.run(nodes=GOOD)] == ["a", "b", "c"]
    assert stored(transform) == set()


@pytest.mark.filterwarnings("ignore:Specified num_workers:UserWarning")
def test_workers_share_a_directory(store_url):
    transform = BlockKVTransform(store_url=store_url)
    pipeline = IngestionPipeline(transformations=[transform], disable_cache=True)
    nodes = pipeline.run(nodes=GOOD, num_workers=2)
    assert [node.model_dump() for node in nodes] == [node.model_dump() for node in GOOD]
    assert stored(transform) == keys(transform, GOOD)


@pytest.mark.parametrize("form", ["chat", "rag"])
def test_what_is_stored_is_what_the_language_model_reads(form, store_url):
    llm = BlockRAGLLM(model_name="demo", store_url=store_url, prompt_form=form, context_window=1024, max_new_tokens=2)
    transform = BlockKVTransform.for_llm(llm)
    store = BlockRAGVectorStore.for_llm(llm, prebuild=True)
    assert transform.shared_model() is store.shared_model() is llm.block_model
    transform(GOOD)
    prefetched = stored(transform)
    index = VectorStoreIndex.from_vector_store(store, embed_model=LexicalEmbedding(dimension=64))
    index.insert_nodes(GOOD)
    assert stored(transform) == prefetched == keys(transform, GOOD)
    hits = llm.block_model.store.stats().hits
    index.as_query_engine(llm=llm, similarity_top_k=3).query("Which text?")
    assert llm.block_model.store.stats().hits >= hits + 3
    store.delete_nodes([node.node_id for node in GOOD])
    assert not stored(transform) & prefetched
