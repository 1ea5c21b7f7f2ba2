"""The index: diskcache's SQLite tables and transactions, over connections and a schema that this module holds to.

Settings and pragmas come from here, whatever the index brings along. An index that holds other tables or settings, or
views, or triggers that do anything but keep the totals, is refused before diskcache looks at it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

import diskcache
from diskcache.core import DBNAME, DEFAULT_SETTINGS, METADATA

from blockrag.errors import UnsafeStoreError
from blockrag.stores.disk.gate import Gate
from blockrag.stores.disk.rows import COLUMNS, Row
from blockrag.stores.disk.values import SafeDisk
from blockrag.stores.files import StoreFiles

__all__ = ["DBNAME", "Discard", "Index", "check_schema", "chunks", "marks"]

Discard = Callable[["str | None"], None]
"""Takes the name of a value file to remove once the transaction has committed; None is ignored."""

# Older builds of SQLite take 999 values in one query.
_ROWS_PER_QUERY: Final = 512
# With their values: a small one may have 32 KiB.
_VALUES_PER_QUERY: Final = 64
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
_TOTALS: Final = {"count": "COUNT(*)", "size": "COALESCE(SUM(size), 0)"}


class _Lease:
    """One thread's connection; closes it when the thread ends, where waiting for a collection would pile up handles.

    Args:
        connection: It.
        file: The number of the file that it is to.
    """

    __slots__ = ("__weakref__", "connection", "file")

    def __init__(self, connection: sqlite3.Connection, file: int) -> None:
        self.connection = connection
        self.file = file

    def __del__(self) -> None:
        self.connection.close()


class Index(diskcache.Cache):  # type: ignore[misc]
    """The rows of one directory, and the transactions that change them.

    diskcache opens one SQLite connection per thread and process. Its own `_con` runs pragmas that it reads from the
    index, and leaves connections of other threads open when it is closed.

    Args:
        directory: Absolute; it exists.
        files: The calls that may fail.
        gate: Of those that use it; one of its own by default.

    Raises:
        sqlite3.Error: The index cannot be read or written.
    """

    def __init__(self, directory: str, files: StoreFiles, gate: Gate | None = None) -> None:
        self._files = files
        self._gate = gate or Gate()
        self._closed = False
        self._pid = os.getpid()
        self._inherited: list[_Lease] = []
        self._leases: weakref.WeakSet[_Lease] = weakref.WeakSet()
        self._gate.before_forks(self._close_connections)
        try:
            with self._gate.at_work():
                super().__init__(directory, timeout=files.patience_s, disk=SafeDisk, **_SETTINGS)
        except (TypeError, ValueError, AttributeError) as error:
            # diskcache takes what it finds in the settings for what it wrote there; damaged pages hold anything.
            raise sqlite3.DatabaseError(f"its settings cannot be read ({error})") from error
        self.values.files = files

    @property
    def values(self) -> SafeDisk:
        """The value files that the rows name."""
        disk: SafeDisk = self._disk
        return disk

    @property
    def _con(self) -> sqlite3.Connection:
        if self._pid != os.getpid():
            # After a fork the parent's connections must be neither used nor closed (sqlite.org/howtocorrupt.html).
            self._inherited = [*self._leases]
            self._pid, self._local, self._leases = os.getpid(), threading.local(), weakref.WeakSet()
        lease: _Lease | None = getattr(self._local, "lease", None)
        if lease is None:
            if self._closed:
                raise sqlite3.ProgrammingError("the index is closed")
            # Should it be replaced in between, the first transaction goes over to the other.
            file = self._file()
            lease = self._local.lease = _Lease(_connect(self._directory, self._files), file)
            self._leases.add(lease)
        return lease.connection

    @property
    def _sql(self) -> Callable[..., sqlite3.Cursor]:
        return functools.partial(self._files.execute, self._con)

    def fetch(self, statement: str, parameters: Sequence[object] = ()) -> list[Any]:
        """Run one statement on this thread's connection; returns all rows that it gives."""
        with self._gate.at_work():
            return self._files.execute(self._con, statement, parameters).fetchall()

    def execute(self, statement: str, parameters: Sequence[object] = ()) -> sqlite3.Cursor:
        """The same, row by row: for use within a transaction, as a fork does not wait for it otherwise."""
        return self._files.execute(self._con, statement, parameters)

    @contextlib.contextmanager
    def write(self) -> Iterator[Discard]:
        """A write transaction of this thread; yields the function that takes files to remove once it has committed."""
        with self._gate.at_work():
            self.follow()
            try:
                with self._transact() as (_, discard):
                    yield discard
            except BaseException:
                self._end_transaction()
                raise

    def follow(self) -> None:
        """Go over to the index that took this one's place, if somebody has written it anew.

        SQLite would go on with the old one, whose rows say nothing about the files of blocks written since.

        Raises:
            OSError: There is none.
        """
        lease: _Lease | None = getattr(self._local, "lease", None)
        if lease is not None and lease.file != self._file():
            self.close()

    def rows(self, keys: Sequence[str]) -> dict[str, Row]:
        """The rows of some keys, with their values where those are in the row.

        Raises:
            UnsafeStoreError: A row is one blockrag never writes.
        """
        query = f"SELECT key, raw, mode, size, filename, value FROM Cache WHERE key IN ({marks(keys)})"
        return {row.key: row for row in (Row(*columns).checked() for columns in self.fetch(query, keys))}

    def row_at(self, rowid: int) -> Row | None:
        """The row of an id, unchecked, without the bytes of its value."""
        found = self.fetch(f"SELECT {COLUMNS} FROM Cache WHERE rowid = ?", (rowid,))
        return Row(*found[0]) if found else None

    def every(self, columns: str) -> Iterator[list[tuple[Any, ...]]]:
        """Some columns of all rows, the row's id first, some rows at a time, so that rows may be changed in between.

        Raises:
            sqlite3.DatabaseError: The rows of a damaged index do not ascend; going on would go round in circles.
        """
        query = f"SELECT rowid, {columns} FROM Cache WHERE rowid > ? ORDER BY rowid LIMIT ?"
        last = -(2**63)
        while rows := self.fetch(query, (last, _ROWS_PER_QUERY)):
            for rowid, *_ in rows:
                if rowid <= last:
                    raise sqlite3.DatabaseError(f"its rows are out of order at {rowid}")
                last = rowid
            yield rows

    def put(self, row: Row, value: memoryview | None, when: float) -> None:
        """Insert a row, or replace the one of its key; `value` is what is kept in the row."""
        self.execute(_UPSERT, (row.key, when, when, row.size, row.mode, row.filename, value))

    def note_uses(self, uses: Mapping[str, float]) -> None:
        """Write down when blocks were used last, unless they are known to have been used since."""
        statement = "UPDATE Cache SET access_time = ? WHERE key = ? AND raw = 1 AND access_time < ?"
        for key, when in uses.items():
            self.execute(statement, (when, key, when))

    def drop(self, rows: Iterable[tuple[int, str | None]], discard: Discard) -> None:
        """Delete rows by id, and have their files removed."""
        for rowid, filename in rows:
            self.execute("DELETE FROM Cache WHERE rowid = ?", (rowid,))
            discard(filename)

    def total(self, name: str) -> int:
        """The `count` of blocks, or the `size` of all in bytes, as the index keeps them."""
        kept = self.kept(name)
        if type(kept) is not int:
            raise sqlite3.DatabaseError(f"its {name} is {kept!r:.80}")
        return kept

    def kept(self, name: str) -> object:
        """What stands where that total should be."""
        found = self.fetch("SELECT value FROM Settings WHERE key = ?", (name,))
        return found[0][0] if found else None

    def counted(self, name: str) -> int:
        """The same, counted row by row."""
        ((value,),) = self.fetch(f"SELECT {_TOTALS[name]} FROM Cache")
        return int(value)

    def count_again(self) -> None:
        """Set both totals to what is counted."""
        for name in _TOTALS:
            self.execute("INSERT OR REPLACE INTO Settings VALUES (?, ?)", (name, self.counted(name)))

    def named(self, filenames: Sequence[str]) -> set[str]:
        """Those of some value files that a row names."""
        query = f"SELECT filename FROM Cache WHERE filename IN ({marks(filenames)})"
        return {name for (name,) in self.fetch(query, filenames)}

    def close(self) -> None:
        """Close this thread's connection; if it goes on, it gets a new one."""
        lease: _Lease | None = getattr(self._local, "lease", None)
        if lease is not None:
            with self._gate.at_work():
                lease.connection.close()
                self._local.lease = None

    def close_for_good(self) -> None:
        """Close all connections, those of other threads too, once these are done with their work; open no others."""
        with self._gate.at_rest():
            self._closed = True
            self._close_connections()

    def _close_connections(self) -> None:
        if self._pid == os.getpid():
            for lease in list(self._leases):
                lease.connection.close()
            self._leases, self._local = weakref.WeakSet(), threading.local()

    def _file(self) -> int:
        return self._files.status_of(f"{self._directory}/{DBNAME}").st_ino

    def _end_transaction(self) -> None:
        """Leave no transaction open: a failed COMMIT does, and the next one could not begin."""
        lease: _Lease | None = getattr(self._local, "lease", None)
        try:
            if lease is not None and lease.connection.in_transaction:
                lease.connection.rollback()
        except sqlite3.Error:
            # Nor does closing it commit anything; the thread gets another connection.
            self._local.lease = None


def check_schema(directory: str, files: StoreFiles, gate: Gate) -> None:
    """Refuse an index with views, foreign tables, triggers or settings.

    Args:
        directory: Absolute; it exists.
        files: The calls that may fail.
        gate: Of those that will use it.

    Raises:
        UnsafeStoreError: It holds one of them.
        sqlite3.Error: It cannot be read.
    """
    with gate.at_work(), contextlib.closing(_connect(directory, files)) as connection:
        schema = files.execute(connection, "SELECT type, name, sql FROM sqlite_master").fetchall()
        for kind, name, sql in schema:
            known = kind in _SCHEMA and _SCHEMA[kind].fullmatch(name) is not None
            if not known or (kind == "trigger" and not _TRIGGER.fullmatch(" ".join(sql.split()))):
                raise UnsafeStoreError(f"{directory} holds a foreign {kind} {name!r:.80}; do not trust it, delete it")
        if any(name == "Settings" for _, name, _ in schema):
            names = {name for (name,) in files.execute(connection, "SELECT key FROM Settings")}
            if names - _KNOWN_SETTINGS:
                unknown = sorted(map(repr, names - _KNOWN_SETTINGS))[0]
                raise UnsafeStoreError(f"{directory} holds a foreign setting {unknown:.80}; do not trust it, delete it")


def marks(values: Sequence[object]) -> str:
    """Placeholders for the values of an IN (...)."""
    return ",".join("?" * len(values))


def chunks(keys: Iterable[str], *, with_values: bool = False) -> Iterator[list[str]]:
    """The keys, or file names, in portions of what one query takes; fewer where it brings the values."""
    iterator = iter(keys)
    while chunk := list(islice(iterator, _VALUES_PER_QUERY if with_values else _ROWS_PER_QUERY)):
        yield chunk


def _connect(directory: str, files: StoreFiles) -> sqlite3.Connection:
    connection = files.connect(str(Path(directory) / DBNAME))
    try:
        for pragma in _PRAGMAS:
            files.execute(connection, f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection
