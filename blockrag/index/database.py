"""The truth of a passage index: one SQLite file, written in transactions.

It owns the tables, and what must change together with them: embeddings, block keys, document hashes, the facts that
`where` filters look up, term counts, and the stamp that names the state of the vectors. Rows are numbered by
AUTOINCREMENT and never used twice, and a row's embedding never changes; so two states differ exactly by the rows they
hold, and whoever follows the database (the FAISS side, here or in another process) catches up by comparing row
numbers. Nothing here knows encoders or FAISS.

Security: a file is data from outside. Its schema must be exactly the one of `schema`, every value is bound, nothing is
pickled, and what is read has the types and the order that were written, or the file is damaged. Passages and vectors
carry checksums, because SQLite's pages do not; they find accidents, not forgers.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import sqlite3
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from blockrag.encoders.protocol import Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index.records import DocumentInfo
from blockrag.index.schema import OLDER, SCHEMA_VERSION, TABLES, connect, schema_problem
from blockrag.index.vectors import Rows
from blockrag.passage import Passage

__all__ = ["SUPERSEDED", "PassageDatabase", "StoredPassage", "TermCounts", "encode_metadata", "fact_digests", "peek"]

SUPERSEDED = "superseded"
"""The fingerprint under which a document's mark lies among its content hashes: no fingerprint is this word, and
directories written before there were marks stay readable."""

# SQLite before 3.32 binds at most 999 values.
_VALUES_AT_ONCE = 900
_PAGE_ROWS = 512
_ROWS_AT_ONCE = 1 << 16
# The fields of `StoredPassage`, and their checksum.
_PASSAGES = """SELECT row, ordinal, id, title, text, metadata, document_id, digest.passage
               FROM passage LEFT JOIN digest USING (row)"""
_CANONICAL: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}


@dataclass(frozen=True, slots=True)
class StoredPassage:
    """A passage as it lies in the database: its row, its place in the document, and its metadata as JSON."""

    row: int
    ordinal: int
    id: str
    title: str
    text: str
    metadata: str
    document_id: str


def peek(path: Path) -> tuple[str, int] | None:
    """Encoder name and dimension of the database at `path`, read without an encoder; None when there is none yet.

    Raises:
        PassageIndexError: The file cannot be read, or is not a passage index.
    """
    try:
        if not path.exists() or not path.stat().st_size:
            return None
        with closing(connect(path)) as connection:
            problem = schema_problem(connection)
            if problem and problem != OLDER:
                raise ValueError(f"it {problem}")
            if problem == "":
                return None  # another process is about to create it
            facts = dict(connection.execute("SELECT name, value FROM meta WHERE name IN ('encoder', 'dimension')"))
        dimension = int(facts["dimension"])
        if not 0 < dimension < 1 << 31:
            raise ValueError(f"its vectors have {dimension} dimensions")
        return str(facts["encoder"]), dimension
    except (OSError, sqlite3.Error, KeyError, TypeError, ValueError) as error:
        raise PassageIndexError(
            f"{path} is no passage index ({error!s:.300}); pass another directory, or delete it and ingest the "
            "documents again"
        ) from error


def _identity(path: Path) -> tuple[int, int] | None:
    """Tells a file from any other that has its name later; None when there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


class PassageDatabase:
    """The SQLite side of one passage index; one connection, guarded by a lock.

    Args:
        path: The database file, or None for memory.
        encoder: Name of the encoder whose vectors it holds.
        dimension: Length of those vectors.

    Raises:
        PassageIndexError: The file is damaged, is not a passage index, or belongs to another encoder or format.
    """

    def __init__(self, path: Path | None, *, encoder: str, dimension: int) -> None:
        self._where = str(path) if path is not None else "the index in memory"
        self._path = path
        self._dimension = dimension
        self._lock = threading.RLock()
        self._file: tuple[int, int] | None = None
        with self._translated():
            try:
                self._connection = connect(path)
            except OSError as error:
                raise PassageIndexError(f"{path} cannot be opened ({error}); pass another directory") from error
        try:
            self._prepare(encoder)
        except BaseException:
            self._connection.close()
            raise

    # -- opening and closing ------------------------------------------------------------------------------------------

    def _prepare(self, encoder: str) -> None:
        if self._path is not None:
            self._refuse_cut(self._path)
            self.run("PRAGMA journal_mode = WAL")
            self._file = _identity(self._path)
        with self.transaction():
            with self._translated():
                problem = schema_problem(self._connection)
            if problem == "":
                self._create(encoder)
                return
            if problem == OLDER and self._meta("schema") == "1":
                self._add_digests()
            elif problem:
                raise PassageIndexError(f"{self._where} is no passage index ({problem}); pass another directory")
            self._check_meta(encoder)

    def _create(self, encoder: str) -> None:
        for sql in TABLES.values():
            self.run(sql)
        facts = {"schema": SCHEMA_VERSION, "encoder": encoder, "dimension": str(self._dimension), "stamp": "0:new"}
        self.run_many("INSERT INTO meta VALUES (?, ?)", facts.items())

    def _add_digests(self) -> None:
        """Make a database of format 1 one of format 2; what it holds is taken to be sound."""
        self.run(TABLES["digest"])
        sql = """SELECT passage.row, ordinal, id, title, text, metadata, document_id, vector
                 FROM passage LEFT JOIN embedding USING (row) WHERE row IN (?)"""
        for rows in self.passage_rows():
            found = self.run_with_list(sql, rows)
            digests = [(row, _digest(row, *passage), _digest(row, vector)) for row, *passage, vector in found]
            self.run_many("INSERT INTO digest VALUES (?, ?, ?)", digests)
        self.run("UPDATE meta SET value = ? WHERE name = 'schema'", (SCHEMA_VERSION,))

    def _check_meta(self, encoder: str) -> None:
        schema, name, dimension = (self._meta(key) for key in ("schema", "encoder", "dimension"))
        if schema != SCHEMA_VERSION:
            raise PassageIndexError(
                f"{self._where} has format {schema:.20}, this blockrag reads format {SCHEMA_VERSION}; open it with the "
                "release that wrote it, or ingest the documents into a new directory"
            )
        if (name, dimension) != (encoder, str(self._dimension)):
            raise PassageIndexError(
                f"{self._where} was built with encoder {name!r:.200} ({dimension:.20} dimensions), not {encoder!r} "
                f"({self._dimension}); open it with that encoder, or ingest the documents into a new directory"
            )

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
            raise self._damaged(f"its last page ends after {size} of {page_size} bytes")

    def close(self) -> None:
        """Close the connection; the last one folds the write-ahead log into the file."""
        with self._lock:
            self._connection.close()

    # -- running statements -------------------------------------------------------------------------------------------

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
                joins = not writing and self._connection.in_transaction
            if joins:
                yield
                return
            self.run("BEGIN IMMEDIATE" if writing else "BEGIN")
            try:
                yield
                self.run("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

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
                raise self._damaged("a text in it is not UTF-8") from None
            raise PassageIndexError(
                f"{self._where}: {error}; another process may hold it, or the directory may be missing, full or "
                "read-only: free it and try again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error
        except UnicodeDecodeError as error:
            # Python cannot read what SQLite says, which quotes the file.
            raise self._damaged("its schema is not UTF-8") from error

    def _damaged(self, what: str) -> PassageIndexError:
        return PassageIndexError(
            f"{self._where} is damaged ({what}); restore it from a backup, or delete its directory and ingest the "
            "documents again"
        )

    def run(self, sql: str, values: Sequence[object] = (), types: tuple[type, ...] = ()) -> list[Any]:
        """All results of a statement, for this room and its check; with `types`, each of exactly these.

        SQLite keeps any type in any column, and a damaged page can be reached twice: what comes back is not taken for
        what was written.
        """
        results: list[Any] = []
        with self._lock, self._translated():
            cursor = self._connection.execute(sql, values)
            while some := cursor.fetchmany(_ROWS_AT_ONCE):
                results += some
                if len(results) > _ROWS_AT_ONCE and len(results) > self.size_bytes():
                    cursor.close()
                    raise self._damaged(f"it holds more than {len(results)} rows")
        if types:
            for row in results:
                if tuple(map(type, row)) != types:
                    raise self._damaged(f"a row holds {row!r:.100}")
        return results

    def run_many(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        """Run a statement once for each of `values`."""
        with self._lock, self._translated():
            self._connection.executemany(sql, values)

    def run_with_list(self, sql: str, values: Collection[object], types: tuple[type, ...] = ()) -> list[Any]:
        """All results of `sql`, whose "(?)" stands for a list of any length."""
        results: list[Any] = []
        pending = list(values)
        with self._lock:
            for start in range(0, len(pending), _VALUES_AT_ONCE):
                some = pending[start : start + _VALUES_AT_ONCE]
                results += self.run(sql.replace("(?)", f"({','.join('?' * len(some))})"), some, types)
        return results

    def _meta(self, name: str) -> str:
        rows = self.run("SELECT value FROM meta WHERE name = ?", (name,), (str,))
        if not rows:
            raise self._damaged(f"it lacks {name!r}")
        return str(rows[0][0])

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def stamp(self) -> str:
        """Names the state of the vectors: a counter and a random token, so that no two histories share a stamp."""
        return self._meta("stamp")

    def rows(self) -> Rows:
        """All rows, ascending.

        Raises:
            PassageIndexError: They are not: the file is damaged.
        """
        pieces: list[Rows] = [np.zeros(1, dtype=np.int64)]
        with self._lock, self._translated():
            cursor = self._connection.execute("SELECT row FROM embedding ORDER BY row")
            while some := cursor.fetchmany(_ROWS_AT_ONCE):
                pieces.append(np.fromiter((row for (row,) in some), dtype=np.int64, count=len(some)))
                # A page that is reached twice would be read for ever.
                self._check_ascending(np.concatenate([pieces[-2][-1:], pieces[-1]]))
        return np.concatenate(pieces)[1:]

    def _check_ascending(self, rows: Rows) -> None:
        if len(rows) > 1 and not (rows[1:] > rows[:-1]).all():
            raise self._damaged("its rows are not in order")

    def count(self) -> tuple[int, int]:
        """Numbers of passages and of documents."""
        (counts,) = self.run("SELECT (SELECT count(*) FROM passage), (SELECT count(*) FROM document)")
        return int(counts[0]), int(counts[1])

    def size_bytes(self) -> int:
        """Bytes of all database pages."""
        (pages,), (size,) = self.run("PRAGMA page_count")[0], self.run("PRAGMA page_size")[0]
        return int(pages * size)

    def embeddings(self, rows: Rows) -> tuple[Rows, Vectors]:
        """Those of `rows` that are there, ascending, with their vectors `[n, dimension]` float32."""
        wanted = 4 * self._dimension
        # The length is known without reading the vector, which in a damaged file could be as long as the file.
        sql = f"""SELECT row, CASE WHEN typeof(embedding.vector) = 'blob' AND length(embedding.vector) = {wanted}
                              THEN embedding.vector END, digest.vector
                  FROM embedding LEFT JOIN digest USING (row) WHERE row IN (?)"""
        found = sorted(self.run_with_list(sql, rows.tolist()), key=lambda pair: pair[0])
        for row, vector, digest in found:
            if vector is None:
                raise self._damaged(f"the embedding of row {row} is not {wanted} bytes long")
            if _digest(row, vector) != digest:
                raise self._damaged(f"the embedding of row {row} fails its checksum")
        matrix = np.frombuffer(b"".join(vector for _, vector, _ in found), dtype="<f4").reshape(-1, self._dimension)
        numbers = np.array([row for row, *_ in found], dtype=np.int64)
        self._check_ascending(numbers)
        if not np.isfinite(matrix).all():
            row = numbers[int(np.argmin(np.isfinite(matrix).all(axis=1)))]
            raise self._damaged(f"the embedding of row {row} is not finite")
        return numbers, matrix.astype(np.float32, copy=False)

    def embedding_chunks(self, rows: Rows) -> Iterator[tuple[Rows, Vectors]]:
        """`embeddings` in chunks of bounded size."""
        for start in range(0, len(rows), _VALUES_AT_ONCE):
            yield self.embeddings(rows[start : start + _VALUES_AT_ONCE])

    def passages_at(self, rows: Collection[int]) -> dict[int, Passage]:
        """The passages of `rows`, by row; rows that are gone are left out."""
        found = self._checked(self.run_with_list(f"{_PASSAGES} WHERE row IN (?)", rows))
        return {stored.row: self._passage(stored) for stored in found}

    def passage(self, passage_id: str) -> Passage | None:
        """The passage of this id."""
        found = self.stored_passages([passage_id])
        return self._passage(found[0]) if found else None

    def passages(self, document_id: str | None) -> Iterator[Passage]:
        """A document's passages in order, or all passages by row; read a page at a time, without holding the lock."""
        if document_id is not None:
            yield from map(self._passage, self.stored(document_id))
            return
        for page in self._pages(f"{_PASSAGES} WHERE row > ? ORDER BY row LIMIT {_PAGE_ROWS}"):
            yield from map(self._passage, self._checked(page))

    def passage_rows(self) -> Iterator[list[int]]:
        """The rows of all passages, a page at a time."""
        for page in self._pages(f"SELECT row FROM passage WHERE row > ? ORDER BY row LIMIT {_PAGE_ROWS}"):
            yield [row for (row,) in page]

    def _pages(self, sql: str) -> Iterator[list[Any]]:
        """The results of a statement that goes on behind the row which it is given, and begins each with a row."""
        last = 0
        while page := self.run(sql, (last,)):
            # In a damaged file the way could lead back, and go on for ever.
            self._check_ascending(np.array([last, *(row for row, *_ in page)], dtype=np.int64))
            last = page[-1][0]
            yield page

    def _checked(self, found: list[Any]) -> list[StoredPassage]:
        """What `_PASSAGES` selects, if it is what was written."""
        for *columns, digest in found:
            if tuple(map(type, columns)) != (int, int, str, str, str, str, str):
                raise self._damaged(f"a row holds {columns!r:.100}")
            if _digest(*columns) != digest:
                raise self._damaged(f"passage {columns[2]!r:.200} fails its checksum")
        return [StoredPassage(*columns) for *columns, _ in found]

    def _passage(self, stored: StoredPassage) -> Passage:
        try:
            facts = json.loads(stored.metadata)
            if not isinstance(facts, dict):
                raise ValueError(f"a {type(facts).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            raise self._damaged(f"the metadata of passage {stored.id!r:.200} is not JSON") from error
        try:
            return Passage(stored.id, stored.text, stored.title, stored.document_id, facts)
        except InputError as error:
            raise self._damaged(f"passage {stored.id!r:.200} cannot be: {error}") from error

    def stored(self, document_id: str) -> list[StoredPassage]:
        """A document's passages with their rows, in order."""
        return self._checked(self.run(f"{_PASSAGES} WHERE document_id = ? ORDER BY ordinal, row", (document_id,)))

    def stored_passages(self, passage_ids: Collection[str]) -> list[StoredPassage]:
        """Those of these passages that are there, in no particular order."""
        return self._checked(self.run_with_list(f"{_PASSAGES} WHERE id IN (?)", passage_ids))

    def rows_of(self, passage_ids: Collection[str]) -> dict[str, tuple[int, str]]:
        """Row and document of each of these passages that is there."""
        sql = "SELECT id, row, document_id FROM passage WHERE id IN (?)"
        found = self.run_with_list(sql, passage_ids, (str, int, str))
        return {id: (row, document_id) for id, row, document_id in found}

    def documents(self) -> list[DocumentInfo]:
        """All documents by id."""
        sql = """SELECT document.id, (SELECT count(*) FROM passage WHERE document_id = document.id),
                        coalesce((SELECT content_hash FROM document_hash
                                  WHERE document_id = document.id AND fingerprint = ''), '')
                 FROM document ORDER BY document.id"""
        return [DocumentInfo(*columns) for columns in self.run(sql, (), (str, int, str))]

    def document_hash(self, document_id: str, fingerprint: str) -> str | None:
        """The content hash recorded for a document under a fingerprint; "" for a document without one under ""."""
        sql = """SELECT content_hash FROM document LEFT JOIN document_hash ON document_id = id AND fingerprint = ?
                 WHERE id = ?"""
        found = self.run(sql, (fingerprint, document_id))
        if not found or (found[0][0] is None and fingerprint):
            return None
        return str(found[0][0] or "")

    def superseded(self) -> set[str]:
        """The documents that are marked to be replaced."""
        found = self.run("SELECT document_id FROM document_hash WHERE fingerprint = ?", (SUPERSEDED,), (str,))
        return {document_id for (document_id,) in found}

    def is_document(self, document_id: str) -> bool:
        """Whether the document exists, be it without passages."""
        return bool(self.run("SELECT 1 FROM document WHERE id = ?", (document_id,)))

    def copy_to(self, path: Path) -> None:
        """Make the file at `path` a copy of this database, whatever it held; a crash leaves what it held.

        Raises:
            PassageIndexError: The file cannot be written, or is open elsewhere.
        """
        try:
            with self._lock, closing(connect(path)) as target:
                # Refused while anybody has the file open, who would take the copy's rows for those of the same numbers.
                target.execute("PRAGMA journal_mode = DELETE")
                self._connection.backup(target)
        except (OSError, sqlite3.Error, UnicodeDecodeError) as error:
            raise PassageIndexError(
                f"{self._where} cannot be copied to {path} ({error}); check that the disk has room and nobody uses it"
            ) from error

    def block_keys(self, fingerprint: str | None) -> set[str]:
        """All block keys, or those recorded under one fingerprint."""
        if fingerprint is None:
            return {key for (key,) in self.run("SELECT DISTINCT key FROM block", (), (str,))}
        sql = "SELECT DISTINCT key FROM block WHERE fingerprint = ?"
        return {key for (key,) in self.run(sql, (fingerprint,), (str,))}

    def matching(self, where: Mapping[str, object]) -> Rows:
        """Rows whose passage has all these facts, ascending; "document_id" is the passage's own."""
        clauses: list[str] = []
        values: list[object] = []
        for name, value in where.items():
            if name == "document_id":
                if not isinstance(value, str):
                    return np.zeros(0, dtype=np.int64)
                clauses.append("SELECT row FROM passage WHERE document_id = ?")
                values.append(value)
            else:
                clauses.append("SELECT row FROM fact WHERE digest = ?")
                values.append(_fact_digest(name, _plain(name, value)))
        found = self.run(" INTERSECT ".join(clauses), values, (int,))
        return np.array(sorted(row for (row,) in found), dtype=np.int64)

    # -- writing, inside a transaction --------------------------------------------------------------------------------

    def bump_stamp(self) -> None:
        """Name a new state of the vectors."""
        stamp = self.stamp
        number, _, _ = stamp.partition(":")
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise self._damaged(f"its stamp is {stamp!r:.60}")
        self.run("UPDATE meta SET value = ? WHERE name = 'stamp'", (f"{int(number) + 1}:{secrets.token_hex(8)}",))

    def insert(self, passage: Passage, ordinal: int, vector: Vectors) -> int:
        """Insert one passage with its vector `[dimension]` float32; returns its row."""
        metadata = encode_metadata(passage)
        sql = "INSERT INTO passage (id, document_id, ordinal, title, text, metadata) VALUES (?, ?, ?, ?, ?, ?)"
        with self._lock, self._translated():
            values = (passage.id, passage.document_id, ordinal, passage.title, passage.text, metadata)
            row = self._connection.execute(sql, values).lastrowid or 0
        blob = vector.astype("<f4", copy=False).tobytes()
        self.run("INSERT INTO embedding VALUES (?, ?)", (row, blob))
        digest = _digest(row, ordinal, passage.id, passage.title, passage.text, metadata, passage.document_id)
        self.run("INSERT INTO digest VALUES (?, ?, ?)", (row, digest, _digest(row, blob)))
        self._insert_facts(row, metadata)
        return row

    def revise(self, stored: StoredPassage, passage: Passage, ordinal: int) -> None:
        """Give a kept passage the place and the metadata it has now."""
        metadata = encode_metadata(passage)
        if (ordinal, metadata) == (stored.ordinal, stored.metadata):
            return
        self.run("UPDATE passage SET ordinal = ?, metadata = ? WHERE row = ?", (ordinal, metadata, stored.row))
        digest = _digest(stored.row, ordinal, stored.id, stored.title, stored.text, metadata, stored.document_id)
        self.run("UPDATE digest SET passage = ? WHERE row = ?", (digest, stored.row))
        if metadata != stored.metadata:
            self.run("DELETE FROM fact WHERE row = ?", (stored.row,))
            self._insert_facts(stored.row, metadata)

    def _insert_facts(self, row: int, metadata: str) -> None:
        self.run_many(
            "INSERT INTO fact VALUES (?, ?)", [(digest, row) for digest in fact_digests(json.loads(metadata))]
        )

    def delete(self, rows: Sequence[int]) -> set[str]:
        """Delete passages with all that hangs on them; returns the block keys they had."""
        keys = {key for (key,) in self.run_with_list("SELECT key FROM block WHERE row IN (?)", rows, (str,))}
        self.run_with_list("DELETE FROM passage WHERE row IN (?)", rows)
        return keys

    def put_document(self, document_id: str) -> None:
        """Make sure the document exists."""
        self.run("INSERT OR IGNORE INTO document VALUES (?)", (document_id,))

    def delete_document(self, document_id: str) -> None:
        """Delete a document whose passages are deleted."""
        self.run("DELETE FROM document WHERE id = ?", (document_id,))

    def delete_if_empty(self, document_ids: Collection[str]) -> None:
        """Delete those of these documents that have no passages."""
        sql = """DELETE FROM document WHERE id IN (?)
                 AND NOT EXISTS (SELECT 1 FROM passage WHERE document_id = document.id)"""
        self.run_with_list(sql, document_ids)

    def delete_everything(self) -> set[str]:
        """Delete all documents with all that hangs on them; returns the block keys they had."""
        keys = self.block_keys(None)
        self.run("DELETE FROM document")
        self.run("DELETE FROM term")
        return keys

    def forget_hashes(self, document_id: str) -> None:
        """Drop all content hashes of a document, because its passages changed; a mark stays."""
        self.run("DELETE FROM document_hash WHERE document_id = ? AND fingerprint != ?", (document_id, SUPERSEDED))

    def mark_superseded(self, document_id: str) -> None:
        """Mark a document that exists."""
        self.set_hash(document_id, SUPERSEDED, "")

    def unmark_superseded(self, document_id: str) -> None:
        """Take the mark from a document that may have one."""
        self.run("DELETE FROM document_hash WHERE document_id = ? AND fingerprint = ?", (document_id, SUPERSEDED))

    def set_hash(self, document_id: str, fingerprint: str, content_hash: str) -> None:
        """Record what a document was replaced with under a fingerprint."""
        self.run("INSERT OR REPLACE INTO document_hash VALUES (?, ?, ?)", (document_id, fingerprint, content_hash))

    def set_blocks(self, row: int, fingerprint: str, keys: Sequence[str]) -> set[str]:
        """Replace a passage's block keys under a fingerprint; returns the keys it had."""
        found = self.run("SELECT key FROM block WHERE row = ? AND fingerprint = ?", (row, fingerprint), (str,))
        self.run("DELETE FROM block WHERE row = ? AND fingerprint = ?", (row, fingerprint))
        self.run_many(
            "INSERT INTO block VALUES (?, ?, ?, ?)", [(row, fingerprint, i, key) for i, key in enumerate(keys)]
        )
        return {key for (key,) in found}

    def unused(self, keys: Collection[str]) -> frozenset[str]:
        """Those of `keys` that no passage has any more."""
        used = {key for (key,) in self.run_with_list("SELECT DISTINCT key FROM block WHERE key IN (?)", keys, (str,))}
        return frozenset(keys) - used

    def count_terms(self, changes: Mapping[str, int]) -> None:
        """Add to the number of passages that hold each term; terms left in none are dropped."""
        sql = """INSERT INTO term VALUES (?, ?)
                 ON CONFLICT (term) DO UPDATE SET passages = passages + excluded.passages"""
        self.run_many(sql, [(term, change) for term, change in changes.items() if change])
        if any(change < 0 for change in changes.values()):
            self.run_with_list(
                "DELETE FROM term WHERE passages <= 0 AND term IN (?)", [t for t, c in changes.items() if c < 0]
            )

    def term_counts(self, terms: Collection[str]) -> dict[str, int]:
        """How many passages hold each of `terms`; terms in none are left out."""
        counts = dict(self.run_with_list("SELECT term, passages FROM term WHERE term IN (?)", terms, (str, int)))
        for term, count in counts.items():
            if count < 1:
                raise self._damaged(f"{count} passages are said to hold {term!r}")
        return counts


class TermCounts:
    """The database's corpus statistics, in the form encoders take.

    Args:
        database: Where the counts are.
        passages: The number of passages in it, which its reader knows without counting.
    """

    def __init__(self, database: PassageDatabase, *, passages: int) -> None:
        self._database = database
        self._passages = passages

    @property
    def passages(self) -> int:
        """Number of passages in the index."""
        return self._passages

    def passages_with(self, terms: Collection[str]) -> Mapping[str, int]:
        """How many passages hold each of `terms`."""
        return self._database.term_counts(terms)


def encode_metadata(passage: Passage) -> str:
    """A passage's metadata as canonical JSON.

    Raises:
        InputError: It is not JSON-serialisable (or holds NaN or infinity, which JSON lacks).
    """
    return json.dumps({name: _plain(name, value, passage.id) for name, value in passage.metadata.items()}, **_CANONICAL)


def _plain(name: str, value: object, passage_id: str = "") -> Any:
    """A JSON value as it reads back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        of = f"passage {passage_id!r}: " if passage_id else ""
        raise InputError(
            f"{of}metadata {name!r} is not JSON-serialisable ({error}); pass strings, finite numbers, booleans, None, "
            "or lists and dicts of them"
        ) from error


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def _digest(*values: int | str | bytes | None) -> bytes:
    """XXH3 (xxhash.com) over values of one row, its number among them, so that no row can take another's place."""
    state = xxhash.xxh3_64()
    for value in values:
        data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else repr(value).encode()
        state.update(b"%d:" % len(data))
        state.update(data)
    return state.digest()


def fact_digests(metadata: Mapping[str, object]) -> set[bytes]:
    """What a passage of this metadata, as it reads back from JSON, is looked up by."""
    return {_fact_digest(name, value) for name, value in metadata.items()}


def _fact_digest(name: str, value: object) -> bytes:
    """Sixteen bytes that stand for "this name has this value"; 2 and 2.0 are one value, 1 and true are two."""
    fact = json.loads(json.dumps([name, value]), parse_float=_number)
    return hashlib.blake2b(json.dumps(fact, **_CANONICAL).encode(), digest_size=16).digest()


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
