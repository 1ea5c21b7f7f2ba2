"""What the suites leave open: exact embeddings, search, restarts, and KV states that go with their documents."""

import asyncio
import random

import pytest
from haystack import Document
from haystack.dataclasses import ByteStream, SparseEmbedding
from haystack.document_stores.errors import DocumentStoreError, DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.errors import FilterError

from blockrag.model.shared import shared_store
from haystack_integrations.document_stores.blockrag import BlockRAGDocumentStore

_FOX = {"field": "meta.animal", "operator": "==", "value": "fox"}


@pytest.fixture
def store():
    return BlockRAGDocumentStore(embedding_dim=3)


def _documents():
    return [
        Document(id="a", content="foxes", meta={"animal": "fox"}, embedding=[1.0, 0.0, 0.0]),
        Document(id="b", content="bears", meta={"animal": "bear"}, embedding=[0.0, 1.0, 0.0]),
        Document(id="c", content="more foxes", meta={"animal": "fox"}, embedding=[0.5, 0.5, 0.0]),
        Document(id="d", content="nobody knows", meta={"animal": "fox"}),
    ]


def test_everything_about_a_document_comes_back(tmp_path):
    documents = [
        Document(
            content="text", meta={"title": "T", "n": [1, {"x": None}]}, embedding=[random.random() for _ in range(3)]
        ),
        Document(id="2", content="", score=0.5, embedding=[0.5, 0.25, -1.0]),
        Document(blob=ByteStream(b"\x00\xff", mime_type="image/png"), sparse_embedding=SparseEmbedding([1], [0.1])),
        Document(id="4", meta={"meta": 1, "content": "a field that is called like one of the document's"}),
    ]
    with_path = BlockRAGDocumentStore(tmp_path, embedding_dim=3)
    with_path.write_documents(documents)
    assert with_path.filter_documents() == documents
    with_path.close()
    assert BlockRAGDocumentStore(tmp_path, embedding_dim=3).filter_documents() == documents
    # A closed store opens again.
    assert with_path.count_documents() == 4
    with_path.close()


def test_retrieval_finds_the_nearest_and_never_one_without_an_embedding(store):
    store.write_documents(_documents())
    found = store.embedding_retrieval([1.0, -1.0, 0.0], top_k=10)
    assert [(document.id, document.score) for document in found] == [("a", 1.0), ("c", 0.0), ("b", -1.0)]
    assert all(document.embedding is None for document in found)
    (nearest,) = store.embedding_retrieval([1.0, 0.0, 0.0], top_k=1, return_embedding=True)
    assert nearest.embedding == [1.0, 0.0, 0.0]
    filtered = store.embedding_retrieval([0.0, 1.0, 0.0], filters=_FOX)
    assert [document.id for document in filtered] == ["c", "a"]


def test_filters_can_ask_for_an_embedding(store):
    store.write_documents(_documents())
    with_one = {"field": "embedding", "operator": "!=", "value": None}
    without = {"field": "embedding", "operator": "==", "value": None}
    assert [document.id for document in store.filter_documents(without)] == ["d"]
    assert [document.embedding for document in store.filter_documents(with_one)] == [
        document.embedding for document in _documents()[:3]
    ]
    assert len(store.embedding_retrieval([1.0, 0.0, 0.0], filters=with_one)) == 3
    assert store.embedding_retrieval([1.0, 0.0, 0.0], filters=without) == []
    assert store.delete_by_filter(without) == 1
    assert store.count_documents() == 3


def test_an_overwritten_document_is_found_by_its_new_embedding_only(store):
    store.write_documents(_documents())
    store.write_documents([Document(id="a", content="new", embedding=[0.0, 0.0, 1.0])], DuplicatePolicy.OVERWRITE)
    assert store.embedding_retrieval([0.0, 0.0, 1.0], top_k=1)[0].content == "new"
    assert store.embedding_retrieval([1.0, 0.0, 0.0], top_k=1)[0].id == "c"
    store.update_by_filter({"field": "content", "operator": "==", "value": "new"}, {"animal": "owl"})
    assert store.embedding_retrieval([0.0, 0.0, 1.0], top_k=1)[0].meta == {"animal": "owl"}


def test_policies_within_one_batch(store):
    first, second = Document(id="a", content="1"), Document(id="a", content="2")
    with pytest.raises(DuplicateDocumentError, match="'a' exists already"):
        store.write_documents([first, second])
    assert store.count_documents() == 0
    assert store.write_documents([first, second], DuplicatePolicy.SKIP) == 1
    assert store.filter_documents() == [first]
    assert store.write_documents([first, second], DuplicatePolicy.OVERWRITE) == 2
    assert store.filter_documents() == [second]
    assert store.write_documents([], DuplicatePolicy.FAIL) == 0


def test_errors_are_haystacks_and_say_what_to_do(store, tmp_path):
    store.write_documents(_documents())
    with pytest.raises(ValueError, match=r"'e' has an embedding of 2 numbers.*holds 3.*embedding_dim=2"):
        store.write_documents([Document(id="e", content="x", embedding=[1.0, 2.0])])
    with pytest.raises(ValueError, match="finite"):
        store.write_documents([Document(id="e", content="x", embedding=[1.0, 2.0, float("nan")])])
    with pytest.raises(ValueError, match="finite"):
        store.write_documents([Document(id="e", content="x", embedding=[1.0, 2.0, 1e39])])
    with pytest.raises(ValueError, match=r"'e'.*JSON"):
        store.write_documents([Document(id="e", content="x", meta={"callable": print})])
    with pytest.raises(ValueError, match="surrogate"):
        store.write_documents([Document(id="e", content="\ud800", meta={"f": 1})])
    assert store.count_documents() == 4
    with pytest.raises(ValueError, match=r"query embedding has 2 numbers.*holds 3"):
        store.embedding_retrieval([1.0, 2.0])
    with pytest.raises(ValueError, match="top_k=0"):
        store.embedding_retrieval([1.0, 2.0, 3.0], top_k=0)
    for malformed in ({"animal": "fox"}, {"operator": "==", "value": 1}, {"operator": "AND"}):
        with pytest.raises(FilterError):
            store.embedding_retrieval([1.0, 2.0, 3.0], filters=malformed)
        with pytest.raises(FilterError):
            store.filter_documents(malformed)
    with pytest.raises(ValueError, match="embedding_dim=0"):
        BlockRAGDocumentStore(embedding_dim=0)
    with pytest.raises(ValueError, match="prompt_form='auto'"):
        BlockRAGDocumentStore(prompt_form="auto")
    other = BlockRAGDocumentStore(tmp_path, embedding_dim=3)
    other.write_documents(_documents())
    other.close()
    with pytest.raises(ValueError, match=r"holds embeddings of 3 numbers, not of 768; pass embedding_dim=3"):
        BlockRAGDocumentStore(tmp_path).count_documents()
    for file in tmp_path.rglob("*"):
        if file.is_file():
            file.write_bytes(b"no database")
    with pytest.raises(DocumentStoreError):
        BlockRAGDocumentStore(tmp_path, embedding_dim=3).count_documents()


def test_serialisation(tmp_path):
    store = BlockRAGDocumentStore(tmp_path, embedding_dim=3, model="demo", precision="int8", prebuild=False)
    again = BlockRAGDocumentStore.from_dict(store.to_dict())
    assert again.to_dict() == store.to_dict()
    assert store.to_dict()["init_parameters"]["path"] == str(tmp_path)


async def test_reading_goes_on_while_documents_are_written(store):
    store.write_documents(_documents())
    new = [[Document(content=f"{batch}.{i}", embedding=[0.0, 0.0, 1.0]) for i in range(20)] for batch in range(8)]
    writes = [store.write_documents_async(batch) for batch in new]
    reads = [store.embedding_retrieval_async([1.0, 0.0, 0.0], top_k=1) for _ in range(8)]
    results = await asyncio.gather(*writes, *reads)
    assert results[:8] == [20] * 8
    assert [found[0].id for found in results[8:]] == ["a"] * 8
    assert await store.count_documents_async() == 164


# -- KV states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_form", ["rag", "chat"])
def test_kv_states_live_as_long_as_the_last_document_that_needs_them(model_arguments, prompt_form):
    blocks = shared_store(model_arguments["store"])
    store = BlockRAGDocumentStore(**model_arguments, prompt_form=prompt_form)
    store.write_documents([Document(id=id, content="Thimphu is the capital.") for id in "ab"])
    store.write_documents([Document(id="c", content="Another text."), Document(id="no text", meta={"x": 1})])
    assert blocks.stats().blocks == 2

    store.delete_documents(["a"])
    assert blocks.stats().blocks == 2
    store.delete_documents(["b"])
    assert blocks.stats().blocks == 1
    store.write_documents([Document(id="c", content="A text that was changed.")], DuplicatePolicy.OVERWRITE)
    assert blocks.stats().blocks == 1
    # The title is part of the block in the RAG form only.
    store.update_by_filter({"field": "id", "operator": "==", "value": "c"}, {"title": "Changed"})
    assert blocks.stats().blocks == 1
    store.delete_by_filter({"field": "id", "operator": "==", "value": "c"})
    assert blocks.stats().blocks == 0
    assert store.count_documents() == 1
    store.write_documents([Document(content="Once more.")])
    store.delete_all_documents()
    assert blocks.stats().blocks == 0


def test_kv_states_follow_documents_across_restarts(tmp_path):
    arguments = {"model": "demo", "store": f"disk://{tmp_path / 'kv'}"}
    first = BlockRAGDocumentStore(tmp_path / "documents", **arguments)
    first.write_documents([Document(id="a", content="One text."), Document(id="b", content="Another text.")])
    first.close()
    assert shared_store(arguments["store"]).stats().blocks == 2
    second = BlockRAGDocumentStore(tmp_path / "documents", **arguments)
    second.delete_documents(["a"])
    assert shared_store(arguments["store"]).stats().blocks == 1
    second.close()


def test_a_document_without_kv_states_is_stored_all_the_same(model_arguments, caplog):
    store = BlockRAGDocumentStore(**model_arguments)
    long = Document(id="long", content="word " * 20_000)
    assert store.write_documents([long, Document(id="short", content="A text.")]) == 2
    assert shared_store(model_arguments["store"]).stats().blocks == 1
    assert "'long'" in caplog.text
    assert {document.id for document in store.filter_documents()} == {"long", "short"}
