"""Cuts off the ends of a store's files, before it is opened and while it is open; run by `fresh`."""

from __future__ import annotations

import contextlib
import os
import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from blocks import IN_FILE, block, judge, key, locate
from exercising import exercise, fill_and_die, index_files, restore, small_files, use
from fresh import forked

from blockrag.stores import DiskStore
from blockrag.stores.files import StoreFiles

__all__ = ["cut_index", "cut_index_of_an_open_store", "cut_large_store", "cut_values"]

_LARGE_BLOCKS, _LARGE_BYTES = 200, 327_680
_FEW = range(3)


class CuttingFiles(StoreFiles):
    """Cuts a file off in the moment between opening and reading it."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.length = Path(), -1

    def before(self, call: str) -> None:
        if call == "read_into" and self.length >= 0:
            os.truncate(self.path, self.length)


def cut_values(directory: str) -> dict[str, int]:
    """The file of a block at every length, in an open store; and cut once more while it is being read.

    Returns:
        How many reads gave what.
    """
    counts: Counter[str] = Counter()
    files, data = CuttingFiles(), block(0, IN_FILE)
    with contextlib.closing(DiskStore(directory, files=files)) as store:
        store.put(key(0), data)
        path, offset = locate(Path(directory), data)
        assert (offset, path.stat().st_size) == (0, len(data))
        files.path = path
        # Cut between opening and reading: the length that was looked at is not there any more.
        for files.length in range(0, len(data), 64):
            path.write_bytes(data)
            counts[f"while reading: {judge(0, store.get(key(0)), data)}"] += 1
        files.length = -1
        path.write_bytes(data)
        counts[judge(0, store.get(key(0)), data)] += 1
        for length in reversed(range(len(data))):
            os.truncate(path, length)
            counts[judge(0, store.get(key(0)), data)] += 1
    return dict(counts)


def cut_index(directory: str, step: int) -> dict[str, int]:
    """The index and its write-ahead log at every length, or at every `step`-th: open, read, check and write each time.

    Returns:
        What `exercise` counts, and "lengths".
    """
    root = Path(directory)
    fill_and_die(root, _FEW)
    sound = small_files(root)
    counts: Counter[str] = Counter()
    for target in index_files(sound):
        for length in range(0, len(sound[target]), step):
            restore(root, {**sound, target: sound[target][:length]})
            exercise(root, counts, _FEW)
            counts["lengths"] += 1
    return dict(counts)


def cut_index_of_an_open_store(directory: str, lengths: int, seed: int, names: Iterable[str]) -> dict[str, int]:
    """The same at random lengths, while the store is open and has been used, and another opener comes.

    Returns:
        What `exercise` counts.
    """
    root, random_numbers = Path(directory), random.Random(seed)
    fill_and_die(root)
    sound = small_files(root)
    counts: Counter[str] = Counter()
    for name in names:
        for _ in range(lengths):
            restore(root, sound)
            length = random_numbers.randrange((root / name).stat().st_size)
            # In a fork, so that one that crashes is told by name, and no connection outlives its files.
            counts.update(forked(lambda at=root / name, length=length: _cut_and_use(root, at, length)).result)
    return dict(counts)


def _cut_and_use(root: Path, path: Path, length: int) -> dict[str, int]:
    counts: Counter[str] = Counter()
    with contextlib.closing(DiskStore(root)) as store:
        use(store, Counter())
        os.truncate(path, length)
        use(store, counts)
        # What this connection has read it keeps; one that comes now reads what is left.
        exercise(root, counts)
        use(store, counts)
    return dict(counts)


def cut_large_store(directory: str, lengths: int, seed: int) -> dict[str, int]:
    """Random blocks' files of a store of 65 MB at random lengths, while it is open.

    Returns:
        How many reads of the blocks concerned gave what.
    """
    root, random_numbers = Path(directory), random.Random(seed)
    counts: Counter[str] = Counter()
    with contextlib.closing(DiskStore(root)) as store:
        files = []
        for number in range(_LARGE_BLOCKS):
            store.put(key(number), block(number, _LARGE_BYTES))
            files += _value_files(root).difference(files)
        for _ in range(lengths):
            number = random_numbers.randrange(_LARGE_BLOCKS)
            data = block(number, _LARGE_BYTES)
            os.truncate(files[number], random_numbers.randrange(_LARGE_BYTES))
            counts[judge(number, store.get(key(number)), data)] += 1
            files[number].write_bytes(data)
            counts[f"mended: {judge(number, store.get(key(number)), data)}"] += 1
    return dict(counts)


def _value_files(root: Path) -> set[Path]:
    return set(root.rglob("*.val"))
