"""The directory of a store: what lies in it, who may read it, and the lock that writers under a budget take in turn.

    blockrag-store-v1       the marker, without which a directory with files in it is left alone
    cache.db, -wal, -shm    the index
    ab/<30 digits>.val      values of 32 KiB and more
    fingerprints/           what wrote into it, one file each
    writing.lock            held by the process whose turn it is
    rebuilding/             a new index, while one is written

The directory is 0700, the files are 0600.
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from blockrag.errors import InputError, StoreError, UnsafeStoreError
from blockrag.stores.disk.failures import FAILURES, translated
from blockrag.stores.disk.index import DBNAME
from blockrag.stores.files import StoreFiles

__all__ = ["FINGERPRINTS", "LOCK", "MARKER", "REBUILDING", "SINGLE_FILES", "claim", "create", "only_writer"]

MARKER: Final = "blockrag-store-v1"
FINGERPRINTS: Final = "fingerprints"
LOCK: Final = "writing.lock"
REBUILDING: Final = "rebuilding"
_INDEX_FILES: Final = (DBNAME, f"{DBNAME}-wal", f"{DBNAME}-shm")
SINGLE_FILES: Final = frozenset({MARKER, LOCK, *_INDEX_FILES})
"""The files that lie directly in the directory."""

_MARKER_TEXT: Final = (
    b"A blockrag block store. Its blocks can be recomputed: delete the whole directory to discard it.\n"
)
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


def claim(path: Path, files: StoreFiles) -> str:
    """Make `path` a store's directory, or see that it is one; returns it absolute, without links.

    Raises:
        InputError: A path that diskcache would not take as it is.
        StoreError: It is something else, or cannot be written.
        UnsafeStoreError: Its index is no regular file.
    """
    try:
        root = str(path.expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"cannot open the store at {str(path)!r:.200}: {error}; choose another directory") from None
    if os.path.expandvars(root) != root:
        raise InputError(
            f"the store's path {root} holds a variable, which diskcache would replace; use one without '$'"
        )
    try:
        files.make_directory(root)
        names = files.names(root)
        if MARKER not in names:
            _refuse_foreign(root, names)
            with contextlib.suppress(FileExistsError):
                create(f"{root}/{MARKER}", _MARKER_TEXT, files)
        with contextlib.suppress(FileExistsError):
            # SQLite would create it readable by everybody; its journal files inherit these permissions.
            create(f"{root}/{DBNAME}", b"", files)
        _restrict(root, 0o700, files)
        for name in _INDEX_FILES:
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG(files.status_of(f"{root}/{name}").st_mode):
                    raise UnsafeStoreError(f"{root}/{name} is not a regular file; do not trust this directory")
                _restrict(f"{root}/{name}", 0o600, files)
    except FAILURES as error:
        raise translated(error, root, "open") from error
    return root


def create(path: str, content: bytes, files: StoreFiles) -> None:
    """Write a new file; raises FileExistsError where there is one."""
    handle = files.open(path, _CREATE)
    try:
        written = 0
        while written < len(content):
            written += files.write(handle, memoryview(content)[written:])
    finally:
        os.close(handle)


@contextlib.contextmanager
def only_writer(root: str, files: StoreFiles) -> Iterator[None]:
    """Wait for the turn to write, among all processes and threads.

    Raises:
        StoreError: Another process does not give it up.
        OSError: The lock cannot be opened.
    """
    handle = files.open(f"{root}/{LOCK}", os.O_RDWR | os.O_CREAT)
    try:
        deadline, pause_s = time.monotonic() + files.patience_s, 0.0005
        while not files.lock(handle):
            if time.monotonic() > deadline:
                raise StoreError(
                    f"cannot write to the store at {root}: another process keeps its lock, look for one that hangs"
                )
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.02)
        yield
    finally:
        # A child forked meanwhile holds the same lock; closing alone would leave it locked for as long as that lives.
        files.unlock(handle)
        os.close(handle)


def _refuse_foreign(root: str, names: list[str]) -> None:
    other = [name for name in names if name.startswith(MARKER[:-1])]
    if other:
        raise StoreError(f"{root} was written by another release of blockrag ({other[0]}); use that one, or a new path")
    if names:
        raise StoreError(f"{root} is not a blockrag store and holds {len(names)} other files; use an empty directory")


def _restrict(path: str, mode: int, files: StoreFiles) -> None:
    """Take all permissions from group and others."""
    if files.status_of(path).st_mode & 0o077:
        files.permit(path, mode)
