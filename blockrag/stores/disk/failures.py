"""What SQLite, diskcache and the file system raise, as the store's own errors, with what to do about it."""

from __future__ import annotations

import errno
import sqlite3
from typing import Final

import diskcache

from blockrag.errors import StoreError, StoreFullError

__all__ = ["FAILURES", "translated"]

FAILURES: Final = (sqlite3.Error, diskcache.Timeout, OSError, UnicodeDecodeError)
"""What may be raised while a store reads or writes; the last by Python, for what SQLite says of a damaged schema."""

_MAKE_ROOM: Final = "free disk space, or give the store a max_bytes"
_BE_ALLOWED: Final = "choose a directory that this user can write"
_MEDIUM: Final = "the medium fails, see the system's log"
_HINTS: Final = {
    errno.EMFILE: "close some of this process's files, or raise its limit (ulimit -n)",
    errno.ENFILE: "the system has no file handles left, look for a program that leaks them",
    errno.EIO: _MEDIUM,
    errno.ESTALE: "it lies on a network file system that went away; keep the store on a local one",
}


def translated(error: BaseException, root: object, doing: str) -> StoreError:
    """The error to raise for one of `FAILURES`.

    Args:
        error: What was caught.
        root: The store's directory.
        doing: The failed activity, as in "cannot {doing} the store": "open", "read", "write to".
    """
    cause: BaseException = error
    # diskcache reports any failure to begin as a Timeout, and may fail to roll back what SQLite has rolled back
    # itself; the reason is what was being handled then.
    while cause.__context__ and (isinstance(cause, diskcache.Timeout) or "cannot rollback" in str(cause)):
        cause = cause.__context__
    text = str(cause) or type(cause).__name__
    prefix = f"cannot {doing} the store at {root}: {text}"
    if isinstance(cause, OSError):
        if cause.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return StoreFullError(f"{prefix}; {_MAKE_ROOM}")
        return StoreError(f"{prefix}; {_HINTS.get(cause.errno or 0, _BE_ALLOWED)}")
    if "full" in text or (doing == "write to" and "disk I/O" in text):
        return StoreFullError(f"{prefix}; {_MAKE_ROOM}")
    if "disk I/O" in text:
        return StoreError(f"{prefix}; {_MEDIUM}")
    if "locked" in text or "busy" in text:
        return StoreError(f"{prefix}; another process keeps its lock, look for one that hangs")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"{prefix}; {_BE_ALLOWED}")
    return StoreError(
        f"{prefix}; its index is damaged: let `blockrag verify-store --fix` write a new one from the value files, or "
        "delete the directory and ingest again"
    )
