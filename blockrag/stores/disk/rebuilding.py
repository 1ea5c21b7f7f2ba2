"""A new index for a store whose index is damaged: the value files say themselves which block they are.

What was kept in the index is lost with it: blocks below 32 KiB, which are computed again, and the order of use, for
which the age of the files stands in.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from diskcache.core import MODE_BINARY

from blockrag.errors import DamagedBlockError, StoreError
from blockrag.stores.disk.directory import MARKER, REBUILDING, claim, create, only_writer
from blockrag.stores.disk.failures import FAILURES, translated
from blockrag.stores.disk.index import DBNAME, Index
from blockrag.stores.disk.rows import Row
from blockrag.stores.disk.sweeping import value_files
from blockrag.stores.disk.values import Buffer, SafeDisk
from blockrag.stores.files import StoreFiles

__all__ = ["clear", "is_abandoned", "rebuild_index"]


def rebuild_index(path: str | os.PathLike[str], *, files: StoreFiles | None = None) -> int:
    """Replace the index of a store by one that is made from its value files.

    Nothing changes until the new index is complete. Processes that have the store open go over to it when they next
    write; until then they may miss blocks.

    Args:
        path: The store's directory.
        files: The calls that may fail.

    Returns:
        How many blocks the new index has. Files that hold no sound block are left for the sweep.

    Raises:
        StoreError: The directory is no store, or cannot be written, or a value file cannot be read.
    """
    files = files or StoreFiles()
    if not (Path(path).expanduser() / MARKER).is_file():
        raise StoreError(f"{path} is not a blockrag store: there is no {MARKER} in it; pass the directory of one")
    root = claim(Path(path), files)
    try:
        with only_writer(root, files):
            found = _sound_blocks(root, files)
            scratch = f"{root}/{REBUILDING}"
            _write_index(scratch, found, files)
            for name in (f"{DBNAME}-wal", f"{DBNAME}-shm"):
                with contextlib.suppress(FileNotFoundError):
                    files.remove(f"{root}/{name}")
            files.rename(f"{scratch}/{DBNAME}", f"{root}/{DBNAME}")
            clear(scratch, files)
    except FAILURES as error:
        raise translated(error, root, "write to") from error
    return len(found)


def is_abandoned(root: str, files: StoreFiles, *, before: float) -> bool:
    """Whether an unfinished index lies there that nobody has touched since a point in time."""
    try:
        return files.status_of(f"{root}/{REBUILDING}").st_mtime < before
    except FileNotFoundError:
        return False


def clear(directory: str, files: StoreFiles) -> None:
    """Remove a directory with the files of an index in it."""
    for name in files.names(directory):
        files.remove(f"{directory}/{name}")
    files.remove_directory(directory)


def _sound_blocks(root: str, files: StoreFiles) -> dict[str, tuple[Row, float]]:
    """The row and the age of each block that a file holds whole; the younger one of two copies."""
    from blockrag import codec

    values = SafeDisk(root)
    values.files = files
    buffer = Buffer()
    found: dict[str, tuple[Row, float]] = {}
    for name, status in value_files(root, files):
        opened = values.open(name, status.st_size)
        data = None if opened is None else values.read(opened, buffer)
        if data is None:
            if values.length(name) == status.st_size:
                raise StoreError(f"cannot read {root}/{name}, see the log; the index stays as it is until it can")
            continue
        try:
            key = codec.read_header(data).key
        except DamagedBlockError:
            continue
        if key not in found or found[key][1] < status.st_mtime:
            found[key] = Row(key, 1, MODE_BINARY, status.st_size, name, None), status.st_mtime
    return found


def _write_index(directory: str, found: dict[str, tuple[Row, float]], files: StoreFiles) -> None:
    """A complete index in a directory of its own, replacing what an earlier attempt left there."""
    with contextlib.suppress(FileNotFoundError):
        clear(directory, files)
    files.make_directory(directory)
    create(f"{directory}/{DBNAME}", b"", files)
    with contextlib.closing(Index(directory, files)) as index, index.write():
        for row, when in found.values():
            index.put(row, None, when)
