"""Writers and readers in processes of their own that share one store, and somebody who kills them at random."""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from blocks import IN_FILE, IN_ROW, block, judge, key

from blockrag.errors import StoreError
from blockrag.stores import DiskStore

__all__ = ["run"]

_BLOCKS = 240
_WRITERS = _READERS = 4
_EVERY_S = 0.5
_AT_ONCE = 8
_COUNTERS = ("reads", "hits", "wrong", "refused", "puts", "errors", "over budget")


def run(directory: str, seconds: float, seed: int) -> dict[str, int]:
    """Let them work and die for a while, then check the store.

    Returns:
        The counters of all processes together, and "kills", "faults" (of a final check, without files of writers that
        were killed), "strays left" (such files after the store has swept), "bytes" and "budget".
    """
    sizes = [IN_FILE if number % 3 == 0 else IN_ROW for number in range(_BLOCKS)]
    expected = [block(number, size) for number, size in enumerate(sizes)]
    budget = sum(sizes) // 2
    random_numbers = random.Random(seed)
    counters = mmap.mmap(-1, 8 * len(_COUNTERS) * (_WRITERS + _READERS))
    work = [_write] * _WRITERS + [_read] * _READERS

    def start(slot: int) -> int:
        """A new process in a slot, which goes on counting where the last one was killed."""
        its_seed = random_numbers.random()
        child = os.fork()
        if child:
            return child
        status = 1
        try:
            with contextlib.closing(DiskStore(directory, max_bytes=budget)) as store:
                work[slot](store, random.Random(its_seed), expected, _Counters(counters, slot))
            status = 0
        finally:
            if status:
                sys.excepthook(*sys.exc_info())
                sys.stderr.flush()
            os._exit(status)

    DiskStore(directory, max_bytes=budget).close()
    children = [start(slot) for slot in range(len(work))]
    kills, end = 0, time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(_EVERY_S * random_numbers.random())
        slot = random_numbers.randrange(len(children))
        _kill(children[slot])
        kills += 1
        children[slot] = start(slot)
    for child in children:
        _kill(child)
    return {"kills": kills, **_Counters.totals(counters, len(work)), **_checked(directory, budget)}


def _kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), f"a process ended by itself with status {os.WEXITSTATUS(status)}"
    assert os.WTERMSIG(status) == signal.SIGKILL, f"a process crashed with signal {os.WTERMSIG(status)}"


def _write(store: DiskStore, random_numbers: random.Random, expected: list[bytes], count: Callable[..., None]) -> None:
    while True:
        number = random_numbers.randrange(_BLOCKS)
        with _counted(count):
            store.put(key(number), expected[number])
            count("puts")
            if random_numbers.random() < 0.05:
                store.delete_many([key(random_numbers.randrange(_BLOCKS))])
            count("over budget", store.stats().bytes > store.stats().max_bytes)


def _read(store: DiskStore, random_numbers: random.Random, expected: list[bytes], count: Callable[..., None]) -> None:
    while True:
        numbers = {key(number): number for number in random_numbers.sample(range(_BLOCKS), _AT_ONCE)}
        with _counted(count):
            for name, data in store.get_many(list(numbers)):
                number = numbers[name]
                verdict = judge(number, data, expected[number])
                count("reads")
                count("hits", verdict == "right")
                count("wrong", verdict == "wrong")
                count("refused", verdict == "refused")


@contextlib.contextmanager
def _counted(count: Callable[..., None]) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        count("errors")
        sys.stderr.write(f"{error}\n")


class _Counters:
    """Numbers in memory that all processes share, so that a kill loses none; each slot has one writer."""

    def __init__(self, memory: mmap.mmap, slot: int) -> None:
        self._memory, self._base = memory, 8 * len(_COUNTERS) * slot

    def __call__(self, name: str, more: int = 1) -> None:
        offset = self._base + 8 * _COUNTERS.index(name)
        (value,) = struct.unpack_from("<Q", self._memory, offset)
        struct.pack_into("<Q", self._memory, offset, value + more)

    @staticmethod
    def totals(memory: mmap.mmap, slots: int) -> dict[str, int]:
        """The sums over all slots."""
        values = struct.unpack(f"<{slots * len(_COUNTERS)}Q", memory[:])
        return {name: sum(values[i :: len(_COUNTERS)]) for i, name in enumerate(_COUNTERS)}


def _checked(directory: str, budget: int) -> dict[str, int]:
    with contextlib.closing(DiskStore(directory, max_bytes=budget)) as store:
        faults = [fault for fault in store.verify().faults if fault.kind != "stray"]
        for fault in faults:
            sys.stderr.write(f"{fault}\n")
        store.sweep(older_than_s=-1.0)
        after = store.verify()
        on_disk = sum(path.stat().st_size for path in Path(directory).rglob("*.val"))
        return {
            "faults": len(faults),
            "strays left": len(after.faults),
            "bytes": after.bytes,
            "files": on_disk,
            "budget": budget,
        }
