"""`DiskStore`: encoded blocks in a local directory, shared by the processes of one machine.

The directory is a diskcache (grantjenks.com/docs/diskcache): an SQLite index, small values in its rows, values of 32
KiB and more in files of their own. diskcache as it comes pickles, follows file names out of the directory, obeys
settings found in it, and evicts ten entries at a time (CVE-2025-69872 describes the first and has no fixed release).
So everything here goes through a hardened `Disk` and `Cache`, and only this module knows diskcache:

- Values are bytes, keys are block keys. Pickled values and pickled keys are refused, never loaded, never written.
- A value file's name must be one this module makes (`ab/<30 hex digits>.val`), and must lead to a regular file in the
  directory: absolute names, `..`, symbolic links and pipes are refused before anything is opened or removed.
- Settings and pragmas come from this module. An index that holds others, or views, or triggers that do anything but
  keep the totals, is refused. Directory 0700, files 0600.
- A byte budget evicts the least recently used blocks, exactly as many as are needed, in the transaction that adds
  the new row: the bytes of all rows never exceed the budget, whichever process writes. Reads take no write lock;
  what they used is noted in memory and written with the next put, or at close.

A value file is complete and closed before its row is committed, so a killed writer leaves no partial value, only a
file without a row, which a later open removes. Nothing is synchronized to the medium: after a power failure a row may
point to a file that is short or gone. That is a miss (the lengths disagree, or the codec's checksum does), and a KV
state is never the only copy of anything. SQLite's write-ahead log needs shared memory: keep the directory on a local
file system, not on NFS.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import sqlite3
import stat
import threading
import time
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import quote

import diskcache
from diskcache.core import DBNAME, DEFAULT_SETTINGS, METADATA, MODE_BINARY, MODE_RAW, UNKNOWN

from blockrag.errors import InputError, StoreError, StoreFullError, UnsafeStoreError
from blockrag.fingerprint import check_key
from blockrag.stores.memory import byte_view
from blockrag.stores.protocol import StoreStats

__all__ = ["DiskStore"]

_LOG = logging.getLogger(__name__)

_MARKER: Final = "blockrag-store-v1"
_MARKER_TEXT: Final = (
    b"A blockrag block store. Its blocks can be recomputed: delete the whole directory to discard it.\n"
)
_FILENAME: Final = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.val")
_BUSY_S: Final = 60.0
_SWEEP_EVERY_S: Final = 86400.0
_ROWS_PER_QUERY: Final = 64
_READ_AHEAD: Final = 4
_MAX_NOTED_USES: Final = 16384
# A pipe must not block the open, a link must not be followed.
_READ_FLAGS: Final = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC

_SETTINGS: Final[dict[str, int | str]] = {
    "statistics": 0,
    "tag_index": 0,
    "eviction_policy": "none",
    "size_limit": 2**62,
    "cull_limit": 0,
    "sqlite_auto_vacuum": 1,
    "sqlite_cache_size": 8192,
    "sqlite_journal_mode": "wal",
    "sqlite_mmap_size": 0,
    "sqlite_synchronous": 1,
    "disk_min_file_size": 32 * 1024,
    "disk_pickle_protocol": 0,
}
_KNOWN_SETTINGS: Final = _SETTINGS.keys() | DEFAULT_SETTINGS.keys() | METADATA.keys()
# Apply to the connection, cost nothing, and keep SQLite from trusting what an index brings along
# (sqlite.org/security.html, "Untrusted SQLite Database Files").
_PRAGMAS: Final = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "mmap_size = 0",
    "synchronous = NORMAL",
    "cache_size = 8192",
)
_SCHEMA: Final = {
    "table": re.compile(r"Cache|Settings"),
    "index": re.compile(r"Cache_key_raw|Cache_expire_time|Cache_use|sqlite_autoindex_\w+"),
    "trigger": re.compile(r"Settings_(count|size)_(insert|update|delete)"),
}
# What a trigger may do: add to a total or subtract from it, for each row.
_TRIGGER: Final = re.compile(
    r"CREATE TRIGGER \w+ AFTER (INSERT|UPDATE|DELETE) ON Cache FOR EACH ROW BEGIN UPDATE Settings"
    r" SET value = value( [+-] (1|NEW\.size|OLD\.size))+ WHERE key = \"(count|size)\"; END"
)
_UPSERT: Final = (
    "INSERT INTO Cache(key, raw, store_time, access_time, access_count, size, mode, filename, value)"
    " VALUES (?, 1, ?, ?, 0, ?, ?, ?, ?) ON CONFLICT(key, raw) DO UPDATE SET store_time = excluded.store_time,"
    " expire_time = NULL, access_time = excluded.access_time, size = excluded.size, mode = excluded.mode,"
    " filename = excluded.filename, value = excluded.value"
)


class _Row(NamedTuple):
    """One row of the index, as found; `checked` before it is used."""

    key: str
    raw: int
    mode: int
    size: int
    filename: str | None
    value: bytes | None

    def checked(self) -> _Row:
        """This row, if it is one that `DiskStore` writes; raises UnsafeStoreError otherwise."""
        if self.mode == MODE_RAW:
            sound = self.filename is None and isinstance(self.value, bytes)
        else:
            sound = self.mode == MODE_BINARY and self.value is None and _is_value_name(self.filename)
        if not (sound and self.raw == 1 and _is_key(self.key) and type(self.size) is int and self.size >= 0):
            raise UnsafeStoreError(
                f"the store holds a row blockrag never writes (key {self.key!r:.80}, raw={self.raw!r:.20}, "
                f"mode={self.mode!r:.20}, file {self.filename!r:.80}); do not trust this directory, delete it"
            )
        return self


class _OpenValue(NamedTuple):
    """A value file, open for reading, and its length."""

    handle: int
    size: int


class _SafeDisk(diskcache.Disk):  # type: ignore[misc]
    """How diskcache writes and reads keys and values, without pickle and without leaving the directory."""

    def __init__(self, directory: str, min_file_size: int, pickle_protocol: int) -> None:
        super().__init__(directory, min_file_size=min_file_size, pickle_protocol=pickle_protocol)
        self._root: str = directory

    def put(self, key: Any) -> tuple[str, bool]:
        """The key as the index keeps it; raises InputError for anything but a block key."""
        return check_key(key), True

    def get(self, key: Any, raw: Any) -> str:
        """The key the index kept; raises UnsafeStoreError for pickled and foreign keys."""
        if raw != 1 or not _is_key(key):
            raise UnsafeStoreError(f"the store holds a foreign key {key!r:.80} (raw={raw!r:.20}); delete the directory")
        return str(key)

    def store(
        self, value: bytes | bytearray | memoryview, read: bool, key: Any = UNKNOWN
    ) -> tuple[int, int, str | None, memoryview | None]:
        """Write a value: (size, mode, file name, row value). The file is complete when this returns."""
        if read:
            raise InputError("a store keeps bytes, not streams; read the block first")
        view = byte_view(value)
        if len(view) < self.min_file_size:
            return len(view), MODE_RAW, None, view
        name, path = self.filename()
        try:
            self._write_file(path, view)
        except BaseException:
            self.remove(name)
            raise
        return len(view), MODE_BINARY, name, None

    def fetch(self, mode: int, filename: str | None, value: bytes | None, read: bool) -> memoryview:
        """A value for diskcache itself, as strict as `load`; one that cannot be read is an OSError, as it expects."""
        size = len(value) if isinstance(value, bytes) else None
        row = _Row("0" * 64, 1, mode, size or 0, filename, value).checked()
        found = self.load(row, size)
        if found is None:
            raise FileNotFoundError(filename)
        return found

    def load(self, row: _Row, size: int | None) -> memoryview | None:
        """The value of a checked row over a fresh buffer, or None where it is gone or not `size` bytes long."""
        if row.value is not None:
            return memoryview(bytearray(row.value)) if len(row.value) == size else None
        opened = self.open(row, size)
        return None if opened is None else _read(opened, _Buffer())

    def open(self, row: _Row, size: int | None) -> _OpenValue | None:
        """The open value file of a checked row, for `_read`; None as in `load`."""
        path = self._confined(row.filename or "")
        try:
            handle = os.open(path, _READ_FLAGS)
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("cannot open %s (%s); the block counts as missing", path, error)
            return None
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise UnsafeStoreError(f"{path} is not a regular file; do not trust this directory, delete it")
            if size is None or status.st_size == size:
                return _OpenValue(handle, status.st_size)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        return None

    def length(self, name: str) -> int | None:
        """Bytes of a value file without opening it; None where it is gone or no file of this store."""
        if not _is_value_name(name):
            return None
        try:
            status = os.lstat(os.path.join(self._root, name))  # noqa: PTH118 - called for every key
        except OSError:
            return None
        return status.st_size if stat.S_ISREG(status.st_mode) else None

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
        with contextlib.suppress(OSError):
            Path(path).unlink()

    def _confined(self, name: str) -> str:
        """The full path of a value file, once its name and its directory have been checked."""
        if _is_value_name(name):
            path = os.path.join(self._root, name)  # noqa: PTH118 - on the read path, where pathlib is slow
            parent = path[: -len(name) + 2]
            if os.path.realpath(parent) == parent and not os.path.islink(path):  # noqa: PTH114
                return path
        raise UnsafeStoreError(f"value file {name!r:.100} leads out of {self._root}; delete the directory")

    def _write_file(self, path: str, view: memoryview) -> None:
        parent = Path(path).parent
        parent.mkdir(mode=0o700, exist_ok=True)
        if os.path.realpath(parent) != str(parent):
            raise UnsafeStoreError(f"{parent} is a symbolic link; do not trust this directory, delete it")
        with os.fdopen(os.open(path, _CREATE_FLAGS, 0o600), "wb", buffering=0) as file:
            written = 0
            while written < len(view):
                written += file.write(view[written:])


class _Lease:
    """One thread's connection; closes it when the thread ends, where waiting for a collection would pile up handles."""

    __slots__ = ("__weakref__", "connection")

    def __init__(self, connection: sqlite3.Connection) -> None:
        self.connection = connection

    def __del__(self) -> None:
        self.connection.close()


class _SafeCache(diskcache.Cache):  # type: ignore[misc]
    """diskcache's index and transactions, over connections that this module configures.

    diskcache opens one SQLite connection per thread and process. Its own `_con` runs pragmas that it reads from the
    index, and leaves connections of other threads open when it is closed.
    """

    def __init__(self, directory: str) -> None:
        self._pid = os.getpid()
        self._inherited: list[_Lease] = []
        self._leases: weakref.WeakSet[_Lease] = weakref.WeakSet()
        super().__init__(directory, timeout=_BUSY_S, disk=_SafeDisk, **_SETTINGS)

    @property
    def _con(self) -> sqlite3.Connection:
        if self._pid != os.getpid():
            # After a fork the parent's connections must be neither used nor closed (sqlite.org/howtocorrupt.html).
            self._inherited = [*self._leases]
            self._pid, self._local, self._leases = os.getpid(), threading.local(), weakref.WeakSet()
        lease: _Lease | None = getattr(self._local, "lease", None)
        if lease is None:
            lease = self._local.lease = _Lease(_connect(self._directory))
            self._leases.add(lease)
        return lease.connection

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """Run one statement on this thread's connection."""
        return self._con.execute(statement, parameters)

    @contextlib.contextmanager
    def write(self) -> Iterator[Callable[[str | None], None]]:
        """A write transaction of this thread; yields the function that takes files to remove once it has committed."""
        try:
            with self._transact() as (_, discard):
                yield discard
        except (sqlite3.Error, diskcache.Timeout):
            # A failed COMMIT leaves the transaction open, and the next one could not begin.
            with contextlib.suppress(sqlite3.Error):
                self._con.rollback()
            raise

    def close(self) -> None:
        """Close this process's connections, those of other threads too."""
        if self._pid == os.getpid():
            for lease in list(self._leases):
                lease.connection.close()
            self._leases.clear()
            self._local.lease = None


class DiskStore:
    """A directory of encoded blocks. Implements `BlockStore`; threads and processes may share it.

    Args:
        path: The directory; created with its parents if it is not there. An existing one must be empty, or a store.
        max_bytes: Budget for the blocks' bytes; None for no limit. Each opener brings its own, the smallest rules.

    Raises:
        InputError: `max_bytes` is less than 1.
        StoreError: The directory is not a store, cannot be written, or its index is damaged.
        UnsafeStoreError: The directory's index holds what blockrag never puts there.
    """

    def __init__(self, path: str | os.PathLike[str], *, max_bytes: int | None = None) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes}; pass at least 1, or None for no limit")
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._write_lock = threading.Lock()
        self._used: OrderedDict[str, float] = OrderedDict()
        self._hits = self._misses = self._puts = self._evictions = 0
        self._closed = False
        self._root = _claim(Path(path))
        with self._translated("open"):
            _check_schema(self._root)
            self._cache = _SafeCache(str(self._root))
        self._disk: _SafeDisk = self._cache.disk
        try:
            self._adopt()
        except BaseException:
            self._cache.close()
            raise

    @property
    def url(self) -> str:
        """Where the store is, as an absolute `disk://` URL with its budget."""
        budget = "" if self._max_bytes is None else f"?max_bytes={self._max_bytes}"
        return f"disk://{quote(str(self._root))}{budget}"

    def get(self, key: str) -> memoryview | None:
        """The encoded block over a fresh buffer, or None; a value file that is missing or short counts as missing.

        Raises:
            InputError: A malformed key.
            UnsafeStoreError: The row is one blockrag never writes.
            StoreError: The store is closed, or its index is damaged.
        """
        check_key(key)
        previous: _Row | None = None
        while True:
            row = self._rows([key]).get(key)
            if row is None or row == previous:
                return self._count(key, row, None)
            value = self._disk.load(row, row.size)
            if value is not None:
                return self._count(key, row, value)
            # Between the lookup and the read another process may have replaced the block, and its file with it.
            previous = row

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order; the kernel reads up to four files ahead.

        Raises:
            InputError: A key comes twice or is malformed.
            UnsafeStoreError: A row is one blockrag never writes.
            StoreError: The store is closed, or its index is damaged.
        """
        if len(set(keys)) != len(keys):
            raise InputError(f"get_many got {len(keys)} keys, {len(set(keys))} distinct; pass each key once")
        for key in keys:
            check_key(key)
        return self._read_ahead(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store one encoded block, replacing the one under the same key, evicting just enough to keep the budget.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: `data` alone exceeds the budget, or the disk is full; what was stored before stays.
            StoreError: The store is closed, cannot be written, or its index is damaged.
        """
        check_key(key)
        view = byte_view(data)
        if self._max_bytes is not None and len(view) > self._max_bytes:
            raise StoreFullError(f"a block of {len(view)} bytes exceeds max_bytes={self._max_bytes}; raise max_bytes")
        with self._translated("write to"):
            size, mode, filename, value = self._disk.store(view, False)
            try:
                with self._write() as discard:
                    evicted = self._make_room(discard, key, size)
                    for (old,) in self._cache.execute("SELECT filename FROM Cache WHERE key = ? AND raw = 1", (key,)):
                        discard(old)
                    now = time.time()
                    self._cache.execute(_UPSERT, (key, now, now, size, mode, filename, value))
            except BaseException:
                if filename is not None:
                    self._disk.remove(filename)
                raise
        with self._lock:
            self._puts += 1
            self._evictions += evicted

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored; reads no block and does not count as a use.

        A block whose value file is gone or has another length is not stored: who asks in order to compute what is
        missing (ingestion) then replaces it.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed, or its index is damaged.
        """
        found: set[str] = set()
        with self._translated("read"):
            for chunk in _chunks({check_key(key) for key in keys}):
                query = f"SELECT key, size, filename FROM Cache WHERE raw = 1 AND key IN ({_marks(chunk)})"
                for key, size, filename in self._cache.execute(query, chunk):
                    if filename is None or self._disk.length(filename) == size:
                        found.add(key)
        return found

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks and their files; returns how many there were.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed, cannot be written, or its index is damaged.
        """
        with self._translated("write to"):
            return sum(self._delete(chunk) for chunk in _chunks({check_key(key) for key in keys}))

    def keys(self) -> Iterator[str]:
        """All keys in the index, in the order in which they were first stored.

        Raises:
            UnsafeStoreError: A row is one blockrag never writes.
            StoreError: The store is closed, or its index is damaged.
        """
        query = (
            "SELECT rowid, key, raw, mode, size, filename, CASE WHEN typeof(value) = 'blob' THEN x'' END"
            " FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?"
        )
        last = -1
        while True:
            with self._translated("read"):
                rows = self._cache.execute(query, (last, _ROWS_PER_QUERY)).fetchall()
            if not rows:
                return
            for rowid, *columns in rows:
                yield _Row(*columns).checked().key
                last = rowid

    def stats(self) -> StoreStats:
        """Counters: contents as all processes see them, traffic of this object.

        Raises:
            StoreError: The store is closed, or its index is damaged.
        """
        with self._translated("read"):
            blocks, total = self._total("count"), self._total("size")
        with self._lock:
            return StoreStats(
                blocks=blocks,
                bytes=total,
                max_bytes=self._max_bytes,
                hits=self._hits,
                misses=self._misses,
                puts=self._puts,
                evictions=self._evictions,
            )

    def sweep(self, *, older_than_s: float = 3600.0) -> int:
        """Remove value files that no row names, as killed writers leave them; runs at open, once a day at most.

        Args:
            older_than_s: Grace period. A younger file may belong to a writer that has not committed its row yet.

        Returns:
            How many files were removed.

        Raises:
            StoreError: The store is closed, or its index is damaged.
        """
        with self._translated("read"):
            # The files are listed before the index is asked: a row committed in between only saves its file.
            strays = set(_old_value_files(self._root, time.time() - older_than_s))
            for (name,) in self._cache.execute("SELECT filename FROM Cache WHERE filename IS NOT NULL"):
                strays.discard(name)
        for name in strays:
            self._disk.remove(name)
        if strays:
            _LOG.info("removed %d value files of unfinished writes from %s", len(strays), self._root)
        return len(strays)

    def close(self) -> None:
        """Write down what was used, and close; closing twice is fine."""
        if self._closed:
            return
        try:
            if self._used:
                with self._write():
                    pass
        except (sqlite3.Error, diskcache.Timeout) as error:
            _LOG.warning("the order of use was not saved to %s (%s)", self._root, error)
        finally:
            self._closed = True
            self._cache.close()

    def _adopt(self) -> None:
        """Bring an opened index in order: its totals, the budget, files of killed writers."""
        with self._translated("open"), self._write() as discard:
            self._cache.execute("CREATE INDEX IF NOT EXISTS Cache_use ON Cache (access_time, size)")
            for name, query in (("size", "COALESCE(SUM(size), 0)"), ("count", "COUNT(*)")):
                ((actual,),) = self._cache.execute(f"SELECT {query} FROM Cache")
                self._cache.execute("UPDATE Settings SET value = ? WHERE key = ?", (actual, name))
            self._evictions += self._make_room(discard, "", 0)
        with self._translated("open"):
            marker = self._root / _MARKER
            if time.time() - marker.stat().st_mtime > _SWEEP_EVERY_S:
                os.utime(marker)
                self.sweep()

    def _rows(self, keys: Sequence[str]) -> dict[str, _Row]:
        query = f"SELECT key, raw, mode, size, filename, value FROM Cache WHERE key IN ({_marks(keys)})"
        with self._translated("read"):
            rows = self._cache.execute(query, keys).fetchall()
        return {row.key: row for row in (_Row(*columns).checked() for columns in rows)}

    def _read_ahead(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        pending: deque[tuple[str, _Row | None, _OpenValue | None]] = deque()
        buffer = _Buffer()
        try:
            for chunk in _chunks(keys):
                rows = self._rows(chunk)
                for key in chunk:
                    row, opened = rows.get(key), None
                    if row is not None and row.filename is not None:
                        opened = self._disk.open(row, row.size)
                        _announce(opened)
                    pending.append((key, row, opened))
                    if len(pending) > _READ_AHEAD:
                        yield self._settle(*pending.popleft(), buffer)
            while pending:
                yield self._settle(*pending.popleft(), buffer)
        finally:
            for _, _, opened in pending:
                if opened is not None:
                    os.close(opened.handle)

    def _settle(
        self, key: str, row: _Row | None, opened: _OpenValue | None, buffer: _Buffer
    ) -> tuple[str, memoryview | None]:
        if row is None:
            return key, self._count(key, None, None)
        value = self._disk.load(row, row.size) if opened is None else _read(opened, buffer)
        return key, self.get(key) if value is None else self._count(key, row, value)

    def _count(self, key: str, row: _Row | None, value: memoryview | None) -> memoryview | None:
        """Note a hit or a miss; `row` without `value` is a damaged block."""
        if row is not None and value is None:
            _LOG.warning("block %s: its value is gone or short; the block counts as missing", key)
        with self._lock:
            if value is None:
                self._misses += 1
                return None
            self._hits += 1
            self._used[key] = time.time()
            self._used.move_to_end(key)
            if len(self._used) > _MAX_NOTED_USES:
                self._used.popitem(last=False)
            return value

    @contextlib.contextmanager
    def _write(self) -> Iterator[Callable[[str | None], None]]:
        """A write transaction that first notes what was used; one thread of this process at a time."""
        with self._write_lock, self._cache.write() as discard:
            with self._lock:
                used, self._used = self._used, OrderedDict()
            for key, when in used.items():
                self._cache.execute(
                    "UPDATE Cache SET access_time = ? WHERE key = ? AND raw = 1 AND access_time < ?", (when, key, when)
                )
            yield discard

    def _make_room(self, discard: Callable[[str | None], None], key: str, size: int) -> int:
        """Evict just enough for `size` bytes more under `key`; returns the number of blocks evicted."""
        if self._max_bytes is None:
            return 0
        ((replaced,),) = self._cache.execute("SELECT COALESCE(SUM(size), 0) FROM Cache WHERE key = ?", (key,))
        excess = self._total("size") - replaced + size - self._max_bytes
        victims: list[tuple[int, str | None]] = []
        if excess > 0:
            query = "SELECT rowid, size, filename FROM Cache WHERE key != ? ORDER BY access_time"
            for rowid, freed, filename in self._cache.execute(query, (key,)):
                if type(freed) is not int or freed < 0:
                    raise UnsafeStoreError(f"the store holds a row of {freed!r:.20} bytes; delete the directory")
                victims.append((rowid, filename))
                excess -= freed
                if excess <= 0:
                    break
            self._drop(victims, discard)
        return len(victims)

    def _delete(self, keys: Sequence[str]) -> int:
        query = f"SELECT rowid, filename FROM Cache WHERE raw = 1 AND key IN ({_marks(keys)})"
        try:
            with self._write() as discard:
                rows = self._cache.execute(query, keys).fetchall()
                self._drop(rows, discard)
            return len(rows)
        except (sqlite3.Error, diskcache.Timeout) as error:
            if not isinstance(_translate(error, self._root, "write to"), StoreFullError):
                raise
        # On a full disk the transaction has no room either. Removing the files first makes some; should it fail again,
        # their rows read as missing blocks.
        for _, filename in self._cache.execute(query, keys).fetchall():
            if filename is not None:
                self._disk.remove(filename)
        with self._write() as discard:
            rows = self._cache.execute(query, keys).fetchall()
            self._drop(rows, discard)
        return len(rows)

    def _drop(self, rows: Sequence[tuple[int, str | None]], discard: Callable[[str | None], None]) -> None:
        for rowid, filename in rows:
            self._cache.execute("DELETE FROM Cache WHERE rowid = ?", (rowid,))
            discard(filename)

    def _total(self, name: str) -> int:
        ((value,),) = self._cache.execute("SELECT value FROM Settings WHERE key = ?", (name,))
        return int(value)

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Turn what SQLite, diskcache and the file system raise into the store's own errors."""
        if self._closed:
            raise StoreError(f"the store {self.url} is closed; open it again with open_store()")
        try:
            yield
        except (sqlite3.Error, diskcache.Timeout, OSError) as error:
            raise _translate(error, self._root, doing) from error


def _is_key(key: object) -> bool:
    try:
        check_key(key)  # type: ignore[arg-type]
    except InputError:
        return False
    return True


def _is_value_name(name: object) -> bool:
    return isinstance(name, str) and _FILENAME.fullmatch(name) is not None


def _marks(keys: Sequence[str]) -> str:
    return ",".join("?" * len(keys))


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    iterator = iter(keys)
    while chunk := list(islice(iterator, _ROWS_PER_QUERY)):
        yield chunk


def _announce(opened: _OpenValue | None) -> None:
    """Have the kernel start reading a file that is wanted soon.

    Reading ahead in threads measured slower where files are in the page cache (3.5 against 2.0 ms for 16 MB: memory
    is faulted in by one thread and used by another), no faster where they are not, and holds several blocks.
    """
    if opened is not None and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened.handle, 0, 0, os.POSIX_FADV_WILLNEED)


class _Buffer:
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


def _read(opened: _OpenValue, buffer: _Buffer) -> memoryview | None:
    """The content of an open file, which is closed; None where it cannot be read or ends early."""
    view = buffer.take(opened.size)
    try:
        with io.FileIO(opened.handle) as file:
            done = 0
            while done < len(view):
                count = file.readinto(view[done:])
                if not count:
                    return None
                done += count
    except OSError as error:
        _LOG.warning("cannot read a value file (%s); the block counts as missing", error)
        return None
    return view


def _connect(directory: str) -> sqlite3.Connection:
    """A connection in autocommit mode; closing it from another thread is allowed, using it there is not done."""
    path = str(Path(directory) / DBNAME)
    connection = sqlite3.connect(path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection


def _claim(path: Path) -> Path:
    """Make `path` a store's directory, or see that it is one; returns it absolute, without links."""
    try:
        root = path.expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise StoreError(f"cannot open the store at {str(path)!r:.200}: {error}; choose another directory") from None
    if os.path.expandvars(root) != str(root):
        raise InputError(
            f"the store's path {root} holds a variable, which diskcache would replace; use one without '$'"
        )
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = os.listdir(root)  # noqa: PTH208 - names are all that is needed
        if _MARKER not in names:
            _refuse_foreign(root, names)
            with contextlib.suppress(FileExistsError):
                _create(root / _MARKER, _MARKER_TEXT)
        with contextlib.suppress(FileExistsError):
            # SQLite would create it readable by everybody; its journal files inherit these permissions.
            _create(root / DBNAME, b"")
        _restrict(root, 0o700)
        for name in (DBNAME, f"{DBNAME}-wal", f"{DBNAME}-shm"):
            with contextlib.suppress(FileNotFoundError):
                if not stat.S_ISREG((root / name).lstat().st_mode):
                    raise UnsafeStoreError(f"{root / name} is not a regular file; do not trust this directory")
                _restrict(root / name, 0o600)
    except OSError as error:
        raise _translate(error, root, "open") from error
    return root


def _refuse_foreign(root: Path, names: list[str]) -> None:
    other = [name for name in names if name.startswith(_MARKER[:-1])]
    if other:
        raise StoreError(f"{root} was written by another release of blockrag ({other[0]}); use that one, or a new path")
    if names:
        raise StoreError(f"{root} is not a blockrag store and holds {len(names)} other files; use an empty directory")


def _create(path: Path, content: bytes) -> None:
    with os.fdopen(os.open(path, _CREATE_FLAGS, 0o600), "wb", buffering=0) as file:
        file.write(content)


def _restrict(path: Path, mode: int) -> None:
    """Take all permissions from group and others; by path, as closing a second handle would drop SQLite's locks."""
    if path.stat().st_mode & 0o077:
        path.chmod(mode)


def _check_schema(root: Path) -> None:
    """Refuse an index with views, foreign tables, triggers or settings, before diskcache looks at it."""
    with contextlib.closing(_connect(str(root))) as connection:
        schema = connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        for kind, name, sql in schema:
            known = kind in _SCHEMA and _SCHEMA[kind].fullmatch(name) is not None
            if not known or (kind == "trigger" and not _TRIGGER.fullmatch(" ".join(sql.split()))):
                raise UnsafeStoreError(f"{root} holds a foreign {kind} {name!r:.80}; do not trust it, delete it")
        if any(name == "Settings" for _, name, _ in schema):
            names = {name for (name,) in connection.execute("SELECT key FROM Settings")}
            if names - _KNOWN_SETTINGS:
                unknown = sorted(map(repr, names - _KNOWN_SETTINGS))[0]
                raise UnsafeStoreError(f"{root} holds a foreign setting {unknown:.80}; do not trust it, delete it")


def _old_value_files(root: Path, before: float) -> Iterator[str]:
    """Names of value files last written before a point in time; follows no links."""
    with os.scandir(root) as folders:
        names = [entry.name for entry in folders if len(entry.name) == 2 and entry.is_dir(follow_symlinks=False)]
    for folder in names:
        with os.scandir(root / folder) as entries:
            for entry in entries:
                name = f"{folder}/{entry.name}"
                with contextlib.suppress(FileNotFoundError):
                    if _is_value_name(name) and entry.stat(follow_symlinks=False).st_mtime < before:
                        yield name


def _translate(error: BaseException, root: Path, doing: str) -> StoreError:
    """The error to raise for one from SQLite, diskcache or the file system, with what to do about it."""
    cause: BaseException = error
    # diskcache reports any failure to begin as a Timeout, and may fail to roll back what SQLite has rolled back
    # itself; the reason is what was being handled then.
    while cause.__context__ and (isinstance(cause, diskcache.Timeout) or "cannot rollback" in str(cause)):
        cause = cause.__context__
    text = str(cause) or type(cause).__name__
    prefix = f"cannot {doing} the store at {root}: {text}"
    if isinstance(cause, OSError):
        if cause.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            return StoreFullError(f"{prefix}; free disk space, or give the store a max_bytes")
        return StoreError(f"{prefix}; choose a directory that this user can write")
    if "full" in text or (doing == "write to" and "disk I/O" in text):
        return StoreFullError(f"{prefix}; free disk space, or give the store a max_bytes")
    if "locked" in text or "busy" in text:
        return StoreError(f"{prefix}; another process has held its lock for {_BUSY_S:.0f} s, look for one that hangs")
    if "readonly" in text or "unable to open" in text:
        return StoreError(f"{prefix}; choose a directory that this user can write")
    return StoreError(f"{prefix}; its index is damaged, delete the directory and ingest again")
