"""What is done to a store whose files are damaged: open it, read, list, check and write, and judge each result."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from blocks import IN_FILE, IN_ROW, block, judge, key

from blockrag.errors import StoreError
from blockrag.stores import DiskStore

__all__ = [
    "IN_FILES",
    "NUMBERS",
    "exercise",
    "fill_and_die",
    "index_files",
    "restore",
    "size_of",
    "small_files",
    "typed",
    "use",
]

NUMBERS = range(8)
"""The blocks of a small store."""
IN_FILES = 2
"""The first so many have files of their own; the others lie in the index."""

_BUDGET = 10_000_000
_NEW = 1000
_HANG_S = 20


def size_of(number: int) -> int:
    """Bytes of a block of the store that `fill_and_die` makes."""
    return IN_FILE if number < IN_FILES else IN_ROW


def exercise(root: Path, counts: Counter[str], numbers: range = NUMBERS) -> None:
    """Open the store and use it; a hang ends the process, and so does any error that is not the store's own.

    Args:
        root: Its directory.
        counts: Counts "reads" and what they gave, "refused to open" and the other refusals.
        numbers: Its blocks.
    """
    faulthandler.dump_traceback_later(_HANG_S, exit=True)
    with typed(counts, "refused to open"), contextlib.closing(DiskStore(root, max_bytes=_BUDGET)) as store:
        use(store, counts, numbers)
    faulthandler.cancel_dump_traceback_later()


def use(store: DiskStore, counts: Counter[str], numbers: range = NUMBERS) -> None:
    """Read every block, list, check and write."""
    for number in numbers:
        counts["reads"] += 1
        with typed(counts, "refused to read"):
            counts[judge(number, store.get(key(number)), block(number, size_of(number)))] += 1
    with typed(counts, "refused to read"):
        counts["listed"] += len(list(store.keys()))
    with typed(counts, "refused to check"):
        store.verify()
    with typed(counts, "refused to write"):
        store.put(key(_NEW), block(_NEW, IN_ROW))
        counts[f"written: {judge(_NEW, store.get(key(_NEW)), block(_NEW, IN_ROW))}"] += 1


@contextlib.contextmanager
def typed(counts: Counter[str], name: str) -> Iterator[None]:
    """The store's own errors count as refusals; any other ends the process."""
    try:
        yield
    except StoreError:
        counts[name] += 1


def fill_and_die(root: Path, numbers: range = NUMBERS) -> None:
    """Half of the blocks by a writer that closes the store, half by one that is killed and leaves its log behind."""
    for portion, die in ((numbers[::2], False), (numbers[1::2], True)):
        child = os.fork()
        if not child:
            store = DiskStore(root)
            for number in portion:
                store.put(key(number), block(number, size_of(number)))
            if die:
                os.kill(os.getpid(), signal.SIGKILL)
            store.close()
            os._exit(0)
        os.waitpid(child, 0)


def small_files(root: Path) -> dict[Path, bytes]:
    """The files that lie directly in a store's directory; those of the values lie deeper."""
    return {path: path.read_bytes() for path in sorted(root.iterdir()) if path.is_file()}


def index_files(files: Iterable[Path]) -> list[Path]:
    """The index, and the write-ahead log beside it."""
    found = [path for path in files if path.name in ("cache.db", "cache.db-wal")]
    assert len(found) == 2, f"an index and its write-ahead log, found {found}"
    return found


def restore(root: Path, files: Mapping[Path, bytes]) -> None:
    """Make the files directly in a store's directory these and no others."""
    for path in root.iterdir():
        if path.is_file() and path not in files:
            path.unlink()
    for path, data in files.items():
        path.write_bytes(data)
