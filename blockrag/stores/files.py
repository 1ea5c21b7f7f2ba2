"""`StoreFiles`: every call of the disk store that can fail goes through here, and through nothing else.

One place for the system calls and the SQL statements, so that a test can let the n-th of them fail, or end the process
there, without patching a library: it passes a subclass whose `before` raises, or kills. Nothing here knows what the
files mean.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Sequence

__all__ = ["StoreFiles"]


class StoreFiles:
    """The operating system and SQLite, as the disk store sees them.

    Every method first tells `before` its name and then makes one call, whose errors (OSError, sqlite3.Error) it lets
    through. Handles are file descriptors; the caller closes them.

    Args:
        patience_s: How long a lock that another process holds is waited for.
    """

    def __init__(self, *, patience_s: float = 60.0) -> None:
        self.patience_s = patience_s

    def before(self, call: str) -> None:
        """Told each call before it is made; does nothing, and is there to be overridden.

        Args:
            call: The method's name; `execute` adds the statement's first word, as in "execute COMMIT".
        """

    def open(self, path: str, flags: int, mode: int = 0o600) -> int:
        """A handle of a file, never inherited by other programs, never through a symbolic link."""
        self.before("open")
        return os.open(path, flags | os.O_CLOEXEC | os.O_NOFOLLOW, mode)

    def write(self, handle: int, data: memoryview) -> int:
        """Write the beginning of `data`; returns how many bytes that was."""
        self.before("write")
        return os.write(handle, data)

    def read_into(self, handle: int, buffer: memoryview, offset: int) -> int:
        """Read into the beginning of `buffer` from a position; returns how many bytes, 0 at the end."""
        self.before("read_into")
        return os.preadv(handle, [buffer], offset)

    def status(self, handle: int) -> os.stat_result:
        """What an open file is."""
        self.before("status")
        return os.fstat(handle)

    def status_of(self, path: str) -> os.stat_result:
        """What a path leads to, symbolic links not followed."""
        self.before("status_of")
        return os.lstat(path)

    def names(self, directory: str) -> list[str]:
        """What is in a directory."""
        self.before("names")
        return os.listdir(directory)  # noqa: PTH208 - names are all that is needed

    def make_directory(self, path: str) -> None:
        """A directory for this user alone; there may be one already."""
        self.before("make_directory")
        os.makedirs(path, mode=0o700, exist_ok=True)  # noqa: PTH103 - the seam takes strings

    def remove(self, path: str) -> None:
        """Remove a file."""
        self.before("remove")
        os.unlink(path)  # noqa: PTH108 - the seam takes strings

    def remove_directory(self, path: str) -> None:
        """Remove an empty directory."""
        self.before("remove_directory")
        os.rmdir(path)  # noqa: PTH106 - the seam takes strings

    def rename(self, old: str, new: str) -> None:
        """Give a file another name in one step, replacing what had it."""
        self.before("rename")
        os.replace(old, new)  # noqa: PTH105 - the seam takes strings

    def permit(self, path: str, mode: int) -> None:
        """Set permissions; by path, as closing a second handle of an index would drop SQLite's locks."""
        self.before("permit")
        os.chmod(path, mode)  # noqa: PTH101 - the seam takes strings

    def touch(self, path: str) -> None:
        """Set a file's times to now."""
        self.before("touch")
        os.utime(path)

    def lock(self, handle: int) -> bool:
        """Take the lock of an open file unless somebody has it; returns whether. It ends with the handle."""
        self.before("lock")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def unlock(self, handle: int) -> None:
        """Give up the lock of an open file, and those that a forked process inherited with it."""
        fcntl.flock(handle, fcntl.LOCK_UN)

    def connect(self, path: str) -> sqlite3.Connection:
        """A connection in autocommit mode; closing it from another thread is allowed, using it there is not done."""
        self.before("connect")
        return sqlite3.connect(path, timeout=self.patience_s, isolation_level=None, check_same_thread=False)

    def execute(
        self, connection: sqlite3.Connection, statement: str, parameters: Sequence[object] = ()
    ) -> sqlite3.Cursor:
        """Run one statement."""
        self.before(f"execute {statement.split(maxsplit=1)[0]}")
        return connection.execute(statement, parameters)
