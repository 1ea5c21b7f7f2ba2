"""Eviction under a skewed load, ten times the budget, with pins: never beyond the budget, and close to an exact LRU."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import random
from collections import OrderedDict
from collections.abc import Iterator

import pytest
from blocks import key

from blockrag.stores import BlockStore, DiskStore, MemoryStore

SIZES = (1_000, 3_000, 9_000, 40_000)
BLOCKS = 2_000
SAMPLE_EVERY = 20
PIN_EVERY, PINNED = 50, 4


def size_of(number: int) -> int:
    return SIZES[number % len(SIZES)]


BUDGET = sum(map(size_of, range(BLOCKS))) // 10
LARGEST = max(SIZES)


def skewed(operations: int, seed: int) -> Iterator[int]:
    """Block numbers as popular as Zipf's law says: the n-th is asked for a n-th as often as the first."""
    random_numbers = random.Random(seed)
    order = list(range(BLOCKS))
    random_numbers.shuffle(order)
    edges = list(itertools.accumulate(1 / rank for rank in range(1, BLOCKS + 1)))
    for _ in range(operations):
        yield order[bisect.bisect_left(edges, random_numbers.random() * edges[-1])]


class ExactLRU:
    """The hits an exact LRU of the same budget has; it knows no pins and keeps no bytes."""

    def __init__(self) -> None:
        self.sizes: OrderedDict[int, int] = OrderedDict()
        self.bytes = 0

    def ask(self, number: int) -> bool:
        """Whether it has the block; it has it afterwards."""
        if number in self.sizes:
            self.sizes.move_to_end(number)
            return True
        while self.bytes + size_of(number) > BUDGET:
            self.bytes -= self.sizes.popitem(last=False)[1]
        self.sizes[number] = size_of(number)
        self.bytes += size_of(number)
        return False


class Load:
    """Asks a store for blocks, puts those it lacks, and watches the budget and the pinned blocks meanwhile."""

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.hits = self.samples = self.most = self.evicted_pins = self.held = 0

    def ask(self, number: int) -> None:
        data = self.store.get(key(number))
        if data is None:
            self.store.put(key(number), number.to_bytes(4, "little") * (size_of(number) // 4))
            return
        assert data[:4] == number.to_bytes(4, "little")
        assert len(data) == size_of(number)
        self.hits += 1

    def sample(self) -> None:
        self.samples += 1
        self.most = max(self.most, self.store.stats().bytes or 0)

    def run(self, numbers: Iterator[int]) -> None:
        """Every few questions a prompt begins, which pins its blocks until the next one begins."""
        with contextlib.ExitStack() as pins:
            pinned: set[str] = set()
            for step, number in enumerate(numbers):
                self.ask(number)
                if step % SAMPLE_EVERY == 0:
                    self.sample()
                if step % PIN_EVERY == 0:
                    self.evicted_pins += len(pinned - self.store.contains_many(pinned))
                    self.held += len(pinned)
                    pins.close()
                    # Rarely asked for: without the pins they would be among the next to go.
                    pinned = {key(other) for other in range(step % BLOCKS, step % BLOCKS + PINNED)}
                    pinned = self.store.contains_many(pinned)
                    pins.enter_context(self.store.pinned(pinned))


@pytest.fixture(params=["memory", "disk"])
def store(request, fast_path):
    store = MemoryStore(BUDGET) if request.param == "memory" else DiskStore(fast_path / "s", max_bytes=BUDGET)
    yield store
    store.close()


def test_a_skewed_load_ten_times_the_budget(store, scale, record):
    operations = scale(ci=20_000, long=1_000_000)
    load, exact = Load(store), ExactLRU()
    load.run(skewed(operations, seed=6))
    hits = sum(exact.ask(number) for number in skewed(operations, seed=6))
    assert load.most <= BUDGET + LARGEST
    assert load.most > 0.9 * BUDGET
    assert load.evicted_pins == 0
    assert load.held > 100
    assert load.hits >= 0.95 * hits
    assert store.stats().evictions > operations / 20
    record(
        f"eviction at ten times the budget, Zipf load with pins, {type(store).__name__}",
        tried=operations,
        unit="questions",
        result=f"at most {load.most / BUDGET:.1%} of the budget in {load.samples:,} samples; "
        f"{load.hits / hits:.3f} of an exact LRU's hits; 0 of {load.held:,} pinned blocks evicted",
    )


def test_without_pins_the_same_blocks_are_evicted():
    """The control: what the pins above protect is in danger."""
    store = MemoryStore(BUDGET)
    lost = 0
    pinned: set[str] = set()
    load = Load(store)
    for step, number in enumerate(skewed(10_000, seed=6)):
        load.ask(number)
        if step % PIN_EVERY == 0:
            lost += len(pinned - store.contains_many(pinned))
            pinned = store.contains_many(key(other) for other in range(step % BLOCKS, step % BLOCKS + PINNED))
    assert lost > 0
