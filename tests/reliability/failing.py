"""Stores whose disk is full, whose calls fail, or whose process may open no more files; run by `fresh`."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import resource
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from blocks import IN_FILE, IN_ROW, block, judge, key

from blockrag.errors import StoreError, StoreFullError
from blockrag.stores import DiskStore
from blockrag.stores.files import StoreFiles

__all__ = ["fill", "inject", "limit_file_size", "limit_handles"]

# What SQLite says where the operating system says the others.
_SQLITE = {
    errno.ENOSPC: "database or disk is full",
    errno.EIO: "disk I/O error",
    errno.EMFILE: "unable to open database file",
}
_KEPT = (IN_ROW, IN_FILE, IN_ROW, IN_FILE, IN_FILE)
_BUDGET = 10 * IN_FILE


class FailingFiles(StoreFiles):
    """Lets the n-th call fail, or all from the n-th on, as it would on a full or broken disk."""

    def __init__(self, number: int, fails_at: int, *, forever: bool) -> None:
        super().__init__()
        self._number = number
        self._fails_at = fails_at
        self._forever = forever
        self.calls = 0
        self.failed: list[str] = []

    def before(self, call: str) -> None:
        self.calls += 1
        if self.calls == self._fails_at or (self._forever and self.calls > self._fails_at):
            self.failed.append(call)
            if call == "connect" or call.startswith("execute"):
                raise sqlite3.OperationalError(_SQLITE[self._number])
            raise OSError(self._number, os.strerror(self._number))

    def mend(self) -> None:
        """From now on nothing fails."""
        self._fails_at, self._forever = 0, False


def inject(directory: str, error: str, forever: bool) -> dict[str, int]:
    """Let the first call of a store's whole life fail, then the second, until there is none left to fail.

    Returns:
        "calls" that failed, "typed" errors that came of them, "full" ones among them, "kept" operations that succeeded
        all the same, and "strays" (files that could not be removed), all of which a sweep removed.
    """
    number = getattr(errno, error)
    template = Path(directory) / "template"
    with contextlib.closing(DiskStore(template)) as store:
        for i, size in enumerate(_KEPT):
            store.put(key(i), block(i, size))
    counts: Counter[str] = Counter()
    root = Path(directory) / "store"
    for fails_at in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(template, root)
        files = FailingFiles(number, fails_at, forever=forever)
        handles = _handles()
        _live(root, files, counts)
        assert _handles() == handles, f"handles are left open after call {fails_at} failed: {files.failed}"
        if not files.failed:
            counts["calls"] = fails_at - 1
            return dict(counts)
        _check_afterwards(root, counts, files.failed)
    raise AssertionError("unreachable")


def _live(root: Path, files: FailingFiles, counts: Counter[str]) -> None:
    """Open a store, do everything there is to do, and look from another one that nothing fails for."""
    with contextlib.closing(DiskStore(root)) as reader:
        store: DiskStore | None = None
        with _typed(counts, files):
            store = DiskStore(root, max_bytes=_BUDGET, files=files)
        if store is None:
            _look(reader, {0, 1, 2, 3, 4})
            return
        with contextlib.closing(store):
            for operation in _operations(store):
                with _typed(counts, files):
                    operation()
                    counts["kept"] += 1
                # The block that is replaced and the one that is deleted are there or not; the others always are.
                _look(reader, {0, 2, 4})
            files.mend()
            store.put(key(7), block(7, IN_FILE))
            assert judge(7, store.get(key(7)), block(7, IN_FILE)) == "right"
            assert judge(7, reader.get(key(7)), block(7, IN_FILE)) == "right"


def _operations(store: DiskStore) -> Iterator[Callable[[], object]]:
    yield lambda: _same(0, store.get(key(0)))
    yield lambda: _same(1, store.get(key(1)))
    yield lambda: store.put(key(5), block(5, IN_ROW))
    yield lambda: store.put(key(6), block(6, IN_FILE))
    yield lambda: store.put(key(1), block(1, IN_FILE))
    yield lambda: [_same(int(i), data) for i, (_, data) in enumerate(store.get_many([key(i) for i in range(5)]))]
    yield lambda: store.contains_many([key(0), key(1)])
    yield lambda: store.delete_many([key(3)])
    yield lambda: list(store.keys())
    yield store.stats
    yield store.fingerprints
    yield store.verify
    yield lambda: store.verify(fix=True)
    yield lambda: store.sweep(older_than_s=3600.0)


def _same(number: int, data: memoryview | None) -> None:
    """What a store with a failing disk gives is right or nothing."""
    assert judge(number, data, block(number, _KEPT[number])) in ("right", "missing")


def _look(reader: DiskStore, numbers: set[int]) -> None:
    for number in numbers:
        assert judge(number, reader.get(key(number)), block(number, _KEPT[number])) == "right", f"block {number}"


@contextlib.contextmanager
def _typed(counts: Counter[str], files: FailingFiles) -> Iterator[None]:
    try:
        yield
    except StoreError as error:
        if not files.failed:
            raise
        counts["typed"] += 1
        counts["full"] += isinstance(error, StoreFullError)


def _check_afterwards(root: Path, counts: Counter[str], failed: list[str]) -> None:
    with contextlib.closing(DiskStore(root)) as store:
        faults = store.verify().faults
        wrong = [fault for fault in faults if fault.kind != "stray"]
        assert not wrong, f"after {failed[0]!r} failed: {wrong}"
        counts["strays"] += len(faults)
        store.sweep(older_than_s=-1.0)
        assert store.verify().ok
        store.put(key(8), block(8, IN_FILE))
        assert judge(8, store.get(key(8)), block(8, IN_FILE)) == "right"


def _handles() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def fill(directory: str, block_bytes: int, filler_bytes: int) -> dict[str, int]:
    """Fill a small file system with blocks, go on, make room, and go on.

    Blocks in files make room for themselves when they are deleted; what lies in the index needs room to be deleted, so
    that a filler, as if it were somebody else's file, goes first.

    Returns:
        "stored" before it was full, "refused" afterwards, "after" it had room again, and "faults" of the final check.
    """
    root, filler = Path(directory) / "s", Path(directory) / "filler"
    filler.write_bytes(bytes(filler_bytes))
    with contextlib.closing(DiskStore(root)) as store, contextlib.closing(DiskStore(root)) as reader:
        stored, refused = _put_until_full(store, range(100_000), block_bytes)
        assert not store.contains_many([key(number) for number in refused])
        _read_all(reader, stored, block_bytes)
        filler.unlink()
        deleted = stored[: len(stored) // 2 + 1]
        assert store.delete_many([key(number) for number in deleted]) == len(deleted)
        after, _ = _put_until_full(store, range(200_000, 200_002), block_bytes)
        _read_all(reader, [*stored[len(deleted) :], *after], block_bytes)
        faults = len(store.verify().faults)
    return {"stored": len(stored), "refused": len(refused), "after": len(after), "faults": faults}


def limit_file_size(directory: str, block_bytes: int, limit: int) -> dict[str, int]:
    """Store blocks while no file of this process may grow beyond a limit (RLIMIT_FSIZE), then lift the limit."""
    root = Path(directory) / "s"
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    with contextlib.closing(DiskStore(root)) as store, contextlib.closing(DiskStore(root)) as reader:
        store.put(key(0), block(0, block_bytes))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        stored, refused = _put_until_full(store, range(1, 500), block_bytes)
        _read_all(reader, [0, *stored], block_bytes)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        after, _ = _put_until_full(store, range(1000, 1002), block_bytes)
        _read_all(reader, [0, *stored, *after], block_bytes)
        faults = len(store.verify().faults)
    return {"stored": len(stored), "refused": len(refused), "after": len(after), "faults": faults}


def limit_handles(directory: str) -> dict[str, int]:
    """Write and read while this process may open no more files (RLIMIT_NOFILE), then lift the limit."""
    counts: Counter[str] = Counter()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.closing(DiskStore(Path(directory) / "s")) as store:
        for number in range(4):
            store.put(key(number), block(number, IN_FILE))
        # The lowest free number is the limit: the next handle would get it.
        free = os.open("/dev/null", os.O_RDONLY)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        for number in range(4):
            try:
                counts[judge(number, store.get(key(number)), block(number, IN_FILE))] += 1
            except StoreError:
                counts["typed"] += 1
            try:
                store.put(key(number + 10), block(number + 10, IN_FILE))
            except StoreError:
                counts["typed"] += 1
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for number in range(4):
            assert judge(number, store.get(key(number)), block(number, IN_FILE)) == "right"
            store.put(key(number + 10), block(number + 10, IN_FILE))
        counts["faults"] = len(store.verify().faults)
    return dict(counts)


def _put_until_full(store: DiskStore, numbers: range, block_bytes: int) -> tuple[list[int], list[int]]:
    """The blocks that were stored, and up to ten that were refused."""
    stored: list[int] = []
    refused: list[int] = []
    for number in numbers:
        try:
            store.put(key(number), block(number, block_bytes))
            stored.append(number)
        except StoreFullError:
            refused.append(number)
            if len(refused) == 10:
                break
    return stored, refused


def _read_all(reader: DiskStore, numbers: list[int], block_bytes: int) -> None:
    for number in numbers:
        assert judge(number, reader.get(key(number)), block(number, block_bytes)) == "right"
