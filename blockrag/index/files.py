"""The files of a passage index on disk: private to their owner, and never reached through a link or a pipe.

They hold the documents' text, so they are nobody else's to read; and whoever can put a file into the directory must not
be able to have another one read or overwritten in its place.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from blockrag.errors import PassageIndexError

__all__ = [
    "DATABASE_FILE",
    "VECTOR_FILE",
    "NotAFileError",
    "bytes_in",
    "create_private",
    "make_directory",
    "make_private",
    "open_regular",
    "refuse_emptied",
    "refuse_irregular",
]

DATABASE_FILE: Final = "passages.sqlite3"
VECTOR_FILE: Final = "vectors.faiss"

# A pipe must not block the open, a link must not be followed.
_READ: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW


class NotAFileError(OSError):
    """The name leads to a link, a pipe, a directory or a device."""


def make_directory(path: Path) -> None:
    """Make an index's directory where it is missing.

    Raises:
        PassageIndexError: It cannot be made.
    """
    try:
        # Documents are as private as the files they came from: who may list them is for their owner to widen.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise PassageIndexError(f"cannot make the index directory {str(path)!r} ({error}); pass another") from error


def bytes_in(directory: Path) -> int:
    """Bytes of an index's files; one that goes meanwhile, as those that are being written do, has none."""
    total = 0
    for name in (DATABASE_FILE, VECTOR_FILE):
        for file in directory.glob(f"{name}*"):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
    return total


def refuse_irregular(path: Path) -> None:
    """See that a name leads to a file of its own, or to nothing.

    Raises:
        NotAFileError: It leads to anything else.
        OSError: It cannot be looked at.
    """
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise NotAFileError(f"{path.name} is no regular file")


def open_regular(path: Path) -> IO[bytes]:
    """Open a file for reading.

    Raises:
        NotAFileError: The name leads to anything but a file.
        OSError: It cannot be opened.
    """
    refuse_irregular(path)
    file = os.fdopen(os.open(path, _READ), "rb")
    # Between the look and the open it may have become another.
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise NotAFileError(f"{path.name} is no regular file")
    return file


def create_private(path: Path) -> IO[bytes]:
    """Create a file that only its owner may read, open for reading and writing.

    Raises:
        FileExistsError: There is something under this name.
        OSError: It cannot be created.
    """
    return os.fdopen(os.open(path, _CREATE, 0o600), "w+b")


def make_private(path: Path) -> None:
    """Take all permissions on a file from group and others; where that is not possible, it stays as it is."""
    # It may be gone, another user's, or on a medium that cannot be written: none is a reason not to read it.
    with suppress(OSError):
        if path.stat().st_mode & 0o077:
            path.chmod(0o600)


def refuse_emptied(directory: Path) -> None:
    """An empty database is a new one, unless there are vectors of what it held.

    Raises:
        PassageIndexError: There are.
    """
    file = directory / DATABASE_FILE
    with suppress(OSError):
        status = file.lstat()
        if stat.S_ISREG(status.st_mode) and status.st_size == 0 and (directory / VECTOR_FILE).exists():
            raise PassageIndexError(
                f"{file} is damaged (it is empty, and there are vectors); restore it from a backup, or delete its "
                "directory and ingest the documents again"
            )
