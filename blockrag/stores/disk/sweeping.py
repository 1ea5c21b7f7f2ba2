"""Finds and removes the value files that killed writers left behind, while others write.

A file is left over when no row names it, nobody holds its lock, and it is older than the grace period; the index is
asked once more after the lock has been taken, for its writer may have committed in between. Age alone would take the
file of a writer that was stopped for a while, the lock alone that of one which has created it and not yet locked it.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterator
from typing import Final

from blockrag.stores.disk.index import Index, chunks
from blockrag.stores.disk.rows import is_value_name
from blockrag.stores.files import StoreFiles

__all__ = ["strays", "value_files"]

_FOLDER: Final = re.compile(r"[0-9a-f]{2}")


def value_files(root: str, files: StoreFiles) -> Iterator[tuple[str, os.stat_result]]:
    """Name and status of each regular value file of a store; follows no links.

    Raises:
        OSError: A directory cannot be listed.
    """
    for folder in files.names(root):
        path = f"{root}/{folder}"
        if not _FOLDER.fullmatch(folder) or not stat.S_ISDIR(files.status_of(path).st_mode):
            continue
        for entry in files.names(path):
            name = f"{folder}/{entry}"
            if is_value_name(name):
                with contextlib.suppress(FileNotFoundError):
                    status = files.status_of(f"{root}/{name}")
                    if stat.S_ISREG(status.st_mode):
                        yield name, status


def strays(root: str, index: Index, files: StoreFiles, *, before: float, remove: bool) -> list[str]:
    """Names of value files that belong to nobody.

    Args:
        root: The store's directory.
        index: Its index.
        files: The calls that may fail.
        before: A time; files that were written to later are left alone.
        remove: Remove them.

    Raises:
        OSError: A directory cannot be listed.
        sqlite3.Error: The index cannot be read.
    """
    index.follow()
    old = {name for name, status in value_files(root, files) if status.st_mtime < before}
    for rows in index.every("filename") if old else ():
        old.difference_update(name for _, name in rows)
    found: list[str] = []
    # Each takes a handle while it is looked at.
    for portion in chunks(sorted(old), with_values=True):
        locked: dict[str, int] = {}
        try:
            for name in portion:
                handle = _locked(f"{root}/{name}", files)
                if handle is not None:
                    locked[name] = handle
            for name in locked.keys() - index.named(list(locked)):
                if remove:
                    index.values.remove(name)
                found.append(name)
        finally:
            for handle in locked.values():
                os.close(handle)
    return found


def _locked(path: str, files: StoreFiles) -> int | None:
    """A handle that holds the file's lock; None where somebody else does, or it is gone."""
    try:
        handle = files.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if files.lock(handle):
            return handle
    except OSError:
        pass
    os.close(handle)
    return None
