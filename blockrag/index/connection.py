"""The connection to a SQLite file: transactions, statements, and what SQLite says in blockrag's words.

It owns the lock, the file's identity, and the suspicion that a file is not what was written: results may be asked for
by type and by order, and are bounded by the size of the file. It knows no table.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from blockrag.errors import InputError, PassageIndexError
from blockrag.index.schema import connect
from blockrag.index.vectors import Rows

__all__ = ["VALUES_AT_ONCE", "Connection"]

VALUES_AT_ONCE = 900
"""The most values that are bound at once: SQLite before 3.32 takes 999."""

_PAGE_ROWS = 512
_ROWS_AT_ONCE = 1 << 16


class Connection:
    """One SQLite connection, guarded by a lock: any thread may use it.

    Args:
        path: The database file, made when it is missing; None for memory.

    Raises:
        PassageIndexError: The file cannot be opened, is no database, or is cut.
    """

    def __init__(self, path: Path | None) -> None:
        self._where = str(path) if path is not None else "the index in memory"
        self._path = path
        self._lock = threading.RLock()
        self._file: tuple[int, int] | None = None
        with self._translated():
            try:
                self._sqlite = connect(path)
            except OSError as error:
                raise PassageIndexError(f"{path} cannot be opened ({error}); pass another directory") from error
        if path is None:
            return
        try:
            self._refuse_cut(path)
            self.run("PRAGMA journal_mode = WAL")
        except BaseException:
            self._sqlite.close()
            raise
        self._file = _identity(path)

    def _refuse_cut(self, path: Path) -> None:
        """Refuse a file whose last page is cut: SQLite misses whole pages that are gone, and fills up half a page.

        By its length alone: closing a second handle would drop the locks of every other connection of this process.
        """
        ((page_size,),) = self.run("PRAGMA page_size")
        try:
            log = path.with_name(path.name + "-wal")
            if log.exists() and log.stat().st_size:
                return  # a checkpoint may be writing
            size = path.stat().st_size % page_size
        except OSError as error:
            raise PassageIndexError(f"{path} cannot be read ({error}); check its permissions") from error
        if size:
            raise self.damaged(f"its last page ends after {size} of {page_size} bytes")

    @property
    def where(self) -> str:
        """The file, or that it is in memory, for messages."""
        return self._where

    def close(self) -> None:
        """Close the connection; the last one folds the write-ahead log into the file."""
        with self._lock:
            self._sqlite.close()

    # -- errors -------------------------------------------------------------------------------------------------------

    def damaged(self, what: str) -> PassageIndexError:
        """The error to raise where the file is not what was written."""
        return PassageIndexError(
            f"{self._where} is damaged ({what}); restore it from a backup, or delete its directory and ingest the "
            "documents again"
        )

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """SQLite's errors as blockrag's, with the file and the next step."""
        try:
            yield
        except sqlite3.ProgrammingError as error:
            raise PassageIndexError(f"{self._where} is closed; open the index again ({error})") from error
        except sqlite3.DataError as error:
            raise InputError(f"a text or id is too big for the passage database ({error}); split it") from error
        except sqlite3.OperationalError as error:
            if "decode" in str(error):
                # What SQLite says quotes the text.
                raise self.damaged("a text in it is not UTF-8") from None
            raise PassageIndexError(
                f"{self._where}: {error}; another process may hold it, or the directory may be missing, full or "
                "read-only: free it and try again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self.damaged(str(error)) from error
        except UnicodeDecodeError as error:
            # Python cannot read what SQLite says, which quotes the file.
            raise self.damaged("its schema is not UTF-8") from error

    def check_ascending(self, rows: Rows) -> None:
        """See that row numbers ascend.

        Raises:
            PassageIndexError: They do not: the file is damaged.
        """
        if len(rows) > 1 and not (rows[1:] > rows[:-1]).all():
            raise self.damaged("its rows are not in order")

    # -- transactions and statements ----------------------------------------------------------------------------------

    @contextmanager
    def transaction(self, *, writing: bool = True) -> Iterator[None]:
        """One transaction: all of it is committed at the end, or nothing when an exception leaves the block.

        Reading inside a transaction joins it.

        Raises:
            PassageIndexError: The file is damaged, locked or closed, or, when writing, is not there any more.
        """
        with self._lock:
            if writing and self._path is not None and _identity(self._path) != self._file:
                # SQLite goes on writing to a file that nobody will find again.
                raise PassageIndexError(
                    f"{self._where} was deleted or replaced while it was open, and what is written would be lost; "
                    "close it and open it again"
                )
            with self._translated():
                joins = not writing and self._sqlite.in_transaction
            if joins:
                yield
                return
            self.run("BEGIN IMMEDIATE" if writing else "BEGIN")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                if self._sqlite.in_transaction:
                    self._sqlite.execute("ROLLBACK")
                raise

    def run(self, sql: str, values: Sequence[object] = (), types: tuple[type, ...] = ()) -> list[Any]:
        """All results of a statement; with `types`, each of exactly these.

        SQLite keeps any type in any column, and a damaged page can be reached twice: what comes back is not taken for
        what was written.
        """
        results: list[Any] = []
        with self._lock, self._translated():
            cursor = self._sqlite.execute(sql, values)
            while some := cursor.fetchmany(_ROWS_AT_ONCE):
                results += some
                if len(results) > _ROWS_AT_ONCE and len(results) > self.size_bytes():
                    cursor.close()
                    raise self.damaged(f"it holds more than {len(results)} rows")
        if types:
            for row in results:
                if tuple(map(type, row)) != types:
                    raise self.damaged(f"a row holds {row!r:.100}")
        return results

    def run_many(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        """Run a statement once for each of `values`."""
        with self._lock, self._translated():
            self._sqlite.executemany(sql, values)

    def run_with_list(self, sql: str, values: Collection[object], types: tuple[type, ...] = ()) -> list[Any]:
        """All results of `sql`, whose "(?)" stands for a list of any length."""
        results: list[Any] = []
        pending = list(values)
        with self._lock:
            for start in range(0, len(pending), VALUES_AT_ONCE):
                some = pending[start : start + VALUES_AT_ONCE]
                results += self.run(sql.replace("(?)", f"({','.join('?' * len(some))})"), some, types)
        return results

    def insert(self, sql: str, values: Sequence[object]) -> int:
        """Run a statement that inserts one row; returns the row's number."""
        with self._lock, self._translated():
            return self._sqlite.execute(sql, values).lastrowid or 0

    def row_numbers(self, sql: str) -> Rows:
        """The results of a statement that selects row numbers in ascending order.

        Raises:
            PassageIndexError: They do not ascend: the file is damaged.
        """
        pieces: list[Rows] = [np.zeros(1, dtype=np.int64)]
        with self._lock, self._translated():
            cursor = self._sqlite.execute(sql)
            while some := cursor.fetchmany(_ROWS_AT_ONCE):
                pieces.append(np.fromiter((row for (row,) in some), dtype=np.int64, count=len(some)))
                # A page that is reached twice would be read for ever.
                self.check_ascending(np.concatenate([pieces[-2][-1:], pieces[-1]]))
        return np.concatenate(pieces)[1:]

    def pages(self, sql: str) -> Iterator[list[Any]]:
        """The results of a statement, a page at a time, without holding the lock between pages.

        Args:
            sql: Selects a row number first, greater than "?", and is ordered by it.

        Raises:
            PassageIndexError: The row numbers do not ascend: the file is damaged.
        """
        last = 0
        while page := self.run(f"{sql} LIMIT {_PAGE_ROWS}", (last,)):
            # In a damaged file the way could lead back, and go on for ever.
            self.check_ascending(np.array([last, *(row for row, *_ in page)], dtype=np.int64))
            last = page[-1][0]
            yield page

    # -- the file -----------------------------------------------------------------------------------------------------

    def size_bytes(self) -> int:
        """Bytes of all database pages."""
        (pages,), (size,) = self.run("PRAGMA page_count")[0], self.run("PRAGMA page_size")[0]
        return int(pages * size)

    def copy_to(self, path: Path) -> None:
        """Make the file at `path` a copy of this database, whatever it held; a crash leaves what it held.

        Raises:
            PassageIndexError: The file cannot be written, or is open elsewhere.
        """
        try:
            with self._lock, closing(connect(path)) as target:
                # Refused while anybody has the file open, who would take the copy's rows for those of the same numbers.
                target.execute("PRAGMA journal_mode = DELETE")
                self._sqlite.backup(target)
        except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
            raise PassageIndexError(
                f"{self._where} cannot be copied to {path} ({error}); check that the disk has room and nobody uses it"
            ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a file from any other that has its name later; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino
