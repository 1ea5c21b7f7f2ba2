"""Passages with vectors from outside, and the KV states of their blocks: real index, real model, real processes."""

from __future__ import annotations

import asyncio
import logging
import shutil
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import InputError, PassageIndexError
from blockrag.index import Change, DocumentInfo, PassageIndex
from blockrag.ingest import PassageStore, PassageStoreStats, prebuild_blocks
from blockrag.model.sampling import GenerationOptions
from blockrag.passage import Passage
from blockrag.prompt import Block
from blockrag.stores import MemoryStore

DIMENSION = 8


def text(name, document="d", content=None):
    return Passage(id=name, text=content or f"The text of {name}.", document_id=document)


def vectors(*passages):
    """A vector of its own for each passage id."""
    return np.stack([np.random.default_rng(sum(p.id.encode())).standard_normal(DIMENSION) for p in passages])


def add(store, *passages):
    return store.add(passages, vectors(*passages))


def ids(store):
    return {hit.passage.id for hit in store.search(np.ones(DIMENSION), 1000)}


def keys(model, *passages):
    blocks = model.template.passage_blocks(model.tokenizer, passages)
    return {model.block_key(block.token_ids) for block in blocks}


def stored(model):
    return set(model.store.keys())


@pytest.fixture
def model(make_model):
    return make_model()


# -- passages ---------------------------------------------------------------------------------------------------------


def test_nothing_is_there_before_the_first_add(tmp_path):
    with PassageStore(tmp_path / "never") as store:
        assert len(store) == 0
        assert store.search([1.0, 2.0], 3) == []
        assert store.get(["a"]) == list(store.passages()) == store.documents == []
        assert store.vectors_of(["a"]) == {}
        assert store.stats() == PassageStoreStats(0, 0, None, 0)
        assert store.delete(["a"]) == store.delete_document("a") == store.clear() == store.add([], []) == Change()
        with store.replacing():
            store.delete_document("a")
        store.save()
    assert not (tmp_path / "never").exists()


def test_passages_are_found_looked_up_and_deleted(tmp_path):
    a, b, c = text("a"), text("b"), text("c", "e")
    with PassageStore(tmp_path) as store:
        assert add(store, a, b, c) == Change(added=3)
        best = store.search(vectors(b)[0], 2)[0]
        assert best.passage == b
        assert best.score == pytest.approx(float(vectors(b)[0] @ vectors(b)[0]))
        assert store.get(["c", "unknown", "a"]) == [c, a]
        assert list(store.passages("d")) == [a, b]
        assert store.documents == [DocumentInfo("d", 2, ""), DocumentInfo("e", 1, "")]
        assert store.vectors_of(["a"])["a"] == pytest.approx(vectors(a)[0])
        assert store.stats() == PassageStoreStats(3, 2, DIMENSION, 0)
        store.save()
    with PassageStore(tmp_path) as store:
        assert len(store) == 3
        assert store.delete(["c"]) == Change(removed=1)
        assert store.delete_document("d") == Change(removed=2)
        assert ids(store) == set()


def test_a_passage_added_again_is_replaced_also_from_another_document():
    with PassageStore() as store:
        add(store, text("a"), text("b"))
        assert add(store, text("a", "e", "Now here.")) == Change(added=1, removed=1)
        assert store.get(["a"])[0].text == "Now here."
        assert [p.id for p in store.passages("d")] == ["b"]


def test_two_handles_see_the_same_passages(tmp_path):
    with PassageStore(tmp_path) as one, PassageStore(tmp_path) as other:
        assert len(other) == 0
        add(one, text("a"))
        assert ids(other) == {"a"}
        add(other, text("b"))
        assert ids(one) == {"a", "b"}
        one.clear()
        assert ids(other) == set()


def test_a_copy_opens_as_the_same_store(tmp_path):
    with PassageStore() as store:
        store.copy_to(tmp_path)
        assert PassageIndex.peek(tmp_path) is None
        add(store, text("a"))
        store.copy_to(tmp_path)
        with pytest.raises(PassageIndexError, match="in memory only; call copy_to"):
            store.save()
    with PassageStore(tmp_path) as copy:
        assert ids(copy) == {"a"}
    with PassageStore() as empty:
        empty.copy_to(tmp_path)
    with PassageStore(tmp_path) as copy:
        assert ids(copy) == set()


@pytest.mark.parametrize(
    ("given_vectors", "message"),
    [
        ([1.0, 2.0], r"shape \(2,\) for 1 passages"),
        ([], r"shape \(0,\)"),
        ([[]], r"shape \(1, 0\)"),
        ([[1.0] * 3], "use the embedding model that built it"),
        ([["one"] * DIMENSION], "no numbers in rows of one length .*; pass those of one model"),
        ([[1.0, 2.0], [1.0]], "no numbers in rows of one length"),
        ([[1e300] * DIMENSION], "row 0 is not finite"),
    ],
)
def test_vectors_that_cannot_be_are_refused(given_vectors, message):
    with PassageStore() as store:
        add(store, text("a"))
        with pytest.raises(InputError, match=message):
            store.add([text("b")], given_vectors)
        assert ids(store) == {"a"}


@pytest.mark.parametrize("query", [[], [1.0] * (DIMENSION - 1), ["one"] * DIMENSION, 1.0, [[1.0] * DIMENSION]])
def test_queries_that_cannot_be_are_refused(query):
    with PassageStore() as store:
        add(store, text("a"))
        with pytest.raises(InputError, match="query vector"):
            store.search(query, 1)


def test_one_id_is_no_list_of_ids():
    with PassageStore() as store:
        add(store, text("a"), text("b"), text("ab"))
        with pytest.raises(InputError, match=r"the string 'ab'; pass \['ab'\]"):
            store.delete("ab")
        assert ids(store) == {"a", "b", "ab"}


def test_nothing_is_written_where_nobody_will_find_it(tmp_path):
    store = PassageStore(tmp_path / "there")
    add(store, text("a"))
    shutil.rmtree(tmp_path / "there")
    for write in (lambda: add(store, text("b")), lambda: store.delete(["a"]), store.clear):
        with pytest.raises(PassageIndexError, match="deleted or replaced while it was open"):
            write()
    assert store.stats().passages == 1
    # The same directory, made anew: still not the one that is open.
    with PassageStore(tmp_path / "there") as new:
        add(new, text("c"))
        with pytest.raises(PassageIndexError, match="close it and open it again"):
            add(store, text("b"))
        store.close()
        assert ids(new) == {"c"}


def test_a_directory_of_another_encoder_is_refused(tmp_path):
    with PassageStore(tmp_path, name="one") as store:
        add(store, text("a"))
    with PassageStore(tmp_path, name="other") as store, pytest.raises(PassageIndexError, match=r"built with .*'one'"):
        len(store)


def test_a_closed_store_says_so(tmp_path):
    store = PassageStore(tmp_path)
    add(store, text("a"))
    store.close()
    store.close()
    for call in (lambda: len(store), lambda: store.search([1.0], 1), lambda: add(store, text("b"))):
        with pytest.raises(PassageIndexError, match="closed"):
            call()


@pytest.mark.parametrize("kind", ["flat", "hnsw"])
@settings(max_examples=30, deadline=None)
@given(kept=st.sets(st.integers(0, 299)), among=st.none() | st.sets(st.integers(0, 299)), k=st.integers(1, 40))
def test_a_predicate_finds_what_brute_force_finds(kind, kept, among, k):
    store, matrix = many_passages(kind)
    query = np.random.default_rng(k).standard_normal(DIMENSION).astype(np.float32)
    hits = store.search(
        query,
        k,
        keep=lambda passage: int(passage.id) in kept,
        passage_ids=None if among is None else {str(number) for number in among},
    )
    allowed = [number for number in kept if among is None or number in among]
    best = sorted(allowed, key=lambda number: -float(matrix[number].astype(np.float64) @ query))[:k]
    assert len(hits) == len(best)
    if kind == "flat" or among is not None:
        assert [hit.passage.id for hit in hits] == [str(number) for number in best]
    assert all(int(hit.passage.id) in allowed for hit in hits)


_MANY = {}


def many_passages(kind):
    if kind not in _MANY:
        passages = [Passage(id=str(number), text="the same") for number in range(300)]
        matrix = np.random.default_rng(5).standard_normal((300, DIMENSION)).astype(np.float32)
        _MANY[kind] = (PassageStore(kind=kind), matrix)
        _MANY[kind][0].add(passages, matrix)
    return _MANY[kind]


def test_a_predicate_that_keeps_what_lies_far_away():
    passages = [Passage(id=str(number), text="t") for number in range(6000)]
    with PassageStore() as store:
        store.add(passages, np.arange(6000, 0, -1)[:, None])
        hits = store.search([1.0], 2, keep=lambda passage: passage.id in {"5000", "5500", "5900"})
        assert [hit.passage.id for hit in hits] == ["5000", "5500"]


# -- replacing --------------------------------------------------------------------------------------------------------


def test_the_old_version_answers_until_the_new_one_is_there():
    with PassageStore() as store:
        add(store, text("d1"), text("d2"), text("e1", "e"), text("f1", "f"))
        with store.replacing():
            assert store.delete_document("d") == store.delete_document("e") == Change()
            assert ids(store) == {"d1", "d2", "e1", "f1"}
            assert add(store, text("d3")) == Change(added=1, removed=2)
            assert ids(store) == {"d3", "e1", "f1"}
            add(store, text("d4"))
        # "e" was announced, and nothing came.
        assert ids(store) == {"d3", "d4", "f1"}
        store.delete_document("f")
        assert ids(store) == {"d3", "d4"}


def test_a_replacement_that_fails_leaves_the_old_version():
    with PassageStore() as store:
        add(store, text("d1"), text("e1", "e"))

        def fail_halfway():
            with store.replacing():
                store.delete_document("d")
                store.delete_document("e")
                add(store, text("d3"), text("d3"))

        with pytest.raises(InputError, match="'d3' occurs twice"):
            fail_halfway()
        assert ids(store) == {"d1", "e1"}
        # One that is about something else takes nothing away; one that sweeps takes what came to nothing.
        with store.replacing():
            add(store, text("g1", "g"))
        assert ids(store) == {"d1", "e1", "g1"}
        add(store, text("d2"))
        with store.replacing(sweep=True):
            pass
        assert ids(store) == {"d2", "g1"}


def test_a_killed_replacement_leaves_the_old_version_and_the_next_one_exactly_the_new(tmp_path, model):
    old, new, other = text("old"), text("new"), text("other", "e")
    with PassageStore(tmp_path, model=model, prebuild=True) as store:
        add(store, old, other)
    script = Path(__file__).with_name("replace_and_die.py")
    done = subprocess.run([sys.executable, script, tmp_path], timeout=120)
    assert done.returncode == -signal.SIGKILL
    with PassageStore(tmp_path, model=model, prebuild=True) as store:
        assert ids(store) == {"old", "other"}
        with store.replacing():
            store.delete_document("d")
            add(store, new)
        assert ids(store) == {"new", "other"}
        assert stored(model) == keys(model, new, other)


def test_replacing_holds_for_the_thread_or_task_that_entered_it():
    with PassageStore() as store, PassageStore() as another:
        for one in (store, another):
            add(one, text("d1"), text("e1", "e"))

        async def renew():
            with store.replacing():
                await asyncio.to_thread(store.delete_document, "d")
                assert ids(store) == {"d1", "e1"}
                assert another.delete_document("d") == Change(removed=1)
                thread = threading.Thread(target=store.delete_document, args=["e"])
                thread.start()
                thread.join()
                assert ids(store) == {"d1"}
                await asyncio.to_thread(add, store, text("d2"))

        asyncio.run(renew())
        assert ids(store) == {"d2"}


def test_a_replacement_within_a_replacement_ends_alone():
    with PassageStore() as store:
        add(store, text("d1"), text("e1", "e"))
        with store.replacing():
            store.delete_document("d")
            with store.replacing():
                store.delete_document("e")
            assert ids(store) == {"d1"}
        assert ids(store) == set()


# -- blocks -----------------------------------------------------------------------------------------------------------


def test_prebuilt_blocks_are_those_a_question_reads(model):
    passages = [text("a"), text("b")]
    with PassageStore(model=model, prebuild=True) as store:
        add(store, *passages)
        assert stored(model) == keys(model, *passages)
        prompt = model.template.segment(model.tokenizer, passages=store.get(["b", "a"]), question="Which?")
        usage = model.generate(prompt, GenerationOptions(max_new_tokens=1)).usage
        assert usage.blocks_reused >= 2


def test_shared_text_keeps_its_block_until_its_last_passage_goes(model):
    with PassageStore(model=model, prebuild=True) as store:
        shared = {name: text(name, name, "The same words.") for name in "abc"}
        add(store, *shared.values(), text("own"))
        assert len(stored(model)) == 2
        assert store.delete_document("a").orphaned_block_keys == frozenset()
        add(store, text("b", "b", "Other words."))
        assert stored(model) == keys(model, shared["c"], text("own"), text("b", "b", "Other words."))
        store.delete(["c"])
        assert stored(model) == keys(model, text("own"), text("b", "b", "Other words."))
        store.clear()
        assert stored(model) == set()


def test_blocks_that_questions_computed_go_as_well(model):
    with PassageStore(model=model) as store:
        add(store, text("a"))
        assert stored(model) == set()
        prompt = model.template.segment(model.tokenizer, passages=store.get(["a"]), question="Which?")
        model.generate(prompt, GenerationOptions(max_new_tokens=1))
        assert keys(model, text("a")) <= stored(model)
        store.delete(["a"])
        assert not keys(model, text("a")) & stored(model)


def test_deleted_passages_do_not_stay_in_memory(make_model):
    model = make_model(kept_bytes=1 << 24)
    with PassageStore(model=model) as store:
        add(store, text("a"))
        prompt = model.template.segment(model.tokenizer, passages=store.get(["a"]), question="Which?")
        model.generate(prompt, GenerationOptions(max_new_tokens=1))
        assert model.prompt_memory().kept_bytes > 0
        store.delete(["unknown"])
        assert model.prompt_memory().kept_bytes > 0
        store.delete(["a"])
        assert model.prompt_memory().kept_bytes == 0


def test_blocks_may_be_of_another_form(model):
    def shown(passages):
        return [Block(tuple(model.tokenizer.encode(p.text[:3])), p.text, True, "passage", p.id) for p in passages]

    with PassageStore(model=model, blocks_of=shown, prebuild=True) as store:
        add(store, text("a"))
        assert stored(model) == {model.block_key(block.token_ids) for block in shown([text("a")])}


def test_a_passage_without_kv_states_is_kept_counted_and_logged(model, caplog):
    good, too_long = [text("a"), text("b"), text("c")], text("long", content="word " * 3000)
    with PassageStore(model=model, prebuild=True) as store, caplog.at_level(logging.WARNING):
        add(store, good[0], good[1], too_long, good[2])
        assert ids(store) == {"a", "b", "c", "long"}
        assert stored(model) == keys(model, *good)
        assert store.stats().without_kv == 1
    (record,) = caplog.records
    assert record.getMessage().startswith("1 of 4 passages are stored without KV states; the first is 'long': ")


def test_a_full_store_keeps_the_passages(make_model):
    model = make_model(store=MemoryStore(max_bytes=10))
    with PassageStore(model=model, prebuild=True) as store:
        add(store, text("a"), text("b"))
        assert ids(store) == {"a", "b"}
        assert store.stats().without_kv == 2


def test_a_passage_that_has_no_block_is_kept(model, caplog):
    def shown(passages):
        for passage in passages:
            if passage.id == "bad":
                raise InputError("this passage cannot be shown")
        blocks = model.template.passage_blocks(model.tokenizer, passages)
        shown_as = zip(passages, blocks, strict=True)
        return [block if p.id != "none" else replace(block, token_ids=()) for p, block in shown_as]

    with PassageStore(model=model, blocks_of=shown, prebuild=True) as store, caplog.at_level(logging.WARNING):
        add(store, text("a"), text("bad"), text("none"))
        assert ids(store) == {"a", "bad", "none"}
        assert len(stored(model)) == 1
        assert store.stats().without_kv == 1
    assert "cannot be shown" in caplog.text


def test_a_model_that_cannot_be_composed_tracks_nothing(make_model):
    model = make_model(attention="full")
    model.profile = None
    with PassageStore(model=model, prebuild=True) as store:
        add(store, text("a"))
        assert ids(store) == {"a"}
        assert stored(model) == set()
        store.delete(["a"])


def test_prebuilding_without_a_model_is_refused():
    with pytest.raises(InputError, match="need a model"):
        PassageStore(prebuild=True)
    with pytest.raises(InputError, match="need a model"):
        PassageStore(blocks_of=list)


def test_prebuilding_blocks_reports_each_failure(model):
    blocks = model.template.passage_blocks(
        model.tokenizer, [text("a"), text("x", content="word " * 3000), text("b"), text("y", content="word " * 3000)]
    )
    report = prebuild_blocks(model, blocks)
    assert (report.blocks_new, report.blocks_reused) == (2, 0)
    assert set(report.failures) == {1, 3}
    assert all("2048" in str(error) for error in report.failures.values())
    assert prebuild_blocks(model, blocks[:1]).blocks_reused == 1
    assert prebuild_blocks(model, []).failures == {}


def test_threads_add_and_delete_side_by_side(model):
    errors = []

    def work(name):
        try:
            for number in range(6):
                passages = [text(f"{name}{number}-{i}", name, f"Text {i} of all.") for i in range(3)]
                add(store, *passages)
                store.search(np.ones(DIMENSION), 3)
                store.delete([p.id for p in passages[:2]])
            store.delete_document(name) if name != "keep" else None
        except Exception as error:
            errors.append(error)

    with PassageStore(model=model, prebuild=True) as store:
        threads = [threading.Thread(target=work, args=[name]) for name in ("a", "b", "keep")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        assert len(store) == 6
        assert stored(model) == keys(model, *store.passages())
