"""Value files: how they are written, found, read and removed, without pickle and without leaving the directory.

`SafeDisk` is also what diskcache calls for its own keys and values, so going through diskcache itself is as strict.

A writer holds the lock of its file from before the first byte until the row that names it is committed. A file that
nobody has locked and no row names is left over from a killed writer, as long as it is not just being created: see
sweeping.py.

Files are read, not mapped: mapping saves an eighth of the time from the file to a prompt's cache, by
benchmarks/stores.py, and ends the process when somebody truncates the file meanwhile, where a read finds that it ends
early.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
from typing import Any, Final, NamedTuple

import diskcache
from diskcache.core import MODE_BINARY, MODE_RAW, UNKNOWN

from blockrag.errors import InputError, UnsafeStoreError
from blockrag.fingerprint import check_key
from blockrag.stores.arguments import byte_view
from blockrag.stores.disk.rows import Row, is_key, is_value_name
from blockrag.stores.files import StoreFiles

__all__ = ["Buffer", "NewValue", "OpenValue", "SafeDisk"]

_LOG = logging.getLogger(__name__)

# A pipe must not block the open.
_READ: Final = os.O_RDONLY | os.O_NONBLOCK
_CREATE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL


class OpenValue(NamedTuple):
    """A value file, open for reading, and its length."""

    handle: int
    size: int


class NewValue(NamedTuple):
    """A value as its row will name it; a file is complete, and locked while `handle` is open."""

    size: int
    mode: int
    filename: str | None
    value: memoryview | None
    handle: int | None

    def release(self) -> None:
        """Give up the lock."""
        if self.handle is not None:
            os.close(self.handle)


class Buffer:
    """Memory for one value after another: fresh memory costs more than the reading, for each page is faulted in."""

    __slots__ = ("_bytes",)

    def __init__(self) -> None:
        self._bytes = bytearray()

    def take(self, size: int) -> memoryview:
        """A view of `size` bytes: of the memory used last, unless anybody still holds a view or a tensor over it."""
        try:
            # A bytearray refuses to change its length while it is exported.
            self._bytes.append(0)
            self._bytes.pop()
        except BufferError:
            self._bytes = bytearray()
        if len(self._bytes) < size:
            self._bytes = bytearray(size)
        return memoryview(self._bytes)[:size]


class SafeDisk(diskcache.Disk):  # type: ignore[misc]
    """The value files of one directory; diskcache constructs it, and the index then gives it its `files`."""

    def __init__(self, directory: str, min_file_size: int = 0, pickle_protocol: int = 0) -> None:
        super().__init__(directory, min_file_size=min_file_size, pickle_protocol=pickle_protocol)
        self._root: str = directory
        self.files = StoreFiles()

    def put(self, key: Any) -> tuple[str, bool]:
        """The key as the index keeps it; raises InputError for anything but a block key."""
        return check_key(key), True

    def get(self, key: Any, raw: Any) -> str:
        """The key the index kept; raises UnsafeStoreError for pickled and foreign keys."""
        if raw != 1 or not is_key(key):
            raise UnsafeStoreError(f"the store holds a foreign key {key!r:.80} (raw={raw!r:.20}); delete the directory")
        return str(key)

    def store(
        self, value: bytes | bytearray | memoryview, read: bool, key: Any = UNKNOWN
    ) -> tuple[int, int, str | None, memoryview | None]:
        """Write a value for diskcache itself: (size, mode, file name, row value)."""
        if read:
            raise InputError("a store keeps bytes, not streams; read the block first")
        new = self.write(byte_view(value))
        new.release()
        return new.size, new.mode, new.filename, new.value

    def fetch(self, mode: int, filename: str | None, value: bytes | None, read: bool) -> memoryview:
        """A value for diskcache itself, as strict as `load`; one that cannot be read is an OSError, as it expects."""
        size = len(value) if isinstance(value, bytes) else None
        row = Row("0" * 64, 1, mode, size or 0, filename, value).checked()
        found = self.load(row, size)
        if found is None:
            raise FileNotFoundError(filename)
        return found

    def write(self, view: memoryview) -> NewValue:
        """Write a value; the caller commits a row that names it, or removes it, and then releases it."""
        if len(view) < self.min_file_size:
            return NewValue(len(view), MODE_RAW, None, view, None)
        while True:
            name, path = self.filename()
            self._make_parent(path)
            handle = self.files.open(path, _CREATE)
            try:
                # A sweeper may have come between; the grace period makes that all but impossible.
                if self.files.lock(handle) and self.files.status(handle).st_nlink:
                    written = 0
                    while written < len(view):
                        written += self.files.write(handle, view[written:])
                    return NewValue(len(view), MODE_BINARY, name, None, handle)
            except BaseException:
                self.remove(name)
                os.close(handle)
                raise
            os.close(handle)

    def load(self, row: Row, size: int | None) -> memoryview | None:
        """The value of a checked row over a fresh buffer, or None where it is gone or not `size` bytes long."""
        if row.value is not None:
            return memoryview(bytearray(row.value)) if len(row.value) == size else None
        opened = self.open(row.filename or "", size)
        return None if opened is None else self.read(opened, Buffer())

    def open(self, name: str, size: int | None) -> OpenValue | None:
        """A value file, open for `read`; None where it is gone, cannot be opened, or is not `size` bytes long."""
        path = self._confined(name)
        try:
            handle = self.files.open(path, _READ)
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("cannot open %s (%s); the block counts as missing", path, error)
            return None
        try:
            status = self.files.status(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UnsafeStoreError(f"{path} is not a regular file; do not trust this directory, delete it")
            if size is None or status.st_size == size:
                return OpenValue(handle, status.st_size)
        except OSError as error:
            _LOG.warning("cannot read %s (%s); the block counts as missing", path, error)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def read(self, opened: OpenValue, buffer: Buffer) -> memoryview | None:
        """The content of an open file, which is closed; None where it cannot be read or ends early."""
        try:
            view = buffer.take(opened.size)
            done = 0
            while done < len(view):
                count = self.files.read_into(opened.handle, view[done:], done)
                if not count:
                    return None
                done += count
        except OSError as error:
            _LOG.warning("cannot read a value file (%s); the block counts as missing", error)
            return None
        finally:
            os.close(opened.handle)
        return view

    def length(self, name: str) -> int | None:
        """Bytes of a value file without opening it; None where it is gone or no file of this store."""
        if not is_value_name(name):
            return None
        try:
            status = self.files.status_of(os.path.join(self._root, name))  # noqa: PTH118 - called for every key
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

    def is_safe(self, name: str) -> bool:
        """Whether there is nothing under a value file's name but a regular file of this directory, if anything."""
        try:
            status = self.files.status_of(self._confined(name))
        except FileNotFoundError:
            return True
        except (UnsafeStoreError, NotADirectoryError):
            return False
        return stat.S_ISREG(status.st_mode)

    def filename(self, key: Any = UNKNOWN, value: Any = UNKNOWN) -> tuple[str, str]:
        """A fresh random (file name, full path); one level of 256 directories, which stay when they are empty."""
        digits = os.urandom(16).hex()
        name = f"{digits[:2]}/{digits[2:]}.val"
        return name, os.path.join(self._root, name)  # noqa: PTH118 - diskcache wants strings

    def remove(self, file_path: str) -> None:
        """Remove a value file of this store; a name that leads elsewhere is left alone and logged."""
        try:
            path = self._confined(file_path)
        except UnsafeStoreError as error:
            _LOG.warning("%s", error)
            return
        # What cannot be removed now is swept later.
        with contextlib.suppress(OSError):
            self.files.remove(path)

    def _confined(self, name: str) -> str:
        """The full path of a value file, once its name and its directory have been checked."""
        if is_value_name(name):
            path = os.path.join(self._root, name)  # noqa: PTH118 - on the read path, where pathlib is slow
            parent = path[: -len(name) + 2]
            if os.path.realpath(parent) == parent and not os.path.islink(path):  # noqa: PTH114
                return path
        raise UnsafeStoreError(f"value file {name!r:.100} leads out of {self._root}; delete the directory")

    def _make_parent(self, path: str) -> None:
        parent = os.path.dirname(path)  # noqa: PTH120 - strings throughout
        self.files.make_directory(parent)
        if os.path.realpath(parent) != parent:
            raise UnsafeStoreError(f"{parent} is a symbolic link; do not trust this directory, delete it")
