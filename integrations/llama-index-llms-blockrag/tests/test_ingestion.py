"""Ingestion pipelines over the vector store: upserts, what dies half-way, and KV states that follow."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.node_parser import SentenceSplitter
from llama_index.core.schema import TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.llms.blockrag.embedding import LexicalEmbedding
from llama_index.llms.blockrag.ingestion import ReplacingSpanHandler
from llama_index.llms.blockrag.nodes import node_blocks
from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore


class Accident(TransformComponent):
    """Raises when a text says so, as a device without memory would."""

    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        if any("accident" in node.get_content() for node in nodes):
            raise RuntimeError("out of memory")
        return nodes


def words(text: str) -> list[str]:
    return text.split()


def pipeline(store: BlockRAGVectorStore, strategy=DocstoreStrategy.UPSERTS, docstore=None) -> IngestionPipeline:
    splitter = SentenceSplitter(chunk_size=64, chunk_overlap=0, tokenizer=words)
    return IngestionPipeline(
        transformations=[splitter, Accident(), LexicalEmbedding(dimension=64)],
        docstore=docstore or SimpleDocumentStore(),
        vector_store=store,
        docstore_strategy=strategy,
        disable_cache=True,
    )


def documents(**texts: str) -> list[Document]:
    return [Document(id_=name, text=text) for name, text in texts.items()]


def texts(store: BlockRAGVectorStore) -> list[str]:
    return sorted(node.get_content() for node in store.get_nodes())


def run(pipe: IngestionPipeline, how: str, **texts: str) -> None:
    if how == "run":
        pipe.run(documents=documents(**texts))
    else:
        asyncio.run(pipe.arun(documents=documents(**texts)))


@pytest.fixture
def store(tmp_path):
    return BlockRAGVectorStore(
        persist_path=str(tmp_path / "index"),
        model_name="demo",
        store_url=f"disk://{tmp_path / 'kv'}",
        prebuild=True,
    )


def check_kv(store):
    """The block store holds the blocks of the nodes that are there, and no others."""
    model = store.shared_model()
    blocks = node_blocks(model, store.get_nodes(), "chat")
    assert set(model.store.keys()) == {model.block_key(block.token_ids) for block in blocks}


@pytest.mark.parametrize("how", ["run", "arun"])
def test_upserts_replace_and_deletes_delete(how, store):
    pipe = pipeline(store, DocstoreStrategy.UPSERTS_AND_DELETE)
    run(pipe, how, a="aaa", b="bbb", c="aaa")
    assert texts(store) == ["aaa", "aaa", "bbb"]
    check_kv(store)
    run(pipe, how, a="aaa", b="ccc", c="aaa")
    assert texts(store) == ["aaa", "aaa", "ccc"]
    check_kv(store)
    # "c" is no longer among the sources; its block is still that of "a".
    run(pipe, how, a="aaa", b="ccc")
    assert texts(store) == ["aaa", "ccc"]
    check_kv(store)


@pytest.mark.parametrize("how", ["run", "arun"])
def test_an_ingestion_that_fails_leaves_the_old_version_answering(how, store):
    pipe = pipeline(store)
    run(pipe, how, a="The old text.", b="Another text.")
    with pytest.raises(RuntimeError, match="out of memory"):
        run(pipe, how, a="An accident.", b="Another text.")
    assert texts(store) == ["Another text.", "The old text."]
    check_kv(store)
    # A run about something else changes nothing of that.
    run(pipe, how, c="Something else.")
    assert texts(store) == ["Another text.", "Something else.", "The old text."]
    run(pipe, how, a="The new text.", b="Another text.")
    assert texts(store) == ["Another text.", "Something else.", "The new text."]
    check_kv(store)
    # Outside of a run a delete is a delete.
    store.delete("a")
    assert texts(store) == ["Another text.", "Something else."]
    check_kv(store)


def test_the_next_whole_run_drops_what_a_failed_one_had_deleted(store):
    pipe = pipeline(store, DocstoreStrategy.UPSERTS_AND_DELETE)
    pipe.run(documents=documents(a="Text a.", b="Text b."))
    with pytest.raises(RuntimeError, match="out of memory"):
        pipe.run(documents=documents(a="An accident."))
    assert texts(store) == ["Text a.", "Text b."]
    pipe.run(documents=documents(a="New a."))
    assert texts(store) == ["New a."]
    check_kv(store)


def test_questions_are_answered_from_the_old_version_meanwhile(store):
    seen = []

    class Looks(TransformComponent):
        def __call__(self, nodes: Any, **kwargs: Any) -> Any:
            index = VectorStoreIndex.from_vector_store(store, embed_model=LexicalEmbedding(dimension=64))
            seen.append([hit.text for hit in index.as_retriever().retrieve("Which text?")])
            return nodes

    pipe = pipeline(store)
    pipe.transformations.insert(1, Looks())
    pipe.run(documents=documents(a="The old text."))
    pipe.run(documents=documents(a="The new text."))
    assert seen == [[], ["The old text."]]
    assert texts(store) == ["The new text."]


def test_a_document_that_becomes_nothing_is_gone(store):
    pipe = pipeline(store)
    pipe.run(documents=documents(a="Text."))
    pipe.transformations = [SentenceSplitter(chunk_size=64, chunk_overlap=0, tokenizer=words)]
    # Without an embedding nothing is added.
    pipe.run(documents=documents(a="Other text."))
    assert texts(store) == []
    check_kv(store)


def test_a_killed_ingestion_leaves_the_old_version_and_the_next_one_exactly_the_new(store, tmp_path):
    docstore = SimpleDocumentStore()
    pipeline(store, docstore=docstore).run(documents=documents(a="The old text.", b="Another text."))
    docstore.persist(str(tmp_path / "docstore.json"))
    store.close()
    script = Path(__file__).with_name("ingest_and_die.py")
    done = subprocess.run([sys.executable, script, tmp_path], timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert texts(store) == ["Another text.", "The old text."]
    docstore = SimpleDocumentStore.from_persist_path(str(tmp_path / "docstore.json"))
    pipeline(store, docstore=docstore).run(documents=documents(a="The new text.", b="Another text."))
    assert texts(store) == ["Another text.", "The new text."]
    check_kv(store)


@pytest.mark.parametrize("call", ["update_ref_doc", "refresh_ref_docs"])
def test_index_updates_can_be_protected(call, store):
    class Breaks(LexicalEmbedding):
        def _get_text_embeddings(self, texts: list[str]) -> Any:
            if any("accident" in text for text in texts):
                raise RuntimeError("out of memory")
            return super()._get_text_embeddings(texts)

    index = VectorStoreIndex.from_vector_store(store, embed_model=Breaks(dimension=64))
    index.insert(Document(id_="a", text="The old text."))
    index.docstore.set_document_hash("a", "of the old version")

    def update(text):
        document = Document(id_="a", text=text)
        with store.replacing():
            getattr(index, call)([document] if call == "refresh_ref_docs" else document)

    with pytest.raises(RuntimeError, match="out of memory"):
        update("An accident.")
    assert texts(store) == ["The old text."]
    update("The new text.")
    assert texts(store) == ["The new text."]
    check_kv(store)


async def test_concurrent_runs_keep_to_themselves(tmp_path):
    stores = [BlockRAGVectorStore(persist_path=str(tmp_path / name)) for name in "xyz"]
    pipes = [pipeline(store) for store in stores]
    await asyncio.gather(*(pipe.arun(documents=documents(a=f"Old {i}.")) for i, pipe in enumerate(pipes)))
    await asyncio.gather(*(pipe.arun(documents=documents(a=f"New {i}.")) for i, pipe in enumerate(pipes)))
    assert [texts(store) for store in stores] == [["New 0."], ["New 1."], ["New 2."]]


def test_one_handler_per_process_which_keeps_nothing(store):
    BlockRAGVectorStore()
    (handler,) = [one for one in get_dispatcher().span_handlers if isinstance(one, ReplacingSpanHandler)]
    pipeline(store).run(documents=documents(a="Text."))
    IngestionPipeline(transformations=[LexicalEmbedding(dimension=64)]).run(documents=documents(a="Text."))
    assert handler.class_name() == "ReplacingSpanHandler"
    assert (handler.open_spans, handler.completed_spans, handler.dropped_spans) == ({}, [], [])


def test_a_replacement_that_cannot_end_is_logged(store, caplog):
    pipe = pipeline(store)
    pipe.run(documents=documents(a="The old text."))
    pipe.transformations = [Closes(store=store)]
    pipe.run(documents=documents(a="The new text."))
    assert "documents that an ingestion deleted answer still" in caplog.text
    assert texts(store) == ["The old text."]


class Closes(TransformComponent):
    """Closes the index under the pipeline, and gives nodes that are not added."""

    store: BlockRAGVectorStore

    def __call__(self, nodes: Any, **kwargs: Any) -> Any:
        self.store.close()
        return []
