"""Blocks are finished while the next ones are computed: order, bounds, errors, early ends, and memory."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from process_memory import forget_peak, resident
from test_exactness import composed_logits, prompt_of
from test_memory import SHAPE

from blockrag.errors import StoreFullError
from blockrag.model.block_model import BlockModel
from blockrag.model.materialize import BlockWriter
from blockrag.model.overlap import overlapped
from blockrag.prompt import Block
from blockrag.stores import MemoryStore
from blockrag.stores.disk import DiskStore

Make = Callable[..., BlockModel]

LENGTHS = (7, 12, 9, 1, 12, 3, 8, 8, 2)
ALWAYS, NEVER = -1.0, math.inf


def writers() -> list[threading.Thread]:
    """The threads that finish blocks."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("blockrag-writer")]


class Slowness:
    """The first wait is as long as all that was done before: long beside the computing, however busy the machine."""

    def __init__(self) -> None:
        self._born: float | None = time.perf_counter()

    def sleep(self, seconds: float) -> None:
        before, self._born = self._born, None
        time.sleep(seconds if before is None else max(seconds, time.perf_counter() - before))


class SlowStore(MemoryStore):
    """Keeps its caller waiting, as a store on the network does; refuses everything after so many blocks."""

    def __init__(self, room: int = 1000) -> None:
        super().__init__()
        self.room = room
        self.wait = Slowness()
        self.threads: set[str] = set()
        self._count = threading.Lock()

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.wait.sleep(0.02)
        with self._count:
            self.threads.add(threading.current_thread().name)
            self.room -= 1
            if self.room < 0:
                raise StoreFullError("no room")
            super().put(key, data)


def writer_of(model: BlockModel, *, batch_tokens: int) -> BlockWriter:
    assert model.profile is not None
    return BlockWriter(
        model.model, model.profile, model.fingerprint.digest, model.precision, batch_tokens, threading.RLock()
    )


def materialize(model: BlockModel, blocks: Sequence[Block], store: MemoryStore, **options: Any) -> list[Block]:
    """Materialize in small batches; the blocks that were reported as new, in their order."""
    assert model.profile is not None
    reported: list[Block] = []

    def note(block: Block, stored: bool, nbytes: int) -> None:
        key = model.block_key(block.token_ids)
        if not stored and options.get("must_store", True):
            assert nbytes == len(store.get(key) or b""), "it is there when it is reported"
        reported.append(block)

    by_key = {model.block_key(block.token_ids): block for block in blocks}
    try:
        writer_of(model, batch_tokens=16).materialize(by_key, model.profile.regimes[0], store, note, **options)
    except StoreFullError:
        assert options.get("must_store", True)
    return reported


# -- overlapped ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("worth", [ALWAYS, NEVER])
@pytest.mark.parametrize("batches", [[], [[1]], [[1, 2], [3], [4, 5, 6], [7]], [[], [1], [], [2]]])
def test_results_come_in_order(batches: list[list[int]], worth: float) -> None:
    names: list[str] = []

    def finish(item: int) -> int:
        names.append(threading.current_thread().name)
        time.sleep(0.002 * (item % 3))
        return -item

    assert list(overlapped(iter(batches), finish, worth=worth)) == [-item for batch in batches for item in batch]
    assert not writers(), "threads end with the work"
    elsewhere = [name for name in names if name.startswith("blockrag-writer")]
    assert len(elsewhere) == (sum(map(len, batches[1:])) if worth == ALWAYS else 0), "the first batch is the caller's"


def test_one_batch_waits_at_most() -> None:
    produced, finished = 0, 0
    waiting: list[int] = []

    def batches() -> Iterator[list[int]]:
        nonlocal produced
        for _ in range(8):
            waiting.append(produced - finished)
            produced += 3
            yield [0, 0, 0]

    for _ in overlapped(batches(), lambda item: time.sleep(0.001), worth=ALWAYS):
        finished += 1
    assert finished == 24
    assert max(waiting) == 3


@pytest.mark.parametrize("worth", [ALWAYS, NEVER])
@pytest.mark.parametrize("bad", [1, 2, 5, 7])
def test_an_error_comes_in_its_items_place(bad: int, worth: float) -> None:
    def finish(item: int) -> int:
        if item == bad:
            raise StoreFullError(f"item {item}")
        return item

    results = overlapped(iter([[1, 2], [3, 4, 5], [6, 7]]), finish, worth=worth)
    assert [next(results) for _ in range(bad - 1)] == list(range(1, bad))
    with pytest.raises(StoreFullError, match=f"item {bad}"):
        next(results)
    assert not writers()


def test_an_error_of_the_model_comes_after_what_was_computed_before() -> None:
    def batches() -> Iterator[list[int]]:
        yield [1]
        yield [2]
        raise MemoryError

    results = overlapped(batches(), lambda item: item, worth=ALWAYS)
    assert next(results) == 1
    with pytest.raises(MemoryError):
        list(results)
    assert not writers()


@pytest.mark.parametrize("taken", [1, 2, 3, 4])
def test_stopping_early_finishes_what_was_begun_and_drops_the_rest(taken: int) -> None:
    begun, done = [], []

    def finish(item: int) -> int:
        begun.append(item)
        time.sleep(0.005)
        done.append(item)
        return item

    with closing(overlapped(iter([[1, 2], [*range(3, 40)], [40]]), finish, worth=ALWAYS)) as results:
        seen = [next(results) for _ in range(taken)]
    assert not writers()
    assert sorted(begun) == sorted(done)
    assert set(seen) <= set(done)
    assert len(done) < 39


# -- Blocks ----------------------------------------------------------------------------------------------------------


def test_a_slow_store_gets_the_same_blocks_from_other_threads(make_model: Make) -> None:
    model = make_model()
    blocks = prompt_of(LENGTHS, 4).local_blocks
    plain, slow = MemoryStore(), SlowStore()
    assert materialize(model, blocks, plain) == materialize(model, blocks, slow)
    assert any(name.startswith("blockrag-writer") for name in slow.threads)
    assert {key: bytes(plain.get(key) or b"") for key in plain.keys()} == {
        key: bytes(slow.get(key) or b"") for key in slow.keys()
    }
    assert len(list(plain.keys())) == len(LENGTHS)


@pytest.mark.parametrize("room", [0, 1, 4, 8])
def test_a_store_that_fills_up_ends_the_work_and_keeps_what_was_reported(make_model: Make, room: int) -> None:
    model, store = make_model(), SlowStore(room)
    reported = materialize(model, prompt_of(LENGTHS, 4).local_blocks, store)
    assert len(reported) <= room
    assert {model.block_key(block.token_ids) for block in reported} <= set(store.keys())
    assert not writers()
    store.room = 1000
    again = materialize(model, prompt_of(LENGTHS, 4).local_blocks, store)
    assert len(again) == len(LENGTHS), "those that were stored, and the others"
    assert len(list(store.keys())) == len(LENGTHS)


def test_where_storing_is_no_must_all_blocks_are_reported(make_model: Make) -> None:
    model, store = make_model(), SlowStore(4)
    reported = materialize(model, prompt_of(LENGTHS, 4).local_blocks, store, must_store=False)
    assert len(reported) == len(LENGTHS)
    assert len(list(store.keys())) == 4


def test_a_cold_prompt_over_a_slow_store_answers_as_over_a_fast_one(make_model: Make) -> None:
    prompt = prompt_of((300, 290, 400, 280, 500, 7), 4)
    expected = composed_logits(make_model(), prompt)
    slow = SlowStore()
    assert torch.equal(composed_logits(make_model(store=slow), prompt), expected)
    assert any(name.startswith("blockrag-writer") for name in slow.threads)
    full = SlowStore(2)
    assert torch.equal(composed_logits(make_model(store=full), prompt), expected)
    assert len(list(full.keys())) == 2


# -- Memory ----------------------------------------------------------------------------------------------------------

TOKENS, FEW, MANY, BATCH = 40, 6, 40, 80
# 64 KiB per token in float32.
BLOCK_BYTES = 8 * 2 * 16 * 64 * 4 * TOKENS


class SlowDisk(DiskStore):
    """A directory that keeps its caller waiting."""

    threads: ClassVar[set[str]] = set()

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.wait = Slowness()

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.threads.add(threading.current_thread().name)
        self.wait.sleep(0.03)
        super().put(key, data)


def measure(directory: str) -> dict[str, int]:
    """Peak above the start, in bytes, while blocks are computed and stored."""
    from tiny_models import ModelCase, tiny_model
    from tiny_tokenizers import plain_tokenizer

    from blockrag.model.facts import BlockAttentionFacts

    torch.set_num_threads(1)
    weights = tiny_model(ModelCase("wide", "llama", SHAPE))
    facts = BlockAttentionFacts(block_fine_tuned=True)
    model = BlockModel(weights, plain_tokenizer(), precision="float32", facts=facts)
    assert model.profile is not None
    writer = writer_of(model, batch_tokens=BATCH)
    peaks = {}
    for kind in (DiskStore, SlowDisk):
        for count in (FEW, MANY):
            blocks = prompt_of([TOKENS] * count, 4, seed=count).local_blocks
            by_key = {model.block_key(block.token_ids): block for block in blocks}
            with closing(kind(Path(directory) / f"{kind.__name__}-{count}")) as store:
                forget_peak()
                before = resident("VmRSS")
                report = writer.materialize(by_key, model.profile.regimes[0], store, None)
                peaks[f"{kind.__name__}-{count}"] = resident("VmHWM") - before
            assert report.bytes_new >= count * BLOCK_BYTES
    assert any(name.startswith("blockrag-writer") for name in SlowDisk.threads)
    return peaks


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc/self/clear_refs")
def test_memory_does_not_depend_on_the_number_of_blocks(tmp_path: Path) -> None:
    # glibc then returns every larger piece at once, so that the resident set is what is in use.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, str(Path(__file__)), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    peaks: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    for kind in ("DiskStore", "SlowDisk"):
        few, many = (peaks[f"{kind}-{count}"] / BLOCK_BYTES for count in (FEW, MANY))
        # A batch is two blocks: one being computed, one waiting, their encoded copies, and the forward's own.
        assert many <= 16, f"{kind}: {many:.1f} blocks of {MANY}"
        assert many <= few + 4, f"{kind}: {few:.1f} with {FEW} blocks, {many:.1f} with {MANY}"


if __name__ == "__main__":
    sys.stdout.write(json.dumps(measure(sys.argv[1])) + "\n")
