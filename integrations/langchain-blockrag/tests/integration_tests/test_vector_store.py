"""`BlockRAGVectorStore`: documents come back as they were; KV states live as long as a document has them."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockrag.model.block_model import BlockModel
from blockrag.stores import MemoryStore
from langchain_core.documents import Document
from langchain_core.embeddings import DeterministicFakeEmbedding, Embeddings
from langchain_core.indexing import InMemoryRecordManager, aindex, index

from langchain_blockrag import BlockRAGEmbeddings, BlockRAGVectorStore, ChatBlockRAG, documents_to_blocks
from tests.conftest import QUESTION


class Axes(Embeddings):
    """A text "x, y" is the vector (x, y)."""

    def embed_query(self, text: str) -> list[float]:
        return [float(number) for number in text.split(",")]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        return [self.embed_query(text) for text in texts]


@pytest.fixture
def store(llm: ChatBlockRAG, documents: list[Document]) -> Iterator[BlockRAGVectorStore]:
    with BlockRAGVectorStore(BlockRAGEmbeddings(), llm=llm) as made:
        made.add_documents(documents)
        yield made


def blocks(llm: ChatBlockRAG) -> set[str]:
    return set(llm.block_model().store.keys())


def texts(found: list[Document]) -> list[str]:
    return [document.page_content for document in found]


# -- documents --------------------------------------------------------------------------------------------------------


def test_documents_come_back_as_they_were(tmp_path: Path) -> None:
    document = Document(id="1", page_content=" text \n", metadata={"title": " T ", "pages": [1, 2], "n": {"a": None}})
    with BlockRAGVectorStore(BlockRAGEmbeddings(), path=tmp_path / "store") as store:
        assert store.add_documents([document]) == ["1"]
    with BlockRAGVectorStore.load_local(tmp_path / "store", BlockRAGEmbeddings()) as again:
        assert again.get_by_ids(["2", "1"]) == [document]
        assert again.similarity_search("text") == [document]
        again.add_texts(["more"], ids=["2"])
    with BlockRAGVectorStore.load_local(tmp_path / "store", BlockRAGEmbeddings()) as again:
        assert texts(again.get_by_ids(["2", "1"])) == ["more", " text \n"]


def test_save_local_copies_a_store_in_memory(store: BlockRAGVectorStore, tmp_path: Path) -> None:
    store.save_local(tmp_path / "copy")
    with BlockRAGVectorStore.load_local(tmp_path / "copy", BlockRAGEmbeddings()) as copy:
        assert copy.similarity_search_with_score(QUESTION) == store.similarity_search_with_score(QUESTION)


def test_search_by_question_and_by_vector(store: BlockRAGVectorStore) -> None:
    found = store.similarity_search_with_score(QUESTION, k=2)
    assert found[0][0].id == "Bhutan"
    assert found[0][1] > found[1][1]
    vector = BlockRAGEmbeddings().embed_query(QUESTION)
    assert store.similarity_search_by_vector(vector, k=2) == [document for document, _ in found]
    assert store.similarity_search_with_score_by_vector(vector, k=2) == found


async def test_the_async_methods_find_the_same(store: BlockRAGVectorStore) -> None:
    vector = BlockRAGEmbeddings().embed_query(QUESTION)
    assert await store.asimilarity_search_with_score(QUESTION) == store.similarity_search_with_score(QUESTION)
    assert await store.asimilarity_search(QUESTION, k=1) == store.similarity_search(QUESTION, k=1)
    assert await store.asimilarity_search_by_vector(vector) == store.similarity_search_by_vector(vector)
    marginal = store.max_marginal_relevance_search(QUESTION, k=2)
    assert await store.amax_marginal_relevance_search(QUESTION, k=2) == marginal
    assert await store.amax_marginal_relevance_search_by_vector(vector, k=2) == marginal
    assert await store.aadd_texts(["Chad."], ids=["chad"]) == ["chad"]
    assert texts(await store.aget_by_ids(["chad"])) == ["Chad."]
    assert await store.adelete(["chad"])
    assert await store.aget_by_ids(["chad"]) == []


def test_dot_and_cosine() -> None:
    near, far = "1, 0", "3, 3"
    dot = BlockRAGVectorStore.from_texts([near, far], Axes())
    assert dot.similarity_search_with_score("1, 0", k=2)[0] == (dot.similarity_search(far, k=1)[0], 3.0)
    cosine = BlockRAGVectorStore.from_texts([near, far, "0, 0"], Axes(), similarity="cosine")
    assert texts(cosine.similarity_search("5, 0", k=2)) == [near, far]
    scores = [score for _, score in cosine.similarity_search_with_relevance_scores("5, 0", k=3)]
    assert scores == pytest.approx([1.0, 0.5**0.5, 0.0], abs=1e-6)
    retriever = cosine.as_retriever(search_type="similarity_score_threshold", search_kwargs={"score_threshold": 0.9})
    assert texts(retriever.invoke("5, 0")) == [near]
    with pytest.raises(ValueError, match='similarity="cosine"'):
        dot.similarity_search_with_relevance_scores("1, 0")


def test_marginal_relevance_prefers_what_is_different() -> None:
    store = BlockRAGVectorStore.from_texts(["1, 0", "1, 0.01", "0.6, 0.8"], Axes())
    assert texts(store.max_marginal_relevance_search("1, 0", k=2, lambda_mult=0.3)) == ["1, 0", "0.6, 0.8"]
    assert texts(store.max_marginal_relevance_search("1, 0", k=2, lambda_mult=1.0)) == ["1, 0", "1, 0.01"]
    # Only the two of greatest inner product are looked at.
    assert "0.6, 0.8" not in texts(store.max_marginal_relevance_search("1, 0", k=2, fetch_k=2, lambda_mult=0.0))
    retriever = store.as_retriever(search_type="mmr", search_kwargs={"k": 2, "lambda_mult": 0.3})
    assert texts(retriever.invoke("1, 0")) == ["1, 0", "0.6, 0.8"]
    assert BlockRAGVectorStore(Axes()).max_marginal_relevance_search("1, 0") == []


def test_filters(store: BlockRAGVectorStore) -> None:
    assert [d.id for d in store.similarity_search(QUESTION, filter={"title": "Peru"})] == ["Peru"]
    assert {d.id for d in store.similarity_search(QUESTION, filter=lambda d: d.id != "Bhutan")} == {"Kenya", "Peru"}
    assert store.similarity_search(QUESTION, filter={"title": "Mars"}) == []
    marginal = store.max_marginal_relevance_search(QUESTION, filter=lambda d: "Nairobi" in d.page_content)
    assert [d.id for d in marginal] == ["Kenya"]
    retriever = store.as_retriever(search_kwargs={"k": 3, "filter": {"title": "Kenya"}})
    assert [d.id for d in retriever.invoke(QUESTION)] == ["Kenya"]


def test_ids_are_those_given_then_the_documents_own_then_new() -> None:
    store = BlockRAGVectorStore(BlockRAGEmbeddings())
    given = store.add_documents([Document("a", id="x"), Document("b", id="y"), Document("c")], ids=["z", None, None])
    assert given[:2] == ["z", "y"]
    assert texts(store.get_by_ids(given)) == ["a", "b", "c"]
    assert store.add_documents([]) == []
    assert store.add_texts(["1", "2", "3"], ids=["1", "2", "3"], batch_size=2) == ["1", "2", "3"]
    assert texts(store.get_by_ids(["3", "1", "2"])) == ["3", "1", "2"]


def test_delete_without_ids_deletes_all(store: BlockRAGVectorStore, llm: ChatBlockRAG) -> None:
    assert store.delete()
    assert store.similarity_search(QUESTION) == []
    assert blocks(llm) == set()


@pytest.mark.parametrize(
    ("do", "says"),
    [
        (lambda s: s.add_documents([Document("a")], ids=["1", "2"]), "2 ids for 1 documents"),
        (lambda s: s.add_texts(["a", "b"], ids=["1", "1"]), "'1'"),
        (lambda s: s.add_documents([Document("a", metadata={"x": object()})]), "JSON"),
        (lambda s: s.add_documents(["a"]), "pass strings to add_texts"),
        (lambda s: s.add_texts(["a"], batch_size=0), "batch_size=0"),
        (lambda s: s.similarity_search("a", k=0), "k"),
        (lambda s: s.similarity_search("a", filters={"x": 1}), "'filters'"),
        (lambda s: s.similarity_search("a", filter={"x": {"$gt": 1}}), "equality"),
        (lambda s: s.similarity_search("a", filter="x"), "got str"),
        (lambda s: s.similarity_search_by_vector([1.0]), "vector"),
        (lambda s: BlockRAGVectorStore(Axes(), similarity="l2"), "'l2'"),
        (lambda s: BlockRAGVectorStore.load_local("no-such-directory", Axes()), "no-such-directory"),
        (lambda s: [s.close(), s.similarity_search("a")], "closed"),
    ],
)
def test_bad_input_is_a_value_error(store: BlockRAGVectorStore, do: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says) as refused:
        do(store)
    assert "\n" not in str(refused.value)


def test_a_path_opens_only_under_its_name(tmp_path: Path) -> None:
    with BlockRAGVectorStore.from_texts(["1, 0"], Axes(), path=tmp_path / "s", name="axes"):
        pass
    with pytest.raises(ValueError, match="axes"):
        BlockRAGVectorStore.load_local(tmp_path / "s", Axes(), name="other").similarity_search("1, 0")


def test_threads_may_add_and_search_together() -> None:
    store = BlockRAGVectorStore(DeterministicFakeEmbedding(size=8))
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for step in range(10):
                store.add_texts([f"{number} {step}"], ids=[f"{number}-{step}"])
                store.similarity_search("x", k=2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not failures
    assert len(store.similarity_search("x", k=100)) == 40


# -- KV states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["auto", "rag", "chat"])
def test_what_is_added_is_prefilled_as_the_chat_model_shows_it(
    model: BlockModel, documents: list[Document], form: Any
) -> None:
    llm = ChatBlockRAG.from_model(model, prompt_form=form, max_tokens=8)
    store = BlockRAGVectorStore(BlockRAGEmbeddings(), llm=llm)
    untitled = Document(id="x", page_content="  Chad is a country.\n")
    store.add_documents([*documents, untitled])
    assert len(blocks(llm)) == 4
    prefilled = blocks(llm)
    llm.invoke([documents_to_blocks(store.get_by_ids(["Bhutan", "x", "Peru", "Kenya"]), QUESTION)])
    # The first question added the prefix, and the separator of the chat form; no passage.
    assert len(blocks(llm) - prefilled) == (2 if form == "chat" else 1)
    store.delete()
    assert len(blocks(llm)) == (2 if form == "chat" else 1)


def test_prebuilding_can_be_left_to_the_first_question(llm: ChatBlockRAG, documents: list[Document]) -> None:
    store = BlockRAGVectorStore(BlockRAGEmbeddings(), llm=llm, prebuild=False)
    store.add_documents(documents)
    assert blocks(llm) == set()
    llm.invoke([documents_to_blocks(documents, QUESTION)])
    assert len(blocks(llm)) == 4
    store.delete(["Bhutan"])
    assert len(blocks(llm)) == 3


def test_full_attention_needs_no_kv_states(weights: BlockModel, documents: list[Document]) -> None:
    full = BlockModel(weights.model, weights.tokenizer, facts=weights.facts, store=MemoryStore(), attention="full")
    llm = ChatBlockRAG.from_model(full)
    BlockRAGVectorStore(BlockRAGEmbeddings(), llm=llm).add_documents(documents)
    assert blocks(llm) == set()


def test_a_document_too_long_for_the_model_is_kept_without_kv(
    llm: ChatBlockRAG, documents: list[Document], caplog: pytest.LogCaptureFixture
) -> None:
    store = BlockRAGVectorStore(BlockRAGEmbeddings(), llm=llm)
    with caplog.at_level(logging.WARNING):
        store.add_documents([*documents, Document(id="long", page_content="long " * 3000)])
    assert "1 of 4 passages are stored without KV states" in caplog.text
    assert len(blocks(llm)) == 3
    assert [d.id for d in store.similarity_search("long", k=1)] == ["long"]


def test_replacing_a_document_replaces_its_kv_states(llm: ChatBlockRAG, store: BlockRAGVectorStore) -> None:
    before = blocks(llm)
    store.add_texts(["The capital of Bhutan is Paro."], [{"title": "Bhutan"}], ids=["Bhutan"])
    assert (len(blocks(llm)), len(blocks(llm) - before)) == (3, 1)
    found = store.similarity_search(QUESTION, k=1)
    assert llm.bind(documents=found).invoke(QUESTION).text == "Paro"


def test_closing_what_was_never_used_opens_nothing(tmp_path: Path) -> None:
    BlockRAGVectorStore(BlockRAGEmbeddings(), path=tmp_path / "s", llm=ChatBlockRAG(model="/no/such/model")).close()
    assert not (tmp_path / "s").exists()


# -- the indexing API -------------------------------------------------------------------------------------------------


def doc(source: str, text: str) -> Document:
    return Document(page_content=text, metadata={"source": source})


@pytest.fixture
def records() -> InMemoryRecordManager:
    manager = InMemoryRecordManager(namespace="tests")
    manager.create_schema()
    return manager


def run_index(
    asynchronous: bool, given: list[Document], records: InMemoryRecordManager, store: BlockRAGVectorStore, cleanup: Any
) -> dict[str, int]:
    arguments = {"cleanup": cleanup, "source_id_key": "source", "key_encoder": "sha256"}
    if asynchronous:
        return dict(asyncio.run(aindex(given, records, store, **arguments)))
    return dict(index(given, records, store, **arguments))


@pytest.mark.parametrize("asynchronous", [False, True], ids=["index", "aindex"])
@pytest.mark.parametrize("cleanup", ["incremental", "full", "scoped_full", None])
def test_indexing_removes_kv_states_nobody_else_uses(
    llm: ChatBlockRAG, records: InMemoryRecordManager, cleanup: Any, asynchronous: bool
) -> None:
    store = BlockRAGVectorStore(BlockRAGEmbeddings(), llm=llm)
    shared, old = "Thimphu is in Bhutan.", "Lima is in Chile."
    given = [doc("a.md", shared), doc("a.md", old), doc("b.md", shared), doc("c.md", "Nairobi is in Kenya.")]
    assert run_index(asynchronous, given, records, store, cleanup)["num_added"] == 4
    assert len(blocks(llm)) == 3
    before = blocks(llm)
    again = run_index(asynchronous, given, records, store, cleanup)
    assert (again["num_added"], again["num_skipped"]) == (0, 4)
    assert blocks(llm) == before

    # a.md loses the shared text and corrects the other; c.md is not named.
    changed = [doc("a.md", "Lima is in Peru."), doc("b.md", shared)]
    result = run_index(asynchronous, changed, records, store, cleanup)
    assert result["num_added"] == 1
    left = {document.page_content for document in store.similarity_search("Lima Thimphu Nairobi", k=9)}
    assert shared in left
    assert "Lima is in Peru." in left
    if cleanup is None:
        assert len(blocks(llm)) == 4
        return
    assert result["num_deleted"] == (3 if cleanup == "full" else 2)
    assert old not in left
    assert ("Nairobi is in Kenya." in left) == (cleanup != "full")
    # b.md still has the shared text, and with it its KV states.
    assert len(blocks(llm) & before) == (1 if cleanup == "full" else 2)
    assert len(blocks(llm)) == len(left)

    if cleanup == "full":
        run_index(asynchronous, [], records, store, cleanup)
        assert blocks(llm) == set()


class Refusing(Axes):
    """Embeds anything but texts about Peru, until it is told to."""

    refuses = True

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        if self.refuses and any("Peru" in text for text in texts):
            raise RuntimeError("the embedding service is down")
        return [[float(len(text)), 1.0] for text in texts]


def test_an_ingestion_that_dies_half_way_leaves_the_old_version(
    llm: ChatBlockRAG, records: InMemoryRecordManager
) -> None:
    embedding = Refusing()
    store = BlockRAGVectorStore(embedding, llm=llm)
    old = [doc("a.md", "Thimphu is in Bhutan."), doc("b.md", "Lima is in Chile.")]
    arguments: dict[str, Any] = {"cleanup": "full", "source_id_key": "source", "key_encoder": "sha256"}
    index(old, records, store, **arguments)
    new = [doc("a.md", "Thimphu is in Asia."), doc("b.md", "Lima is in Peru.")]
    with pytest.raises(RuntimeError, match="is down"):
        index(new, records, store, batch_size=1, **arguments)
    assert {d.page_content for d in old} <= set(texts(store.similarity_search("1, 1", k=9)))
    embedding.refuses = False
    index(new, records, store, batch_size=1, **arguments)
    assert set(texts(store.similarity_search("1, 1", k=9))) == {d.page_content for d in new}
    assert len(blocks(llm)) == 2
