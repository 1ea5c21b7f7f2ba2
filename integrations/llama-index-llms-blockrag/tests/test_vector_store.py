"""The vector store under LlamaIndex's own calls: what is found, what is returned, and what happens to KV states."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from collections.abc import Callable
from datetime import date

import fsspec
import numpy as np
import pytest
from llama_index.core import Document, StorageContext, VectorStoreIndex
from llama_index.core.embeddings import BaseEmbedding
from llama_index.core.schema import (
    ImageNode,
    IndexNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.simple import SimpleVectorStore
from llama_index.core.vector_stores.types import (
    BasePydanticVectorStore,
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.llms.blockrag.embedding import LexicalEmbedding
from llama_index.llms.blockrag.nodes import node_blocks
from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore
from pydantic import ValidationError

from blockrag.errors import PassageIndexError

DIMENSION = 8


def vector(name: str) -> list[float]:
    return np.random.default_rng(sum(name.encode())).standard_normal(DIMENSION).tolist()


def node(name: str, document: str = "doc", text: str | None = None, **more) -> TextNode:
    of = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}
    return TextNode(id_=name, text=text or f"The text of {name}.", relationships=of, embedding=vector(name), **more)


def without_embedding(one: TextNode) -> dict:
    return one.model_copy(update={"embedding": None}).model_dump()


def bare(*nodes: TextNode) -> list[TextNode]:
    """For indexes, which embed what has no embedding."""
    return [one.model_copy(update={"embedding": None}) for one in nodes]


def ask(store: BlockRAGVectorStore, k: int = 10, **more) -> list[str]:
    return store.query(VectorStoreQuery(query_embedding=[1.0] * DIMENSION, similarity_top_k=k, **more)).ids


def keys(store: BlockRAGVectorStore, *nodes: TextNode) -> set[str]:
    model = store.shared_model()
    return {model.block_key(block.token_ids) for block in node_blocks(model, nodes, store.prompt_form)}


def stored(store: BlockRAGVectorStore) -> set[str]:
    return set(store.shared_model().store.keys())


@pytest.fixture
def store() -> BlockRAGVectorStore:
    return BlockRAGVectorStore()


@pytest.fixture
def with_kv(tmp_path) -> BlockRAGVectorStore:
    """A store that tracks the demo model's KV states, in a block store of its own."""
    return BlockRAGVectorStore(model_name="demo", store_url=f"disk://{tmp_path / 'kv'}", prebuild=True)


def lexical() -> BaseEmbedding:
    return LexicalEmbedding(dimension=64)


# -- nodes ------------------------------------------------------------------------------------------------------------


def test_it_is_a_vector_store(store):
    assert isinstance(store, BasePydanticVectorStore)
    assert store.class_name() == "BlockRAGVectorStore"
    assert (store.stores_text, store.flat_metadata, store.is_embedding_query) == (True, False, True)
    assert len(store.client) == 0
    assert ask(store) == store.get_nodes() == []


RICH = node(
    "rich",
    text="  Text with spaces at its ends.\n",
    metadata={"zeta": 1, "alpha": "first", "nested": {"z": [1, 2.5, None], "a": True}, "title": "A title"},
    excluded_llm_metadata_keys=["zeta"],
    excluded_embed_metadata_keys=["alpha"],
    metadata_template="{key} => {value}",
    metadata_separator=" | ",
    text_template="<{metadata_str}> {content}",
    start_char_idx=3,
    end_char_idx=40,
    mimetype="text/markdown",
)
RICH.relationships[NodeRelationship.NEXT] = RelatedNodeInfo(node_id="next", metadata={"b": 1, "a": 2}, hash="h")


@pytest.mark.parametrize(
    "given",
    [
        RICH,
        node("plain"),
        TextNode(id_="orphan", text="No document.", embedding=vector("orphan")),
        Document(id_="document", text="A document itself.", metadata={"a": 1}, embedding=vector("d")),
        IndexNode(id_="index", text="An index node.", index_id="elsewhere", embedding=vector("i")),
        ImageNode(id_="image", text="A picture.", image_url="http://localhost/a.png", embedding=vector("p")),
    ],
    ids=lambda one: one.node_id,
)
def test_nodes_come_back_as_they_were(given, tmp_path):
    before = given.model_dump()
    BlockRAGVectorStore(persist_path=str(tmp_path)).add([given])
    assert given.model_dump() == before
    store = BlockRAGVectorStore(persist_path=str(tmp_path))
    (back,) = store.get_nodes([given.node_id])
    (found,) = store.query(VectorStoreQuery(query_embedding=given.embedding)).nodes
    for one in (back, found):
        assert type(one) is type(given)
        assert without_embedding(one) == without_embedding(given)
        assert list(one.metadata) == list(given.metadata)
        for mode in MetadataMode:
            assert one.get_content(mode) == given.get_content(mode)


def test_a_node_added_again_is_replaced(store):
    assert store.add([node("a"), node("b"), node("a", text="Last one counts.")]) == ["a", "b", "a"]
    assert store.get_nodes(["a"])[0].text == "Last one counts."
    store.add([node("a", "elsewhere", "Moved.")])
    assert [one.text for one in store.get_nodes(["a", "unknown", "b"])] == ["Moved.", "The text of b."]
    store.delete("doc")
    assert [one.node_id for one in store.get_nodes()] == ["a"]


def test_ids_are_never_used_twice(store):
    """What a FAISS position as id gets wrong: after a deletion, new vectors must not answer for old nodes."""
    store.add([node("a"), node("b"), node("c")])
    store.delete_nodes(["a"])
    store.add([node("d")])
    for name in "bcd":
        result = store.query(VectorStoreQuery(query_embedding=vector(name), similarity_top_k=1))
        assert result.nodes[0].node_id == result.ids[0]
        assert result.similarities[0] == pytest.approx(np.dot(vector(result.ids[0]), vector(name)), rel=1e-5)
    assert sorted(ask(store)) == ["b", "c", "d"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.add([TextNode(text="no embedding")]), "embedding not set"),
        (lambda s: s.add([TextNode(text="x", embedding=[1.0, 2.0])]), "hold|holds 8 dimensions"),
        (
            lambda s: s.add([node("d", metadata={"day": date(2026, 1, 1)})]),
            "node 'd' cannot be kept: .*date.*into strings",
        ),
        (lambda s: s.query(VectorStoreQuery(query_str="only words")), "no embedding"),
        (lambda s: s.query(VectorStoreQuery(query_embedding=[1.0])), "use the embedding model that built it"),
        (lambda s: ask(s, mode="text_search"), "'text_search' is not supported"),
        (lambda s: ask(s, mode="nonsense"), "'nonsense' is not a valid"),
        (lambda s: ask(s, mode=VectorStoreQueryMode.HYBRID), "'hybrid' is not supported; use 'default' or 'mmr'"),
        (lambda s: s.delete_nodes(), r"clear\(\) deletes every node"),
        (lambda s: BlockRAGVectorStore(prebuild=True), "pass model_name"),
        (lambda s: s.shared_model(), "no model_name"),
        (lambda s: s.persist("there", fsspec.filesystem("memory")), "local directory, not a MemoryFileSystem"),
        (lambda s: BlockRAGVectorStore.from_persist_path("/nowhere/at/all"), "no vector store at '/nowhere/at/all'"),
        (lambda s: pickle.dumps(s), "cannot be pickled with its 1 nodes"),
    ],
)
def test_bad_input_is_a_value_error_that_says_what_to_do(store, call, message):
    store.add([node("a")])
    with pytest.raises(ValueError, match=message):
        call(store)
    assert ask(store) == ["a"]


def test_fields_that_do_not_exist_are_refused():
    with pytest.raises(ValidationError, match="persist_pth"):
        BlockRAGVectorStore(persist_pth="typo")


# -- queries ----------------------------------------------------------------------------------------------------------

LIBRARY = [
    node("n0", "d0", metadata={"lang": "en", "year": 1999, "tags": ["a", "b"], "draft": ""}),
    node("n1", "d0", metadata={"lang": "de", "year": 2005, "tags": ["b"], "draft": "yes"}),
    node("n2", "d1", metadata={"lang": "en", "year": 2005.0, "tags": []}),
    node("n3", "d2", metadata={"lang": "English", "note": "x" * 1000}),
]


def has(key, value, operator=FilterOperator.EQ):
    return MetadataFilter(key=key, value=value, operator=operator)


def both(*filters, condition=FilterCondition.AND):
    return MetadataFilters(filters=list(filters), condition=condition)


FILTERS = [
    both(has("lang", "en")),
    both(has("lang", "en"), has("year", 2005)),
    both(has("note", "x" * 1000)),
    both(has("lang", "en"), has("lang", "de"), condition=FilterCondition.OR),
    both(has("lang", "en"), condition=FilterCondition.NOT),
    both(has("year", 2000, FilterOperator.GT)),
    both(has("year", 2005, FilterOperator.GTE)),
    both(has("year", 2000, FilterOperator.LT)),
    both(has("year", 1999, FilterOperator.LTE)),
    both(has("lang", "en", FilterOperator.NE)),
    both(has("lang", ["de", "fr"], FilterOperator.IN)),
    both(has("lang", ["de", "fr"], FilterOperator.NIN)),
    both(has("tags", ["a", "z"], FilterOperator.ANY)),
    both(has("tags", ["a", "b"], FilterOperator.ALL)),
    both(has("tags", "b", FilterOperator.CONTAINS)),
    both(has("lang", "ngl", FilterOperator.TEXT_MATCH)),
    both(has("lang", "ENG", FilterOperator.TEXT_MATCH_INSENSITIVE)),
    both(has("draft", None, FilterOperator.IS_EMPTY)),
    both(),
]


@pytest.mark.parametrize("filters", FILTERS, ids=lambda one: one.model_dump_json()[12:70])
def test_filters_mean_what_they_mean_in_the_reference_store(filters):
    store, reference = BlockRAGVectorStore(), SimpleVectorStore()
    store.add(LIBRARY)
    reference.add(LIBRARY)
    query = VectorStoreQuery(query_embedding=[1.0] * DIMENSION, similarity_top_k=10, filters=filters)
    expected = set(reference.query(query).ids)
    assert set(store.query(query).ids) == expected
    assert {one.node_id for one in store.get_nodes(filters=filters)} == expected
    store.delete_nodes(filters=filters)
    assert {one.node_id for one in store.get_nodes()} == {one.node_id for one in LIBRARY} - expected


def test_filters_may_be_nested(store):
    store.add(LIBRARY)
    inner = both(has("year", 1999), has("lang", "English"), condition=FilterCondition.OR)
    assert set(ask(store, filters=both(inner, has("lang", "en")))) == {"n0"}
    assert set(ask(store, filters=both(inner, condition=FilterCondition.NOT))) == {"n1", "n2"}
    assert set(ask(store, filters=both(inner, has("lang", "de"), condition=FilterCondition.OR))) == {"n0", "n1", "n3"}


def test_documents_and_nodes_restrict_what_is_found(store):
    store.add(LIBRARY)
    assert set(ask(store, doc_ids=["d0", "d2", "unknown"])) == {"n0", "n1", "n3"}
    assert set(ask(store, node_ids=["n0", "n2", "unknown"])) == {"n0", "n2"}
    assert ask(store, node_ids=["n0", "n2"], doc_ids=["d0"]) == ["n0"]
    assert ask(store, node_ids=["n0", "n1"], filters=both(has("lang", "de"))) == ["n1"]
    assert ask(store, node_ids=["unknown"]) == ask(store, doc_ids=["unknown"]) == []
    # As retrievers ask when the index knows no nodes itself.
    assert len(ask(store, node_ids=[], doc_ids=[])) == 4
    store.delete_nodes(["n0", "n1"], both(has("lang", "de")))
    assert set(ask(store)) == {"n0", "n2", "n3"}


def test_marginal_relevance_takes_other_things_too(store):
    nearly = [TextNode(id_=name, text=name, embedding=[1.0, 0.1 * i, 0.0]) for i, name in enumerate(["a", "b", "c"])]
    store.add([*nearly, TextNode(id_="far", text="far", embedding=[0.7, 0.0, 0.7])])
    query = VectorStoreQuery(query_embedding=[1.0, 0.0, 0.1], similarity_top_k=2, mode=VectorStoreQueryMode.MMR)
    assert store.query(query, mmr_threshold=1.0).ids == ["a", "b"]
    assert store.query(query, mmr_threshold=0.3).ids == ["a", "far"]
    query.mmr_threshold, query.mode = 0.3, "mmr"
    assert store.query(query).ids == ["a", "far"]
    query.node_ids = ["unknown"]
    assert store.query(query).ids == []


def test_retrievers_use_it(store):
    index = VectorStoreIndex(
        bare(*LIBRARY), storage_context=StorageContext.from_defaults(vector_store=store), embed_model=lexical()
    )
    retriever = index.as_retriever(similarity_top_k=3, filters=both(has("lang", "en")), vector_store_query_mode="mmr")
    hits = retriever.retrieve("text of n2")
    assert {hit.node_id for hit in hits} == {"n0", "n2"}
    assert all(isinstance(hit, NodeWithScore) for hit in hits)


# -- async ------------------------------------------------------------------------------------------------------------


async def test_the_event_loop_goes_on_meanwhile(with_kv):
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    ticking = asyncio.create_task(tick())
    nodes = [node(f"n{i}", f"d{i % 3}") for i in range(12)]
    assert await with_kv.async_add(nodes) == [one.node_id for one in nodes]
    during = ticks
    query = VectorStoreQuery(query_embedding=[1.0] * DIMENSION, similarity_top_k=20)
    assert len((await with_kv.aquery(query)).ids) == 12
    assert len(await with_kv.aget_nodes(["n0", "n1"])) == 2
    await with_kv.adelete("d0")
    await with_kv.adelete_nodes(["n1"])
    assert len((await with_kv.aquery(query)).ids) == 7
    await with_kv.aclear()
    assert (await with_kv.aquery(query)).ids == []
    ticking.cancel()
    # A blocked loop would not have ticked while the blocks were computed.
    assert during > 10


# -- KV states --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["chat", "rag"])
def test_blocks_are_those_of_the_prompt_form(form, tmp_path):
    store = BlockRAGVectorStore(
        model_name="demo", store_url=f"disk://{tmp_path / 'kv'}", prebuild=True, prompt_form=form
    )
    store.add([RICH])
    model = store.shared_model()
    (block,) = node_blocks(model, [RICH], form)
    shown = RICH.get_content(MetadataMode.LLM).strip() if form == "chat" else "A title"
    assert shown in block.text
    assert ("alpha" in block.text) == (form == "chat")
    assert stored(store) == {model.block_key(block.token_ids)}


def calls() -> dict[str, Callable]:
    """LlamaIndex's ways to remove document "a", whose second text is shared with document "b"."""
    return {
        "delete_ref_doc": lambda index, store: index.delete_ref_doc("a", delete_from_docstore=True),
        "delete_nodes": lambda index, store: index.delete_nodes(
            [one.node_id for one in store.get_nodes() if one.ref_doc_id == "a"]
        ),
        "update_ref_doc": lambda index, store: index.update_ref_doc(Document(id_="a", text="Entirely new.")),
        "refresh_ref_docs": lambda index, store: index.refresh_ref_docs([Document(id_="a", text="Entirely new.")]),
        "clear": lambda index, store: store.clear(),
    }


@pytest.mark.parametrize("way", list(calls()))
def test_what_nobody_else_uses_goes_and_what_is_shared_stays(way, with_kv):
    index = VectorStoreIndex.from_vector_store(with_kv, embed_model=lexical())
    index._store_nodes_override = True  # refresh_ref_docs compares with the docstore
    for document, texts in {"a": ["Only in a.", "Shared by both."], "b": ["Shared by both."]}.items():
        for number, text in enumerate(texts):
            index.insert_nodes(bare(node(f"{document}{number}", document, text)))
    if way == "refresh_ref_docs":
        index.docstore.set_document_hash("a", "of the old version")
    assert stored(with_kv) == keys(with_kv, node("x", text="Only in a."), node("y", text="Shared by both."))
    calls()[way](index, with_kv)
    left = {"clear": []}.get(way, [node("y", text="Shared by both.")])
    if way in ("update_ref_doc", "refresh_ref_docs"):
        left.append(node("z", text="Entirely new."))
    assert stored(with_kv) == keys(with_kv, *left)
    texts = {hit.text for hit in index.as_retriever(similarity_top_k=9).retrieve("Only shared, or entirely new?")}
    assert texts == {one.text for one in left}


def test_deleting_a_document_leaves_no_vector_behind(store):
    """What FaissMapVectorStore gets wrong: the next retrieval finds a vector without a node."""
    index = VectorStoreIndex.from_vector_store(store, embed_model=lexical())
    index.insert(Document(id_="a", text="The first document."))
    index.insert(Document(id_="b", text="The second document."))
    index.delete_ref_doc("a")
    index.delete_ref_doc("never there")
    hits = index.as_retriever(similarity_top_k=5).retrieve("Which document?")
    assert [hit.node.ref_doc_id for hit in hits] == ["b"]
    index.insert(Document(id_="c", text="The third document."))
    hits = index.as_retriever(similarity_top_k=5).retrieve("Which document?")
    assert {hit.text for hit in hits} == {"The second document.", "The third document."}


def test_a_node_without_kv_states_is_added_all_the_same(with_kv, caplog):
    with_kv.add([node("a"), node("long", text="word " * 20_000), node("empty", text=" "), node("b")])
    assert len(ask(with_kv)) == 4
    assert stored(with_kv) == keys(with_kv, node("a"), node("b"))
    assert with_kv.client.stats().without_kv == 1
    assert "1 of" in caplog.text


# -- keeping ----------------------------------------------------------------------------------------------------------


def test_a_directory_keeps_everything(tmp_path):
    store = BlockRAGVectorStore(persist_path=str(tmp_path / "index"))
    store.add(LIBRARY)
    store.delete("d2")
    again = pickle.loads(pickle.dumps(store))
    deep = copy.deepcopy(store)
    restored = BlockRAGVectorStore.from_dict(json.loads(json.dumps(store.to_dict())))
    for other in (again, deep, restored):
        assert set(ask(other)) == {"n0", "n1", "n2"}
        assert other.persist_path == store.persist_path
    store.close()
    assert set(ask(store)) == {"n0", "n1", "n2"}
    with pytest.raises(PassageIndexError, match="'given'"):
        ask(BlockRAGVectorStore(persist_path=str(tmp_path / "index"), embedding_name="another"))


def test_storage_contexts_persist_it(store, tmp_path):
    context = StorageContext.from_defaults(vector_store=store)
    VectorStoreIndex(bare(*LIBRARY), storage_context=context, embed_model=lexical())
    context.persist(str(tmp_path))
    opened = BlockRAGVectorStore.from_persist_dir(str(tmp_path))
    index = VectorStoreIndex.from_vector_store(opened, embed_model=lexical())
    assert len(index.as_retriever(similarity_top_k=9).retrieve("text")) == 4
    opened.delete("d0")
    StorageContext.from_defaults(vector_store=opened, persist_dir=str(tmp_path)).persist(str(tmp_path))
    opened.close()
    assert set(one.node_id for one in BlockRAGVectorStore.from_persist_dir(str(tmp_path)).get_nodes()) == {"n2", "n3"}


def test_a_file_is_no_place_to_persist_to(store, tmp_path):
    (tmp_path / "file").write_text("mine")
    store.add([node("a")])
    with pytest.raises(PassageIndexError, match="file' is no directory to persist to"):
        store.persist(str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_store_persists_too(store, tmp_path):
    store.persist(str(tmp_path / "there"), fsspec.filesystem("file"))
    opened = BlockRAGVectorStore.from_persist_path(str(tmp_path / "there"))
    assert opened.get_nodes() == []
    store.close()
    with pytest.raises(PassageIndexError, match="closed"):
        ask(store)
