"""The passage index: against brute force, against other processes, against damage.

Vectors come from a small deterministic encoder with few dimensions, or from the real lexical encoder where corpus
statistics matter; databases, FAISS indexes, threads and processes are real.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import resource
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.encoders import CorpusCounts, GivenVectors, LexicalEncoder
from blockrag.errors import InputError, PassageIndexError
from blockrag.index import Change, DocumentInfo, DocumentUpdate, IndexOrigin, PassageIndex
from blockrag.index.vector_file import write_vector_file
from blockrag.index.vectors import VectorIndex
from blockrag.passage import Passage

KINDS = ["flat", "hnsw", "ivf"]
DIMENSION = 16


class HashEncoder:
    """Small-integer vectors from a hash of the text: deterministic, with many exact ties. Counts what it embeds."""

    name = "hash-16"
    dimension = DIMENSION

    def __init__(self):
        self.batches = []

    def encode_queries(self, questions):
        return np.array([self.vector(q) for q in questions], dtype=np.float32).reshape(-1, DIMENSION)

    def encode_passages(self, passages):
        self.batches.append([p.id for p in passages])
        return self.encode_queries([f"{p.title}|{p.text}" for p in passages])

    @staticmethod
    @cache
    def vector(text):
        return (
            np.frombuffer(hashlib.blake2b(text.encode(), digest_size=16).digest(), np.uint8).astype(np.float32) % 5 - 2
        )


def make(number, document="d", **more):
    return Passage(id=f"{document}-{number}", text=f"text {document} {number}", document_id=document, **more)


def many(count, document="d"):
    return [make(i, document, metadata={"even": i % 2 == 0, "third": i % 3}) for i in range(count)]


def brute_force(question, passages, k):
    """Passage ids and scores by falling score, then by order of addition."""
    query = HashEncoder.vector(question)
    scored = [(float(HashEncoder.vector(f"{p.title}|{p.text}") @ query), i, p.id) for i, p in enumerate(passages)]
    return [(id, score) for score, _, id in sorted(scored, key=lambda s: (-s[0], s[1]))[:k]]


def found(hits):
    return [(hit.passage.id, hit.score) for hit in hits]


@pytest.fixture
def index():
    with PassageIndex(HashEncoder()) as index:
        yield index


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 60, 10**9])
def test_flat_search_is_brute_force_with_ties_in_order_of_addition(index, k):
    passages = many(300)
    index.add(passages)
    questions = [f"question {i}" for i in range(20)]
    expected = [brute_force(question, passages, k) for question in questions]
    assert [found(index.search(question, k)) for question in questions] == expected
    assert [found(hits) for hits in index.search_many(questions, k)] == expected


def test_hits_carry_the_whole_passage(index):
    passage = Passage(id="i", text="t", title="T", document_id="D", metadata={"a": [1, {"b": None}], "f": 2.0})
    index.add([Passage("i", "t", "T", "D", MappingProxyType({"a": (1, MappingProxyType({"b": None})), "f": 2.0}))])
    (hit,) = index.search("anything")
    assert hit.passage == passage
    assert type(hit.passage.metadata["f"]) is float
    assert index.get("i") == passage
    assert index.get("other") is None
    assert "i" in index
    assert "other" not in index
    assert 3 not in index


def test_equal_texts_are_found_in_order_of_addition_even_when_there_are_thousands(index):
    index.add([Passage(id=f"p{i}", text="the same") for i in range(6000)])
    assert [hit.passage.id for hit in index.search("q", 7)] == [f"p{i}" for i in range(7)]
    assert len({hit.score for hit in index.search("q", 7)}) == 1


def test_equal_texts_are_embedded_once():
    encoder = HashEncoder()
    with PassageIndex(encoder) as index:
        index.add([Passage(id=f"p{i}", text="the same") for i in range(5)])
    assert encoder.batches == [["p0"]]


@pytest.mark.parametrize("kind", KINDS)
def test_approximate_kinds_find_nearly_what_brute_force_finds(kind, tmp_path):
    passages = many(3000)
    with PassageIndex(HashEncoder(), tmp_path, kind=kind) as index:
        index.add(passages)
        assert index.stats().kind == kind
        right = sum(
            len(set(found(index.search(f"q{i}", 10))) & set(brute_force(f"q{i}", passages, 10))) for i in range(40)
        )
    assert right >= (400 if kind == "flat" else 280)


@pytest.mark.parametrize("kind", KINDS)
def test_deleted_passages_are_never_found(kind):
    with PassageIndex(HashEncoder(), kind=kind) as index:
        for document in range(12):
            index.add(many(120, f"d{document}"))
        for document in range(11):
            assert index.delete_document(f"d{document}").removed == 120
            ids = {hit.passage.document_id for hits in index.search_many(["a", "b", "c"], 50) for hit in hits}
            assert ids <= {f"d{left}" for left in range(document + 1, 12)}
        assert found(index.search("q", 1000))[:20] == brute_force("q", many(120, "d11"), 1000)[:20]


def test_an_empty_index_a_zero_query_and_no_questions(index):
    assert index.search("q") == []
    assert index.search_many([]) == []
    index.add([])
    assert len(index) == 0
    with PassageIndex(LexicalEncoder(64)) as lexical:
        lexical.add([make(1)])
        assert lexical.search("what is the", 3) == lexical.search("", 3) == lexical.search("zebra", 3) == []
        assert lexical.search("what is the", 3, where={"document_id": "d"}) == []
        assert len(lexical.search("zebra text", 3)) == 1


@pytest.mark.parametrize("k", [0, -1])
def test_k_below_one_is_refused(index, k):
    with pytest.raises(InputError, match=f"k is {k}"):
        index.search("q", k)


def test_an_encoder_that_scores_text_decides_the_order():
    """Eight dimensions are mostly noise; the order is BM25's all the same, in small corpora of all passages."""
    passages = [make(i, metadata={"odd": i % 2}) for i in range(60)]
    passages += [Passage(id=f"oak{i}", text=f"oak tree {'and more words ' * i}", metadata={"odd": 1}) for i in range(4)]
    encoder = LexicalEncoder(8)
    with PassageIndex(encoder) as index:
        index.add(passages)
        expected = [f"oak{i}" for i in range(4)]
        assert [hit.passage.id for hit in index.search("oak trees", 4)] == expected
        assert [hit.passage.id for hit in index.search("oak trees", 4, where={"odd": 1})] == expected
        assert index.search_many(["oak", "", "text"], 3)[::2] == [index.search("oak", 3), index.search("text", 3)]
        counts = CorpusCounts(encoder.passage_terms(passages))
        hit = index.search("oak trees", 1)[0]
        assert hit.score == encoder.score("oak trees", [hit.passage], counts)[0]
        # Equal scores: in order of addition.
        assert [hit.passage.id for hit in index.search("text", 3)] == ["d-0", "d-1", "d-2"]


# -- filters ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_filters_are_exact_for_every_kind(kind):
    passages = many(1500) + many(3, "rare")
    with PassageIndex(HashEncoder(), kind=kind) as index:
        index.add(passages)
        for where, keep in [
            ({"even": True, "third": 2}, lambda p: p.metadata["even"] and p.metadata["third"] == 2),
            ({"document_id": "rare"}, lambda p: p.document_id == "rare"),
            ({"document_id": "rare", "third": 1}, lambda p: p.document_id == "rare" and p.metadata["third"] == 1),
            ({}, None),
        ]:
            if keep is None and kind != "flat":
                continue
            expected = brute_force("q", [p for p in passages if keep is None or keep(p)], 8)
            assert found(index.search("q", 8, where=where)) == expected


def test_a_filter_that_leaves_thousands_is_exact_too(index):
    passages = many(9000)
    index.add(passages)
    kept = [p for p in passages if p.metadata["even"]]
    assert found(index.search("q", 9, where={"even": True})) == brute_force("q", kept, 9)


@pytest.mark.parametrize(
    ("stored", "asked", "equal"),
    [
        (2, 2.0, True),
        (2.5, 2.5, True),
        (1e300, 1e300, True),
        (1, True, False),
        (0, False, False),
        (None, None, True),
        ("1", 1, False),
        ("a\0b", "a\0b", True),
        ("a\0b", "a\0c", False),
        ("Ä", "A\u0308", False),
        ([1, "x"], (1, "x"), True),
        ({"b": 1, "a": 2}, {"a": 2, "b": 1}, True),
        (10**40, 10**40, True),
        ("x" * 100_000, "x" * 100_000, True),
        ("\ud800", "\ud800", True),
    ],
)
def test_what_equals_what_in_a_filter(index, stored, asked, equal):
    index.add([Passage(id="p", text="t", metadata={"key": stored})])
    assert bool(index.search("q", where={"key": asked})) is equal
    assert index.get("p").metadata["key"] == stored


@pytest.mark.parametrize("name", ["'; DROP TABLE passage; --", "$.a", "a.b", '"', "", "\0", "key' OR 1=1", "ключ"])
def test_hostile_filter_names_and_values(index, name):
    index.add([Passage(id="a", text="t", metadata={name: name}), Passage(id="b", text="u", metadata={"x": name})])
    assert [hit.passage.id for hit in index.search("q", where={name: name})] == ["a"]
    assert index.search("q", where={name: "other"}) == []
    assert len(index) == 2


def test_filters_that_cannot_match_or_be_asked(index):
    index.add([make(1, metadata={"a": 1})])
    assert index.search("q", where={"missing": None}) == []
    assert index.search("q", where={"document_id": 3}) == []
    with pytest.raises(InputError, match="JSON"):
        index.search("q", where={"a": object()})
    with pytest.raises(InputError, match="JSON"):
        index.search("q", where={"a": float("nan")})
    with pytest.raises(InputError, match="surrogate"):
        index.search("q", where={"document_id": "\ud800"})


# -- writing ----------------------------------------------------------------------------------------------------------


def test_replacing_keeps_what_is_unchanged_and_embeds_only_what_is_new():
    encoder = HashEncoder()
    with PassageIndex(encoder) as index:
        assert index.replace_document("d", [make(1), make(2), make(3)]) == Change(added=3)
        changed = Passage(id="d-2", text="other text", document_id="d")
        assert index.replace_document("d", [make(4), changed, make(1)]) == Change(added=2, kept=1, removed=2)
        assert encoder.batches == [["d-1", "d-2", "d-3"], ["d-4", "d-2"]]
        assert [p.id for p in index.passages("d")] == ["d-4", "d-2", "d-1"]
        # Kept passages keep their row: "all" is in order of addition.
        assert [p.id for p in index.passages()] == ["d-1", "d-4", "d-2"]
        assert index.get("d-2").text == "other text"


def test_metadata_changes_without_embedding_again():
    encoder = HashEncoder()
    with PassageIndex(encoder) as index:
        index.replace_document("d", [make(1, metadata={"v": 1, "w": 1})])
        assert index.replace_document("d", [make(1, metadata={"v": 2})]) == Change(kept=1)
        assert index.get("d-1").metadata == {"v": 2}
        assert index.search("q", where={"v": 1}) == index.search("q", where={"w": 1}) == []
        assert len(index.search("q", where={"v": 2})) == 1
        assert len(encoder.batches) == 1


def test_a_batch_of_documents_is_one_embedding_call():
    encoder = HashEncoder()
    with PassageIndex(encoder) as index:
        updates = [DocumentUpdate(name, [make(1, name), make(2, name)], content_hash=name) for name in "abc"]
        assert index.replace_documents(updates) == Change(added=6)
        assert len(encoder.batches) == 1
        assert index.documents() == [DocumentInfo(name, 2, name) for name in "abc"]


def test_add_joins_existing_documents(index):
    index.replace_document("d", [make(1), make(2)], content_hash="h", fingerprint="f")
    assert index.add([make(2), make(1, "e")]) == Change(added=1, kept=1)
    assert index.document_hash("d") == "h"
    changed = Passage(id="d-1", text="new", document_id="d")
    assert index.add([make(3), changed]) == Change(added=2, removed=1)
    assert [p.id for p in index.passages("d")] == ["d-1", "d-2", "d-3"]
    assert index.document_hash("d") == index.document_hash("e") == ""
    assert index.document_hash("d", "f") is None
    assert index.documents() == [DocumentInfo("d", 3, ""), DocumentInfo("e", 1, "")]


def test_a_passage_may_move_between_documents_in_one_batch_but_not_be_in_two(index):
    index.add([make(1, "a"), make(1, "b")])
    moved = Passage(id="a-1", text="text a 1", document_id="b")
    with pytest.raises(InputError, match=r"'a-1' of document 'b' belongs to document 'a'"):
        index.replace_document("b", [moved])
    assert [p.id for p in index.passages("b")] == ["b-1"]
    assert index.replace_documents([DocumentUpdate("b", [moved]), DocumentUpdate("a", [])]) == Change(
        added=1, removed=2
    )
    assert index.documents() == [DocumentInfo("a", 0, ""), DocumentInfo("b", 1, "")]


def test_deleting(index):
    index.replace_document("d", [make(1), make(2)], block_keys={"d-1": ["k1", "k2"], "d-2": ["k2"]}, fingerprint="f")
    index.replace_document("e", [make(1, "e")], block_keys={"e-1": ["k2"]}, fingerprint="f")
    assert index.delete_document("d") == Change(removed=2, orphaned_block_keys=frozenset({"k1"}))
    assert index.delete_document("d") == index.delete_document("never") == Change()
    assert [hit.passage.id for hit in index.search("q")] == ["e-1"]
    assert index.document_hash("d") is None
    assert list(index.passages("d")) == []
    assert index.delete_document("e").orphaned_block_keys == {"k2"}
    assert index.block_keys() == set()


def test_an_empty_document_is_remembered_and_deleted(index):
    assert index.replace_document("d", [], content_hash="h") == Change()
    assert index.document_hash("d") == "h"
    assert index.delete_document("d") == Change()
    assert index.document_hash("d") is None


def test_block_keys_follow_their_passages(index):
    index.replace_document("d", [make(1), make(2)], block_keys={"d-1": ["a", "b"], "d-2": ["b", "c"]}, fingerprint="f")
    assert index.set_block_keys("d-1", "g", ["x"]) == Change(kept=1)
    assert index.block_keys() == {"a", "b", "c", "x"}
    assert index.block_keys("f") == {"a", "b", "c"}
    assert index.block_keys("none") == set()
    assert index.set_block_keys("d-2", "f", ["d"]).orphaned_block_keys == {"c"}
    changed = Passage(id="d-1", text="new", document_id="d")
    change = index.replace_document("d", [changed, make(2)], block_keys={"d-1": ["b"], "d-2": ["e"]}, fingerprint="f")
    assert change == Change(added=1, kept=1, removed=1, orphaned_block_keys=frozenset({"a", "x", "d"}))
    assert index.block_keys() == {"b", "e"}
    # Without block keys, kept passages keep theirs.
    assert index.replace_document("d", [changed, make(2)]).orphaned_block_keys == frozenset()
    assert index.block_keys("f") == {"b", "e"}
    with pytest.raises(InputError, match="no passage 'nope'"):
        index.set_block_keys("nope", "f", ["a"])


def test_document_hashes_are_per_fingerprint_and_end_with_the_passages_they_describe(index):
    index.replace_document("d", [make(1)], content_hash="h1", fingerprint="f")
    assert index.document_hash("d") == index.document_hash("d", "f") == "h1"
    assert index.document_hash("d", "g") is None
    # Equal passages under another fingerprint: both hold.
    index.replace_document("d", [make(1)], content_hash="h1", fingerprint="g")
    assert index.document_hash("d", "f") == index.document_hash("d", "g") == "h1"
    # Other passages: what was done under "f" is void, even when the text comes back later.
    index.replace_document("d", [make(2)], content_hash="h2", fingerprint="g")
    index.replace_document("d", [make(1)], content_hash="h1")
    assert index.document_hash("d") == "h1"
    assert index.document_hash("d", "f") is None
    assert index.document_hash("unknown") is None


def refusals():
    surrogate = "\ud800"
    return [
        ([DocumentUpdate("d", [make(1), make(1)])], "'d-1' occurs twice"),
        ([DocumentUpdate("d", [make(1)]), DocumentUpdate("d", [])], "'d' occurs twice"),
        ([DocumentUpdate("", [])], "is empty"),
        ([DocumentUpdate("e", [make(1)])], "names document 'd', not 'e'"),
        ([DocumentUpdate("d", [make(1)], block_keys={"d-9": ["k"]})], "'d-9'"),
        ([DocumentUpdate("d", [make(1)], block_keys={"d-1": [surrogate]})], "surrogate"),
        ([DocumentUpdate(surrogate, [])], "surrogate"),
        ([DocumentUpdate("d", [], content_hash=surrogate)], "surrogate"),
        ([DocumentUpdate("d", [make(1, metadata={"x": {1, 2}})])], "passage 'd-1': metadata 'x'"),
        ([DocumentUpdate("d", [make(1, metadata={"x": float("inf")})])], "JSON"),
    ]


@pytest.mark.parametrize(("updates", "message"), refusals())
def test_refused_updates_change_nothing_and_embed_nothing(updates, message):
    encoder = HashEncoder()
    with PassageIndex(encoder) as index:
        index.add([make(1, "other")])
        with pytest.raises(InputError, match=message):
            index.replace_documents(updates)
        assert encoder.batches == [["other-1"]]
        assert [info.document_id for info in index.documents()] == ["other"]
        index.add([make(1)])


def test_metadata_nested_too_deep_is_refused(index):
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="JSON"):
        index.add([make(1, metadata={"deep": deep})])
    # Taken apart by hand: freeing it recursively is slow.
    while deep:
        deep = deep[0]


class Odd(HashEncoder):
    """An encoder that breaks its promise."""

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def encode_passages(self, passages):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (np.zeros((1, 3), np.float32), "shape"),
        (np.zeros((2, DIMENSION), np.float32), "shape"),
        (np.full((1, DIMENSION), np.nan, np.float32), "not finite for passage 'd-1'"),
    ],
)
def test_an_encoder_that_breaks_its_promise(answer, message):
    with PassageIndex(Odd(answer)) as index:
        with pytest.raises(PassageIndexError, match=message):
            index.add([make(1)])
        assert len(index) == 0


HOSTILE_IDS = [
    "../../etc/passwd",
    "a\0b",
    "line\nbreak",
    "q\"uo'te",
    "'; DELETE FROM passage; --",
    "x" * 4096,
    "\u202edesrever",
    " ",
    "%s %n ?",
]


def test_hostile_ids(tmp_path):
    with PassageIndex(HashEncoder(), tmp_path) as index:
        for id in HOSTILE_IDS:
            passage = Passage(id=id, text="t" + id, document_id="doc" + id, title=id)
            keys = {id: [id]}
            index.replace_document("doc" + id, [passage], content_hash=id, block_keys=keys, fingerprint=id)
    with PassageIndex(HashEncoder(), tmp_path) as index:
        for id in HOSTILE_IDS:
            assert index.get(id).id == id
            assert index.document_hash("doc" + id, id) == id
            assert [p.id for p in index.passages("doc" + id)] == [id]
            assert [hit.passage.id for hit in index.search("q", where={"document_id": "doc" + id})] == [id]
            assert index.block_keys(id) == {id}
        assert len(index.search("q", 100)) == len(HOSTILE_IDS)
        for id in HOSTILE_IDS:
            assert index.delete_document("doc" + id) == Change(removed=1, orphaned_block_keys=frozenset({id}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["passages.sqlite3", "vectors.faiss"]


def test_hostile_texts():
    with PassageIndex(LexicalEncoder(64)) as index:
        texts = ["", "\0\x01\x1b[31m\x7f", "x" * 100_000, "word " * 20_000, "\ufffe\uffff", "日本" * 50_000]
        index.add([Passage(id=str(i), text=text) for i, text in enumerate(texts)])
        assert [p.text for p in index.passages()] == texts
        assert index.search("word", 1)[0].passage.id == "3"


@pytest.mark.parametrize("call", ["get", "passages", "document_hash", "block_keys", "delete_document"])
def test_lone_surrogates_in_lookups(index, call):
    with pytest.raises(InputError, match="surrogate"):
        getattr(index, call)("\ud800")


def test_passages_are_read_page_by_page_beside_writes(index):
    index.add(many(1200))
    reading = index.passages()
    first = [next(reading).id for _ in range(3)]
    index.delete_document("d")
    index.add([make(1, "late")])
    rest = [p.id for p in reading]
    assert first == ["d-0", "d-1", "d-2"]
    assert rest[-1] == "late-1"
    assert len(rest) == 512 - 3 + 1


# -- lexical statistics -----------------------------------------------------------------------------------------------

WORDS = ["tree", "oak", "fir", "dog", "cat"]
document_texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=4).map(" ".join), max_size=3)
operations = st.lists(
    st.tuples(st.sampled_from(["replace", "add", "delete", "reopen"]), st.sampled_from("abc"), document_texts),
    max_size=12,
)


@settings(max_examples=25, deadline=None)
@given(operations)
def test_after_any_history_an_index_equals_a_new_one_of_the_same_passages(history):
    """Model-based: a dict plays the index; search results, term counts and block keys must follow it."""
    model = {}
    with tempfile.TemporaryDirectory() as directory:
        index = PassageIndex(LexicalEncoder(64), directory)
        for kind, document, texts in history:
            passages = [Passage(id=f"{document}{i}", text=text, document_id=document) for i, text in enumerate(texts)]
            known = model.setdefault(document, {})
            if kind == "reopen":
                index.close()
                index = PassageIndex(LexicalEncoder(64), directory)
            elif kind == "delete":
                index.delete_document(document)
                known.clear()
            elif kind == "add":
                index.add(passages)
                known.update({p.id: p for p in passages})
            else:
                index.replace_document(
                    document, passages, block_keys={p.id: [p.text] for p in passages}, fingerprint="f"
                )
                model[document] = {p.id: p for p in passages}
        with closing(index):
            check_against_model(index, [p for known in model.values() for p in known.values()], Path(directory))


def check_against_model(index, passages, directory):
    assert {p.id: p.text for p in index.passages()} == {p.id: p.text for p in passages}
    assert len(index) == len(passages)
    terms = Counter(term for found in LexicalEncoder(64).passage_terms(passages) for term in found)
    assert dict(stored(directory, "SELECT term, passages FROM term")) == terms
    assert index.block_keys() <= {p.text for p in passages}
    with PassageIndex(LexicalEncoder(64)) as fresh:
        fresh.add(passages)
        for question in (*WORDS, "oak tree", ""):
            mine, theirs = index.search(question, 50), fresh.search(question, 50)
            assert sorted(found(mine)) == sorted(found(theirs))


def stored(directory, sql):
    with closing(sqlite3.connect(Path(directory) / "passages.sqlite3")) as connection:
        return connection.execute(sql).fetchall()


# -- files ------------------------------------------------------------------------------------------------------------


def filled(directory, kind="flat", count=1100):
    with PassageIndex(HashEncoder(), directory, kind=kind) as index:
        index.add(many(count))
        return found(index.search("q", 10))


@pytest.mark.parametrize("kind", KINDS)
def test_reopening_loads_the_vectors_without_building(kind, tmp_path, caplog):
    expected = filled(tmp_path, kind)
    caplog.clear()
    encoder = HashEncoder()
    with PassageIndex(encoder, tmp_path, kind=kind) as index:
        assert found(index.search("q", 10)) == expected
        before = (tmp_path / "vectors.faiss").stat().st_mtime_ns
        index.save()
    assert (tmp_path / "vectors.faiss").stat().st_mtime_ns == before
    assert caplog.records == []
    assert encoder.batches == []


def test_soft_deleted_rows_stay_deleted_after_reopening(tmp_path, caplog):
    with PassageIndex(HashEncoder(), tmp_path, kind="hnsw") as index:
        index.add(many(300, "a") + many(40, "b"))
        index.delete_document("b")
    with PassageIndex(HashEncoder(), tmp_path, kind="hnsw") as index:
        assert {hit.passage.document_id for hit in index.search("q", 400)} == {"a"}
    assert caplog.records == []


def rewrite(file, *, header=None, change=lambda payload: payload):
    """Write a vector file again with another header or other content, and a checksum that is true."""
    data = file.read_bytes()
    old = {name: value for name, value in json.loads(data[:512]).items() if name not in ("magic", "bytes", "checksum")}
    payload = np.frombuffer(change(data[512:]), np.uint8)
    write_vector_file(file, old | (header or {}), [payload])


def damage(directory, how):
    """Damage the vector file; returns what the log must say."""
    file = directory / "vectors.faiss"
    data = bytearray(file.read_bytes())
    header = json.loads(data[:512])
    if how == "missing":
        file.unlink()
        return "there is none"
    if how == "true checksum, other stamp":
        rewrite(file, header={"stamp": "9:x"})
        return "stamp is '9:x'"
    if how == "true checksum, foreign content":
        rewrite(file, change=lambda payload: b"not an index")
        return "header says"
    if how == "true checksum, other counts":
        rewrite(file, header={"entries": 7})
        return "its "
    if how == "true checksum, other type":
        rewrite(file, header={"trained_on": 1100 - header["trained_on"], "lists": 1})
        return "its rows are not" if header["kind"] == "ivf" else "inverted lists, which"
    if how == "stamp":
        data[:512] = json.dumps(header | {"stamp": "9:x"}).encode().ljust(512)
    elif how == "header":
        data[:512] = json.dumps(header | {"trained_on": 0, "lists": 1}).encode().ljust(512)
    else:
        data = {
            "empty": bytearray(),
            "garbage": bytearray(b"\xff" * 5000),
            "header is a list": bytearray(b"[]".ljust(600)),
            "header nests": bytearray(b"[" * 600),
            "header is spelled otherwise": data[:512].replace(b'", "', b'","', 1).ljust(512) + data[512:],
            "truncated": data[:-1],
            "longer": data + b"x",
            "bit flip": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        }[how]
    file.write_bytes(data)
    return {
        "stamp": "stamp is",
        "header": "checksum" if header["kind"] == "flat" else "",
        "truncated": "bytes long",
        "longer": "bytes long",
        "bit flip": "checksum",
    }.get(how, "header is damaged")


DAMAGES = [
    "missing",
    "empty",
    "garbage",
    "header",
    "header is a list",
    "header nests",
    "header is spelled otherwise",
    "truncated",
    "longer",
    "bit flip",
    "stamp",
    "true checksum, other stamp",
    "true checksum, foreign content",
    "true checksum, other counts",
    "true checksum, other type",
]


@pytest.mark.parametrize(
    ("how", "kind"),
    [(how, "flat") for how in DAMAGES]
    + [(how, kind) for kind in ("hnsw", "ivf") for how in DAMAGES if "stamp" in how or "flip" in how or "true" in how],
)
def test_a_damaged_vector_file_is_rebuilt_and_the_log_says_why(how, kind, tmp_path, caplog):
    filled(tmp_path, kind)
    caplog.clear()
    reason = damage(tmp_path, how)
    with caplog.at_level(logging.INFO, logger="blockrag"), PassageIndex(HashEncoder(), tmp_path, kind=kind) as index:
        assert reason in caplog.text
        # Only damage is worth a warning.
        ordinary = how == "missing" or "stamp" in how
        assert {record.levelname for record in caplog.records} == {"INFO" if ordinary else "WARNING"}
        best = brute_force("q", many(1100), 1)
        assert index.search("q", 1)[0].score == best[0][1]
        index.save()
    caplog.clear()
    PassageIndex(HashEncoder(), tmp_path, kind=kind).close()
    assert caplog.records == []


def numbers(payload, dtype, start, count):
    """Numbers within a payload, to be changed in place, and the payload's new bytes."""
    data = bytearray(payload)
    return np.frombuffer(data, dtype, count=count, offset=start), data


def changed(dtype, start, count, change):
    def apply(payload):
        array, data = numbers(payload, dtype, start, count)
        change(array)
        return bytes(data)

    return apply


def set_at(place, value):
    return lambda array: array.__setitem__(place, value)


def link_above(levels_at):
    """Have a node with two layers lead, on the upper one, to a node that has one."""

    def apply(payload):
        levels, data = numbers(payload, "<i4", levels_at, 1100)
        begins = np.concatenate([[0], np.cumsum(np.where(levels > 0, 64 + 32 * (levels - 1), 0))])
        node, low = int(np.flatnonzero(levels > 1)[0]), int(np.flatnonzero(levels == 1)[0])
        neighbours = np.frombuffer(data, "<i4", offset=levels_at + 4 * 1100, count=int(begins[-1]))
        neighbours[begins[node] + 64] = low
        return bytes(data)

    return apply


# What follows the rows (8 bytes for each of 1100) in a graph's file: levels, neighbours. In a file of lists: 28 sizes,
# centroids, rows.
HOSTILE = [
    ("flat", {}, changed("<i8", 0, 1100, set_at(5, 5)), "not in order"),
    ("flat", {}, changed("<i8", 0, 1100, set_at(1099, 2**62)), "not those of the database"),
    ("flat", {"entries": 2**62}, bytes, "header says entries 4611686018427387904"),
    ("flat", {"entries": -1}, bytes, "header says entries -1"),
    ("flat", {"entries": True}, bytes, "header says entries True"),
    ("flat", {"entries": "9"}, bytes, "header says entries '9'"),
    ("flat", {}, lambda payload: payload + b"x", "1 bytes in it belong to nothing"),
    ("hnsw", {}, changed("<i4", 8800, 1100, set_at(3, 0)), "levels from 0"),
    ("hnsw", {}, changed("<i4", 8800, 1100, set_at(3, 2**31 - 1)), "to 2147483647"),
    ("hnsw", {}, changed("<i4", 8800, 1100, set_at(slice(None), 6)), "bytes left"),
    ("hnsw", {}, changed("<i4", 13200, 64, set_at(3, 1100)), "neighbours beyond"),
    ("hnsw", {}, changed("<i4", 13200, 64, set_at(3, -2)), "neighbours beyond"),
    ("hnsw", {}, link_above(8800), "leads to a layer"),
    ("hnsw", {"entry_point": 1100}, bytes, "begins at 1100"),
    ("hnsw", {"entry_point": -1}, bytes, "begins at -1"),
    ("hnsw", {"entry_point": None}, bytes, "begins at None"),
    ("ivf", {}, changed("<i8", 0, 28, set_at(3, -1)), "lists do not hold"),
    ("ivf", {}, changed("<i8", 0, 28, set_at(3, 2**62)), "lists do not hold"),
    ("ivf", {"lists": 0}, bytes, "lists do not hold"),
    ("ivf", {"lists": 2**40}, bytes, "header says lists"),
    ("ivf", {}, changed("<i8", 8 * 28 + 4 * 28 * DIMENSION, 1100, set_at(slice(2), 7)), "a row twice"),
]


@pytest.mark.parametrize(("kind", "header", "change", "message"), HOSTILE)
def test_a_vector_file_with_a_true_checksum_is_not_trusted_either(kind, header, change, message, tmp_path, caplog):
    filled(tmp_path, kind)
    assert kind != "ivf" or json.loads((tmp_path / "vectors.faiss").read_bytes()[:512])["lists"] == 28
    caplog.clear()
    rewrite(tmp_path / "vectors.faiss", header=header, change=change)
    with PassageIndex(HashEncoder(), tmp_path, kind=kind) as index:
        assert message in caplog.text
        assert index.search("q", 1)[0].score == brute_force("q", many(1100), 1)[0][1]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_is_what_was_saved(kind, tmp_path):
    rng = np.random.default_rng(1)
    vectors = rng.standard_normal((2000, DIMENSION)).astype(np.float32)
    rows = np.arange(10, 2010)
    index = VectorIndex(kind, DIMENSION, [(rows, vectors)])
    index.remove(rows[::5])
    index.save(tmp_path / "file", "1:x")
    loaded = VectorIndex.load(tmp_path / "file", kind, DIMENSION, stamp="1:x", rows=index.rows)
    queries = rng.standard_normal((20, DIMENSION)).astype(np.float32)
    for one in (index, loaded):
        one.add(np.arange(3000, 3100), vectors[:100] + 1)
    for expected, found_again in zip(index.search(queries, 30), loaded.search(queries, 30), strict=True):
        np.testing.assert_array_equal(expected, found_again)
    held = {row: vector for some, rest in loaded.vectors() for row, vector in zip(some.tolist(), rest, strict=True)}
    assert held.keys() >= set(loaded.rows.tolist())
    np.testing.assert_array_equal(held[11], vectors[1])


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_vector_file(kind, tmp_path):
    VectorIndex(kind, DIMENSION).save(tmp_path / "file", "0:new")
    loaded = VectorIndex.load(tmp_path / "file", kind, DIMENSION, stamp="0:new", rows=np.zeros(0, dtype=np.int64))
    assert len(loaded.rows) == 0
    assert list(loaded.vectors()) == []
    loaded.add(np.array([1]), np.ones((1, DIMENSION), np.float32))
    assert loaded.search(np.ones((1, DIMENSION), np.float32), 1)[1].tolist() == [[1]]


def test_a_directory_as_vector_file_does_not_stop_closing(tmp_path, caplog):
    index = PassageIndex(HashEncoder(), tmp_path)
    index.add([make(1)])
    (tmp_path / "vectors.faiss").mkdir()
    with pytest.raises(PassageIndexError, match=r"vectors\.faiss.*save\(\) again"):
        index.save()
    assert found(index.search("q")) == brute_force("q", [make(1)], 5)
    index.close()
    index.close()
    assert "without saving" in caplog.text
    caplog.clear()
    with PassageIndex(HashEncoder(), tmp_path) as index:
        assert "cannot be read" in caplog.text
        assert len(index.search("q")) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_while_saving_keeps_the_old_file(tmp_path):
    filled(tmp_path, count=500)
    before = (tmp_path / "vectors.faiss").read_bytes()
    with PassageIndex(HashEncoder(), tmp_path) as index:
        index.add(many(900, "e"))
        with full_disk(), pytest.raises(PassageIndexError, match="free the disk"):
            index.save()
        assert (tmp_path / "vectors.faiss").read_bytes() == before
        assert not list(tmp_path.glob("*.partial"))
        index.save()
    assert len((tmp_path / "vectors.faiss").read_bytes()) > len(before)


@contextmanager
def full_disk():
    """No file of this process may grow beyond 4 KiB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_while_adding_loses_nothing(tmp_path):
    with PassageIndex(HashEncoder(), tmp_path) as index:
        index.add(many(50))
        with full_disk(), pytest.raises(PassageIndexError, match=r"passages\.sqlite3: .*full"):
            index.add(many(900, "e"))
        assert found(index.search("q", 100)) == brute_force("q", many(50), 100)
        assert index.add(many(900, "e")).added == 900
        assert len(index.search("q", 2000)) == 950


def test_another_kind_rebuilds(tmp_path, caplog):
    filled(tmp_path, "flat")
    with PassageIndex(HashEncoder(), tmp_path, kind="hnsw") as index:
        assert "kind is 'flat', not 'hnsw'" in caplog.text
        assert len(index.search("q", 10)) == 10


def test_unknown_kinds_are_refused():
    with pytest.raises(InputError, match="'annoy'"):
        PassageIndex(HashEncoder(), kind="annoy")


def test_another_encoder_is_refused(tmp_path):
    PassageIndex(LexicalEncoder(64), tmp_path).close()
    with pytest.raises(PassageIndexError, match=r"lexical-1-64.*\(64 dimensions\), not 'hash-16'.*ingest"):
        PassageIndex(HashEncoder(), tmp_path)


@pytest.mark.parametrize("how", ["half", "last page", "garbage", "not a database", "page of zeros"])
def test_a_damaged_database_is_named_with_what_to_do(how, tmp_path):
    filled(tmp_path)
    file = tmp_path / "passages.sqlite3"
    data = file.read_bytes()
    file.write_bytes(
        {
            "half": data[: len(data) // 2],
            "last page": data[:-4096],
            "garbage": b"\xff" * len(data),
            "not a database": b"hello",
            "page of zeros": data[:4096] + bytes(4096 * 40) + data[4096 * 41 :],
        }[how]
    )
    with pytest.raises(PassageIndexError, match=r"passages\.sqlite3 is damaged .*restore it from a backup"):
        PassageIndex(HashEncoder(), tmp_path)


def test_a_database_that_lost_everything_is_no_new_one(tmp_path):
    filled(tmp_path, count=5)
    (tmp_path / "passages.sqlite3").write_bytes(b"")
    with pytest.raises(PassageIndexError, match=r"damaged \(it is empty"):
        PassageIndex(HashEncoder(), tmp_path)
    (tmp_path / "vectors.faiss").unlink()
    with PassageIndex(HashEncoder(), tmp_path) as index:
        assert len(index) == 0


def execute(directory, *statements):
    with closing(sqlite3.connect(directory / "passages.sqlite3")) as connection:
        for sql in statements:
            connection.execute(sql)
        connection.commit()


# Has the next opening take everything for sound, as a database that was written before there were checksums.
FORGED = ["DROP TABLE digest", "UPDATE meta SET value = '1' WHERE name = 'schema'"]
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x AS name, x AS value FROM n"


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (["CREATE TRIGGER t AFTER INSERT ON term BEGIN DELETE FROM passage; END"], "holds trigger t"),
        (["CREATE VIEW v AS SELECT 1"], "holds view v"),
        (["DROP TABLE meta", f"CREATE VIEW meta AS {ENDLESS}"], "holds view meta"),
        (["CREATE VIRTUAL TABLE v USING fts5(x)"], "holds table v"),
        (["CREATE INDEX i ON term (upper(term))"], "holds index i"),
        (["DROP INDEX fact_row", "CREATE INDEX fact_row ON fact (abs(row))"], "holds another index fact_row"),
        (["ALTER TABLE term ADD COLUMN twice INTEGER AS (2 * passages)"], "holds another table term"),
        (["DROP TABLE term"], "lacks table term"),
        (["UPDATE meta SET value = '99' WHERE name = 'schema'"], "format 99"),
        (["DELETE FROM meta WHERE name = 'schema'"], "lacks 'schema'"),
        (["UPDATE meta SET value = x'00' WHERE name = 'schema'"], "a row holds"),
        (["UPDATE embedding SET vector = x'00' WHERE row = 3"], "embedding of row 3 is not"),
        (["UPDATE embedding SET vector = 'text' WHERE row = 3"], "embedding of row 3 is not"),
        (["UPDATE embedding SET vector = zeroblob(300000000) WHERE row = 3"], "embedding of row 3 is not"),
        ([f"UPDATE embedding SET vector = x'{'0000c07f' * DIMENSION}' WHERE row = 3", *FORGED], "row 3 is not finite"),
        (["UPDATE embedding SET row = -1 WHERE row = 3"], "not in order"),
        ([f"UPDATE embedding SET vector = x'{'00' * 4 * DIMENSION}' WHERE row = 3"], "row 3 fails its checksum"),
        (["UPDATE digest SET vector = x'' WHERE row = 3"], "row 3 fails its checksum"),
        (["UPDATE digest SET row = 30 WHERE row = 3"], "row 3 fails its checksum"),
    ],
)
def test_a_foreign_or_tampered_database_is_refused(sql, message, tmp_path):
    filled(tmp_path, count=5)
    execute(tmp_path, *sql)
    (tmp_path / "vectors.faiss").unlink()
    with pytest.raises(PassageIndexError, match=message):
        PassageIndex(HashEncoder(), tmp_path)


@pytest.mark.parametrize(
    ("sql", "call", "message"),
    [
        ("UPDATE passage SET metadata = '{' WHERE id = 'd-3'", lambda index: index.get("d-3"), "metadata of passage"),
        ("UPDATE passage SET metadata = '[]' WHERE id = 'd-3'", lambda index: index.get("d-3"), "metadata of passage"),
        (
            f"UPDATE passage SET metadata = '{'[' * 200_000}' WHERE id = 'd-3'",
            lambda index: index.search("q"),
            "metadata of passage",
        ),
        ("UPDATE passage SET text = x'ff' WHERE id = 'd-3'", lambda index: list(index.passages()), "a row holds"),
        (
            "UPDATE passage SET text = CAST(x'ff' AS TEXT) WHERE id = 'd-3'",
            lambda index: index.search("q"),
            "not UTF-8",
        ),
        ("UPDATE passage SET id = '' WHERE id = 'd-3'", lambda index: index.search("q"), "needs a non-empty id"),
        ("UPDATE passage SET ordinal = 'x'", lambda index: index.delete_document("d"), "a row holds"),
        ("UPDATE meta SET value = 'x' WHERE name = 'stamp'", lambda index: index.delete_document("d"), "its stamp is"),
        ("INSERT INTO block VALUES (1, '', 0, x'00')", lambda index: index.block_keys(), "a row holds"),
        ("INSERT INTO term VALUES ('capital', -3)", lambda index: index._database.term_counts(["capital"]), "-3 pass"),
        ("INSERT INTO term VALUES ('capital', 1e9)", lambda index: index._database.term_counts(["capital"]), None),
        ("INSERT INTO term VALUES ('capital', 0.5)", lambda index: index._database.term_counts(["capital"]), "a row"),
    ],
)
def test_values_that_were_never_written_are_damage_not_a_crash(sql, call, message, tmp_path):
    filled(tmp_path, count=5)
    execute(tmp_path, sql, *FORGED)
    if message is None:
        with PassageIndex(HashEncoder(), tmp_path) as index:
            call(index)
        return
    with pytest.raises(PassageIndexError, match=message) as caught, PassageIndex(HashEncoder(), tmp_path) as index:
        call(index)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("column", ["id", "title", "text", "metadata", "document_id", "ordinal"])
def test_a_passage_that_changed_by_itself_is_never_handed_out(column, tmp_path):
    filled(tmp_path, count=5)
    other = {"metadata": "'{\"even\":true}'", "ordinal": "77"}.get(column, f"'d' || {column}")
    execute(tmp_path, f"UPDATE passage SET {column} = {other} WHERE row = 3")
    with PassageIndex(HashEncoder(), tmp_path) as index:
        for call in (lambda: index.search("q"), lambda: list(index.passages())):
            with pytest.raises(PassageIndexError, match="fails its checksum"):
                call()


def test_an_index_of_format_1_becomes_one_of_format_2(tmp_path):
    filled(tmp_path, count=1000)
    with PassageIndex(HashEncoder(), tmp_path) as index:
        expected = found(index.search("q", 50)), list(index.passages())
    execute(tmp_path, *FORGED)
    assert PassageIndex.peek(tmp_path) == IndexOrigin("hash-16", DIMENSION)
    for _ in range(2):
        with PassageIndex(HashEncoder(), tmp_path) as index:
            assert (found(index.search("q", 50)), list(index.passages())) == expected
            assert index.verify().ok
    execute(tmp_path, "DROP TABLE digest")
    with pytest.raises(PassageIndexError, match="lacks table digest"):
        PassageIndex(HashEncoder(), tmp_path)


def test_a_schema_that_is_no_text_is_damage(tmp_path):
    filled(tmp_path, count=5)
    file = tmp_path / "passages.sqlite3"
    file.write_bytes(file.read_bytes().replace(b"CREATE TABLE term", b"CREAT\xe6 TABLE term"[:17]))
    for call in (lambda: PassageIndex.peek(tmp_path), lambda: PassageIndex(HashEncoder(), tmp_path)):
        with pytest.raises(PassageIndexError, match=r"passages\.sqlite3"):
            call()
    with PassageIndex(HashEncoder()) as index, pytest.raises(PassageIndexError, match="cannot be copied"):
        index.copy_to(tmp_path)


def test_a_name_as_long_as_a_book_is_not_printed(tmp_path):
    filled(tmp_path, count=5)
    execute(tmp_path, f"UPDATE meta SET value = '{'n' * 100_000}' WHERE name IN ('encoder', 'dimension')")
    for call in (lambda: PassageIndex.peek(tmp_path), lambda: PassageIndex(HashEncoder(), tmp_path)):
        with pytest.raises(PassageIndexError) as caught:
            call()
        assert len(str(caught.value)) < 1000


def test_peeking_runs_nothing_that_a_database_brings(tmp_path):
    filled(tmp_path, count=5)
    execute(tmp_path, "DROP TABLE meta", f"CREATE VIEW meta AS {ENDLESS}")
    with pytest.raises(PassageIndexError, match="holds view meta"):
        PassageIndex.peek(tmp_path)


def test_the_files_are_their_owners_alone(tmp_path):
    directory = tmp_path / "new"
    with PassageIndex(HashEncoder(), directory) as index:
        index.add([make(1)])
        index.save()
        index.copy_to(tmp_path / "copy")
        files = [*directory.iterdir(), *(tmp_path / "copy").iterdir()]
        assert {file.name for file in files} >= {"passages.sqlite3", "passages.sqlite3-wal", "vectors.faiss"}
        assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
        assert directory.stat().st_mode & 0o777 == 0o700
    (directory / "passages.sqlite3").chmod(0o644)
    PassageIndex(HashEncoder(), directory).close()
    assert (directory / "passages.sqlite3").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["passages.sqlite3", "passages.sqlite3-wal"])
def test_links_and_pipes_are_not_followed(name, tmp_path):
    directory = tmp_path / "index"
    filled(directory, count=5)
    victim = tmp_path / "victim"
    victim.write_bytes((directory / "passages.sqlite3").read_bytes())
    (directory / name).unlink(missing_ok=True)
    (directory / name).symlink_to(victim)
    for call in (lambda: PassageIndex(HashEncoder(), directory), lambda: PassageIndex.peek(directory)):
        with pytest.raises(PassageIndexError, match=rf"{name} is no regular file"):
            call()
    (directory / name).unlink()
    os.mkfifo(directory / name)
    with pytest.raises(PassageIndexError, match=rf"{name} is no regular file"):
        PassageIndex(HashEncoder(), directory)


def test_places_where_no_index_can_be(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
        with pytest.raises(PassageIndexError, match="cannot make the index directory"):
            PassageIndex(HashEncoder(), path)
    (tmp_path / "odd" / "passages.sqlite3").mkdir(parents=True)
    with pytest.raises(PassageIndexError, match=r"cannot be opened .*no regular file"):
        PassageIndex(HashEncoder(), tmp_path / "odd")


def test_a_closed_index_says_so(tmp_path):
    index = PassageIndex(HashEncoder(), tmp_path)
    index.close()
    for call in (lambda: index.search("q"), lambda: index.add([make(1)]), lambda: len(index), index.save):
        with pytest.raises(PassageIndexError, match="closed"):
            call()


def test_an_index_in_memory_cannot_be_saved(index):
    with pytest.raises(PassageIndexError, match="in memory"):
        index.save()
    index.add([make(1)])
    stats = index.stats()
    assert (stats.passages, stats.documents, stats.dimension, stats.encoder) == (1, 1, DIMENSION, "hash-16")
    assert stats.bytes > 0


def test_stats_count_the_files(tmp_path):
    filled(tmp_path)
    with PassageIndex(HashEncoder(), tmp_path) as index:
        files = [file.stat().st_size for file in tmp_path.iterdir()]
        assert index.stats().bytes == sum(files)


def test_a_database_held_by_another_process_is_an_error_not_a_hang(tmp_path, monkeypatch):
    from blockrag.index import schema

    monkeypatch.setattr(schema, "BUSY_SECONDS", 0.01)
    with (
        PassageIndex(HashEncoder(), tmp_path) as index,
        closing(sqlite3.connect(tmp_path / "passages.sqlite3")) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(PassageIndexError, match=r"locked.*another process"):
            index.add([make(1)])
        other.rollback()
        assert index.add([make(1)]).added == 1


def test_texts_beyond_what_sqlite_holds(index):
    if sys.version_info < (3, 11):
        pytest.skip("this Python cannot lower the limit")
    index._database.connection._sqlite.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, 5000)
    with pytest.raises(InputError, match="too big"):
        index.add([Passage(id="p", text="x" * 6000)])
    assert len(index) == 0


# -- several handles, threads, processes ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_another_handle_commits_is_seen_by_the_next_search(kind, tmp_path):
    with (
        PassageIndex(HashEncoder(), tmp_path, kind=kind) as one,
        PassageIndex(HashEncoder(), tmp_path, kind=kind) as two,
    ):
        one.add(many(30, "a"))
        assert len(two.search("q", 100)) == 30
        two.add(many(20, "b"))
        one.delete_document("a")
        assert {hit.passage.document_id for hit in two.search("q", 100)} == {"b"}
        # A write on top of one not seen yet.
        one.add(many(5, "c"))
        two.add(many(6, "e"))
        assert len(two.search("q", 100)) == len(one.search("q", 100)) == 31
        two.add(many(1500, "f"))
        assert one.search("q", 1)[0].score == two.search("q", 1)[0].score
        one.save()
        two.save()


class Meddler(HashEncoder):
    """While it embeds, another process changes the same document."""

    other = None

    def encode_passages(self, passages):
        if self.other is not None:
            other, self.other = self.other, None
            other.delete_document("d")
        return super().encode_passages(passages)


def test_a_document_changed_by_others_while_it_is_embedded(tmp_path):
    encoder = Meddler()
    with PassageIndex(encoder, tmp_path) as index, PassageIndex(HashEncoder(), tmp_path) as other:
        index.add([make(1), make(2)])
        encoder.other = other
        # 1 and 2 would be kept; by the time of the transaction they are gone, and must be embedded after all.
        assert index.replace_document("d", [make(1), make(2), make(3)]) == Change(added=3)
        assert found(index.search("q")) == brute_force("q", [make(1), make(2), make(3)], 5)


def test_vectors_left_halfway_are_built_anew(tmp_path, caplog, monkeypatch):
    with PassageIndex(HashEncoder(), tmp_path) as index:
        index.add([make(1)])

        def fail(*_):
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(VectorIndex, "add", fail)
            with pytest.raises(MemoryError):
                index.add([make(2)])
        assert len(index.search("q")) == 2
        assert "did not complete" in caplog.text


@pytest.mark.parametrize("kind", KINDS)
def test_searches_beside_writes(kind, tmp_path):
    """FAISS crashes or answers nonsense when an add runs beside a search; here every answer must be whole."""
    stop = threading.Event()
    with PassageIndex(HashEncoder(), tmp_path, kind=kind) as index:
        index.add(many(200, "base"))

        def search(number):
            answers = 0
            while not stop.is_set() or not answers:
                hits = index.search(f"q{number} {answers}", 20)
                assert len(hits) == 20
                assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
                answers += 1
            return answers

        with ThreadPoolExecutor(5) as pool:
            searches = [pool.submit(search, number) for number in range(3)]
            savers = pool.submit(lambda: [index.save() for _ in range(5)])
            try:
                for turn in range(40):
                    index.replace_document(f"d{turn % 5}", many(40 + turn, f"d{turn % 5}"))
                    if turn % 7 == 0:
                        index.delete_document(f"d{(turn + 2) % 5}")
            finally:
                stop.set()
            savers.result()
            assert all(future.result() > 0 for future in searches)
        assert len(index.search("q", 10**6)) >= 0.9 * len(index)


def test_writers_in_threads_do_not_lose_each_others_documents(tmp_path):
    with PassageIndex(LexicalEncoder(64), tmp_path) as index:
        with ThreadPoolExecutor(6) as pool:
            changes = list(pool.map(lambda n: index.replace_document(f"d{n}", many(5, f"d{n}")), range(30)))
        assert [change.added for change in changes] == [5] * 30
        check_against_model(index, [p for n in range(30) for p in many(5, f"d{n}")], tmp_path)


WRITER = """
import sys
from blockrag.encoders import CorpusCounts, GivenVectors, LexicalEncoder
from blockrag.index import PassageIndex
from blockrag.passage import Passage

directory, name, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
with PassageIndex(LexicalEncoder(64), directory) as index:
    for turn in range(count):
        document = f"{name}{turn}"
        index.replace_document(document, [
            Passage(id=f"{document}-{i}", text=f"shared text {name} number{i}", document_id=document) for i in range(20)
        ])
        if turn % 3 == 2:
            index.delete_document(f"{name}{turn - 1}")
        print(turn, flush=True)
"""


def start_writer(directory, name, count):
    command = [sys.executable, "-c", WRITER, str(directory), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def check_whole(directory):
    """Everything in the database agrees with everything else; returns the documents."""
    assert stored(directory, "PRAGMA integrity_check") == [("ok",)]
    assert stored(directory, "PRAGMA foreign_key_check") == []
    with PassageIndex(LexicalEncoder(64), directory) as index:
        documents = index.documents()
        assert {document.passages for document in documents} <= {20}
        check_against_model(index, list(index.passages()), Path(directory))
        rows = stored(directory, "SELECT (SELECT count(*) FROM passage), (SELECT count(*) FROM embedding)")[0]
        assert rows == (20 * len(documents), 20 * len(documents))
        return documents


def test_processes_write_side_by_side(tmp_path):
    writers = [start_writer(tmp_path, name, 6) for name in "ab"]
    with PassageIndex(LexicalEncoder(64), tmp_path) as index:
        seen = 0
        for _ in writers[0].stdout:
            hits = index.search("shared text", 500)
            seen = max(seen, len(hits))
        assert seen >= 20
        for writer in writers:
            assert writer.communicate()[1] == ""
            assert writer.returncode == 0
        assert len(index.search("shared text", 500)) == 2 * 4 * 20
    assert len(check_whole(tmp_path)) == 8


@pytest.mark.parametrize("lines", [1, 4])
def test_a_killed_writer_leaves_whole_documents(lines, tmp_path):
    writer = start_writer(tmp_path, "w", 100_000)
    try:
        for _ in range(lines):
            assert writer.stdout.readline()
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    assert check_whole(tmp_path)
    assert start_writer(tmp_path, "next", 3).communicate()[1] == ""
    check_whole(tmp_path)


def test_rows_are_never_used_twice(tmp_path):
    with PassageIndex(HashEncoder(), tmp_path) as index:
        index.add([make(1), make(2)])
        index.delete_document("d")
        index.add([make(3)])
        assert stored(tmp_path, "SELECT row FROM passage") == [(3,)]


# -- vectors from outside ---------------------------------------------------------------------------------------------


def outside(count, seed=0):
    """Vectors of small whole numbers, with many ties."""
    return np.random.default_rng(seed).integers(-2, 3, (count, DIMENSION)).astype(np.float32)


def product(query, passages, vectors, k):
    """Ids and scores of the greatest inner products, equal ones in order of addition."""
    scored = [(float(vector @ query), i, p.id) for i, (p, vector) in enumerate(zip(passages, vectors, strict=True))]
    return [(id, score) for score, _, id in sorted(scored, key=lambda s: (-s[0], s[1]))[:k]]


@pytest.fixture
def given_index():
    with PassageIndex(GivenVectors("elsewhere", DIMENSION)) as index:
        yield index


def test_given_vectors_are_searched_as_they_are(given_index):
    passages = [Passage(id=f"p{i}", text="one text for all") for i in range(300)]
    vectors, queries = outside(300), outside(70, seed=1)
    assert given_index.add(passages, vectors=vectors) == Change(added=300)
    expected = [product(query, passages, vectors, 7) for query in queries]
    assert [found(hits) for hits in given_index.search_vectors(queries, 7)] == expected
    assert given_index.search_vectors(np.zeros((0, 0)), 7) == []
    stored_vectors = given_index.vectors_of(["p3", "p200", "unknown"])
    assert {id: vector.tolist() for id, vector in stored_vectors.items()} == {
        "p3": vectors[3].tolist(),
        "p200": vectors[200].tolist(),
    }
    assert given_index.vectors_of([]) == {}


def test_an_index_with_an_encoder_takes_given_vectors_too(index):
    index.add([make(1)])
    vector = outside(1)
    index.add([make(2)], vectors=vector)
    assert index.vectors_of(["d-2"])["d-2"].tolist() == vector[0].tolist()
    assert index.search_vectors(HashEncoder.vector("|text d 1")[None], 2)[0][0].passage == make(1)


def test_given_vectors_embed_nothing_themselves():
    encoder = GivenVectors("elsewhere", 4)
    assert (encoder.name, encoder.dimension) == ("elsewhere", 4)
    with PassageIndex(encoder) as index:
        with pytest.raises(InputError, match=r"add\(passages, vectors=vectors\)"):
            index.add([make(1)])
        with pytest.raises(InputError, match=r"search_vectors\(vectors, k\)"):
            index.search("question")
    with pytest.raises(InputError, match="need a name"):
        GivenVectors("", 4)
    with pytest.raises(InputError, match="dimension is 0"):
        GivenVectors("elsewhere", 0)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    ids=st.sets(st.integers(0, 79)),
    third=st.sampled_from([None, 0, 1]),
    k=st.integers(1, 30),
    seed=st.integers(0, 3),
)
def test_a_search_among_some_passages_is_exact_for_every_kind(kind, ids, third, k, seed):
    index = among_index(kind)
    query = outside(1, seed=100 + seed)
    hits = index.search_vectors(
        query, k, where=None if third is None else {"third": third}, passage_ids=[*(f"d-{i}" for i in ids), "unknown"]
    )
    chosen = [(p, v) for i, (p, v) in enumerate(zip(many(80), outside(80), strict=True)) if i in ids]
    chosen = [(p, v) for p, v in chosen if third is None or p.metadata["third"] == third]
    assert found(hits[0]) == product(query[0], [p for p, _ in chosen], [v for _, v in chosen], k)


@cache
def among_index(kind):
    index = PassageIndex(GivenVectors("elsewhere", DIMENSION), kind=kind)
    index.add(many(80), vectors=outside(80))
    return index


def test_a_passage_is_kept_only_with_the_vector_it_had(given_index):
    vectors = outside(3)
    given_index.add(many(3), vectors=vectors)
    assert given_index.add(many(3), vectors=vectors) == Change(kept=3)
    vectors[1] += 1
    assert given_index.add(many(3), vectors=vectors) == Change(added=1, kept=2, removed=1)
    assert given_index.vectors_of(["d-1"])["d-1"].tolist() == vectors[1].tolist()
    assert [p.id for p in given_index.passages("d")] == ["d-0", "d-1", "d-2"]


def test_with_given_vectors_a_passage_may_move_to_another_document(given_index):
    given_index.replace_document("a", [], content_hash="empty")
    given_index.add([make(1, "a"), make(2, "a"), make(1, "b")], vectors=outside(3))
    moved = [Passage(id=id, text="moved", document_id="c") for id in ("a-1", "b-1")]
    assert given_index.add(moved, vectors=outside(2)) == Change(added=2, removed=2)
    assert given_index.documents() == [DocumentInfo("a", 1, ""), DocumentInfo("c", 2, "")]


def test_block_keys_come_with_the_passages(given_index):
    keys = {"d-0": ["k0"], "d-1": ["shared"], "e-1": ["shared"]}
    given_index.add([*many(2), make(1, "e")], vectors=outside(3), block_keys=keys, fingerprint="f")
    assert given_index.block_keys("f") == {"k0", "shared"}
    change = given_index.add(many(1), vectors=outside(1), block_keys={"d-0": ["k1"]}, fingerprint="f")
    assert change == Change(kept=1, orphaned_block_keys=frozenset({"k0"}))
    with pytest.raises(InputError, match="'other', which is not among"):
        given_index.add(many(1), vectors=outside(1), block_keys={"other": ["k"]})
    with pytest.raises(InputError, match="'superseded' is no fingerprint"):
        given_index.add(many(1), vectors=outside(1), fingerprint="superseded")


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (outside(3), "3 vectors are given for 2 passages"),
        (np.zeros((2, 5)), r"shape \(2, 5\).*'elsewhere' holds 16"),
        (np.ones(DIMENSION), r"shape \(16,\)"),
        (np.array([[1.0] * 16, [np.nan] * 16]), "row 1 is not finite"),
    ],
)
def test_given_vectors_that_cannot_be_are_refused(given_index, vectors, message):
    with pytest.raises(InputError, match=message):
        given_index.add(many(2), vectors=vectors)
    assert len(given_index) == 0


def test_queries_that_cannot_be_are_refused(given_index):
    with pytest.raises(InputError, match=r"query vectors have shape \(1, 3\)"):
        given_index.search_vectors(np.ones((1, 3)))
    with pytest.raises(InputError, match="k is 0"):
        given_index.search_vectors(outside(1), 0)
    with pytest.raises(InputError, match="lone surrogate"):
        given_index.search_vectors(outside(1), passage_ids=["\ud800"])
    with pytest.raises(InputError, match="lone surrogate"):
        given_index.vectors_of(["\ud800"])


def test_deleting_passages(index):
    index.replace_document("d", many(2), content_hash="h", block_keys={"d-0": ["a", "b"]}, fingerprint="f")
    index.replace_document("e", [make(1, "e")], block_keys={"e-1": ["b"]}, fingerprint="f")
    index.replace_document("empty", [])
    assert index.delete_passages(["d-0", "unknown"]) == Change(removed=1, orphaned_block_keys=frozenset({"a"}))
    assert index.document_hash("d") == ""
    assert index.delete_passages(["d-1", "e-1"]) == Change(removed=2, orphaned_block_keys=frozenset({"b"}))
    assert index.documents() == [DocumentInfo("empty", 0, "")]
    assert index.delete_passages([]) == Change()
    assert index.search("q") == []


def test_clearing(tmp_path):
    with PassageIndex(LexicalEncoder(64), tmp_path) as index:
        index.replace_document("d", [Passage("i", "oak", document_id="d")], block_keys={"i": ["k"]}, fingerprint="f")
        assert index.clear() == Change(removed=1, orphaned_block_keys=frozenset({"k"}))
        assert index.clear() == Change()
        assert (len(index), index.documents(), index.search("oak")) == (0, [], [])
        assert stored(tmp_path, "SELECT * FROM term") == []


@pytest.mark.parametrize("kind", KINDS)
def test_clearing_and_deleting_are_seen_by_other_handles(kind, tmp_path):
    with PassageIndex(HashEncoder(), tmp_path, kind=kind) as one, PassageIndex(HashEncoder(), tmp_path) as other:
        one.add(many(200))
        other.delete_passages([f"d-{i}" for i in range(100)])
        assert {hit.passage.id for hit in one.search("q", 300)} <= {f"d-{i}" for i in range(100, 200)}
        other.clear()
        assert one.search("q", 300) == []


def test_a_superseded_document_answers_until_it_is_replaced(tmp_path):
    with PassageIndex(HashEncoder(), tmp_path) as index:
        index.replace_document("d", many(3), content_hash="h", block_keys={"d-0": ["old"]}, fingerprint="f")
        index.add([make(1, "e")])
        assert index.mark_superseded("d")
        assert not index.mark_superseded("unknown")
        assert index.document_hash("d") == ""
        assert index.document_hash("d", "f") is None
    with PassageIndex(HashEncoder(), tmp_path) as index:
        assert index.superseded() == {"d"}
        assert len(index.search("q", 10)) == 4
        # Losing a passage is not being replaced.
        index.delete_passages(["d-2"])
        new = [make(1), make(7)]
        assert index.add(new) == Change(added=1, kept=1, removed=1, orphaned_block_keys=frozenset({"old"}))
        assert list(index.passages("d")) == new
        assert index.superseded() == set()
        assert index.add([make(8)]) == Change(added=1)
        assert len(list(index.passages("d"))) == 3


def test_what_takes_a_mark_away(index):
    for document in "abcd":
        index.replace_document(document, [make(1, document)], content_hash="h")
        index.mark_superseded(document)
    index.replace_document("a", [make(1, "a")], content_hash="h")
    index.delete_document("b")
    assert index.superseded() == {"c", "d"}
    assert index.drop_superseded(["a", "c"]) == Change(removed=1)
    assert index.drop_superseded() == Change(removed=1)
    assert index.drop_superseded() == Change()
    assert index.documents() == [DocumentInfo("a", 1, "h")]


def test_an_index_says_what_built_it(tmp_path):
    assert PassageIndex.peek(tmp_path / "nowhere") is None
    PassageIndex(HashEncoder(), tmp_path).close()
    assert PassageIndex.peek(tmp_path) == IndexOrigin("hash-16", DIMENSION)
    file = tmp_path / "passages.sqlite3"
    file.write_bytes(b"")
    assert PassageIndex.peek(tmp_path) is None
    with closing(sqlite3.connect(file)) as connection:
        # A write-ahead file, as another process makes it before the tables.
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA user_version = 1")
    assert PassageIndex.peek(tmp_path) is None
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("CREATE TABLE meta (name TEXT, value TEXT)")
    with pytest.raises(PassageIndexError, match=r"is no passage index .*; pass another directory"):
        PassageIndex.peek(tmp_path)


@pytest.mark.parametrize("dimension", ["-1", "0", str(1 << 31), None, "many"])
def test_a_dimension_that_no_index_has_is_refused(tmp_path, dimension):
    with closing(sqlite3.connect(tmp_path / "passages.sqlite3")) as connection, connection:
        connection.execute("CREATE TABLE meta (name TEXT, value TEXT)")
        connection.executemany("INSERT INTO meta VALUES (?, ?)", [("encoder", "hash"), ("dimension", dimension)])
    with pytest.raises(PassageIndexError, match=r"is no passage index .*; pass another directory"):
        PassageIndex.peek(tmp_path)


def test_an_index_that_is_open_is_no_target_of_a_copy(tmp_path):
    with PassageIndex(HashEncoder(), tmp_path) as there, PassageIndex(HashEncoder()) as index:
        there.add(many(100))
        before = found(there.search("q", 5))
        index.add([make(number, "other") for number in range(100)])
        # Its rows have the numbers of those that `there` has in memory, and other vectors.
        with pytest.raises(PassageIndexError, match=r"cannot be copied .* nobody uses it"):
            index.copy_to(tmp_path)
        assert found(there.search("q", 5)) == before
        there.close()
        index.copy_to(tmp_path)


def test_a_copy_is_the_same_index(tmp_path):
    with PassageIndex(HashEncoder()) as index, PassageIndex(HashEncoder(), tmp_path / "was there") as there:
        there.add([make(1, "old")])
        there.close()
        index.replace_document("d", many(30), content_hash="h", block_keys={"d-0": ["k"]}, fingerprint="f")
        for name in ("was there", "new"):
            index.copy_to(tmp_path / name)
            with PassageIndex(HashEncoder(), tmp_path / name) as copy:
                assert found(copy.search("q", 50)) == found(index.search("q", 50))
                assert (copy.document_hash("d", "f"), copy.block_keys()) == ("h", {"k"})
                with pytest.raises(PassageIndexError, match="own directory; call save"):
                    copy.copy_to(tmp_path / name)
                with pytest.raises(PassageIndexError, match="cannot make the index directory"):
                    copy.copy_to("\0")
        (tmp_path / "blocked" / "passages.sqlite3").mkdir(parents=True)
        with pytest.raises(PassageIndexError, match="cannot be copied to"):
            index.copy_to(tmp_path / "blocked")
