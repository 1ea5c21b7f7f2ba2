"""The truth of a passage index: one SQLite file, written in transactions.

It owns the tables, and what must change together with them: embeddings, block keys, document hashes, the facts that
`where` filters look up, term counts, and the stamp that names the state of the vectors. Rows are numbered by
AUTOINCREMENT and never used twice, and a row's embedding never changes; so two states differ exactly by the rows they
hold, and whoever follows the database (the FAISS side, here or in another process) catches up by comparing row
numbers. Nothing here knows encoders or FAISS.

Security: the schema must be exactly the one below (no triggers, no views), `trusted_schema` is off, every value is
bound, nothing is pickled.
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

from blockrag.encoders.protocol import Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index.records import DocumentInfo
from blockrag.index.vectors import Rows
from blockrag.passage import Passage

__all__ = ["SUPERSEDED", "PassageDatabase", "StoredPassage", "TermCounts", "encode_metadata", "peek"]

SUPERSEDED = "superseded"
"""The fingerprint under which a document's mark lies among its content hashes: no fingerprint is this word, and
directories written before there were marks stay readable."""

_SCHEMA_VERSION = "1"
_TABLES = {
    "meta": "CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID",
    "document": "CREATE TABLE document (id TEXT PRIMARY KEY) WITHOUT ROWID",
    "document_hash": """CREATE TABLE document_hash (
        document_id TEXT NOT NULL REFERENCES document (id) ON DELETE CASCADE,
        fingerprint TEXT NOT NULL, content_hash TEXT NOT NULL, PRIMARY KEY (document_id, fingerprint)) WITHOUT ROWID""",
    "passage": """CREATE TABLE passage (
        row INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
        document_id TEXT NOT NULL REFERENCES document (id) ON DELETE CASCADE,
        ordinal INTEGER NOT NULL, title TEXT NOT NULL, text TEXT NOT NULL, metadata TEXT NOT NULL)""",
    "passage_document": "CREATE INDEX passage_document ON passage (document_id, ordinal)",
    # Vectors lie apart, so that reading row numbers or texts does not walk over them.
    "embedding": """CREATE TABLE embedding (
        row INTEGER PRIMARY KEY REFERENCES passage (row) ON DELETE CASCADE, vector BLOB NOT NULL)""",
    "fact": """CREATE TABLE fact (
        digest BLOB NOT NULL, row INTEGER NOT NULL REFERENCES passage (row) ON DELETE CASCADE,
        PRIMARY KEY (digest, row)) WITHOUT ROWID""",
    "fact_row": "CREATE INDEX fact_row ON fact (row)",
    "block": """CREATE TABLE block (
        row INTEGER NOT NULL REFERENCES passage (row) ON DELETE CASCADE, fingerprint TEXT NOT NULL,
        position INTEGER NOT NULL, key TEXT NOT NULL, PRIMARY KEY (row, fingerprint, position)) WITHOUT ROWID""",
    "block_key": "CREATE INDEX block_key ON block (key)",
    "term": "CREATE TABLE term (term TEXT PRIMARY KEY, passages INTEGER NOT NULL) WITHOUT ROWID",
}
_BUSY_SECONDS = 60.0
# SQLite before 3.32 binds at most 999 values.
_VALUES_AT_ONCE = 900
_PAGE_ROWS = 512
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
        with closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as connection:
            connection.execute("PRAGMA trusted_schema = OFF")
            if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return None  # another process is about to create it
            facts = dict(connection.execute("SELECT name, value FROM meta WHERE name IN ('encoder', 'dimension')"))
        dimension = int(facts["dimension"])
        if not 0 < dimension < 1 << 31:
            raise ValueError(f"its vectors have {dimension} dimensions")
        return str(facts["encoder"]), dimension
    except (OSError, sqlite3.Error, KeyError, TypeError, ValueError) as error:
        raise PassageIndexError(f"{path} is no passage index ({error}); pass another directory") from error


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
        if path is not None:
            self._refuse_truncated(path)
        self._file: tuple[int, int] | None = None
        with self._translated():
            self._connection = sqlite3.connect(
                path if path is not None else ":memory:",
                timeout=_BUSY_SECONDS,
                isolation_level=None,
                check_same_thread=False,
            )
        try:
            self._prepare(encoder)
        except BaseException:
            self._connection.close()
            raise

    # -- opening and closing ------------------------------------------------------------------------------------------

    def _prepare(self, encoder: str) -> None:
        for pragma in ("trusted_schema = OFF", "cell_size_check = ON", "foreign_keys = ON", "synchronous = NORMAL"):
            self._run(f"PRAGMA {pragma}")
        if self._path is not None:
            self._run("PRAGMA journal_mode = WAL")
            self._file = _identity(self._path)
        with self.transaction():
            found = {(kind, name) for kind, name in self._run("SELECT type, name FROM sqlite_master")}
            if not found:
                self._create(encoder)
                return
            expected = {(sql.split()[1].lower(), name) for name, sql in _TABLES.items()}
            foreign = {item for item in found - expected if not item[1].startswith("sqlite_")}
            if foreign or expected - found:
                names = ", ".join(sorted(f"{kind} {name}" for kind, name in foreign or expected - found))
                verb = "holds" if foreign else "lacks"
                raise PassageIndexError(f"{self._where} is no passage index ({verb} {names}); pass another directory")
            self._check_meta(encoder)

    def _create(self, encoder: str) -> None:
        for sql in _TABLES.values():
            self._run(sql)
        facts = {"schema": _SCHEMA_VERSION, "encoder": encoder, "dimension": str(self._dimension), "stamp": "0:new"}
        self._many("INSERT INTO meta VALUES (?, ?)", facts.items())

    def _check_meta(self, encoder: str) -> None:
        schema, name, dimension = (self._meta(key) for key in ("schema", "encoder", "dimension"))
        if schema != _SCHEMA_VERSION:
            raise PassageIndexError(
                f"{self._where} has format {schema}, this blockrag reads format {_SCHEMA_VERSION}; open it with the "
                "release that wrote it, or ingest the documents into a new directory"
            )
        if (name, dimension) != (encoder, str(self._dimension)):
            raise PassageIndexError(
                f"{self._where} was built with encoder {name!r} ({dimension} dimensions), not {encoder!r} "
                f"({self._dimension}); open it with that encoder, or ingest the documents into a new directory"
            )

    def _refuse_truncated(self, path: Path) -> None:
        """Compare the file's length with its header, which SQLite itself does only when it meets a missing page."""
        log = path.with_name(path.name + "-wal")
        try:
            size = path.stat().st_size
            if size == 0 or (log.exists() and log.stat().st_size > 0):
                return
            with path.open("rb") as file:
                header = file.read(100)
        except FileNotFoundError:
            return
        except OSError as error:
            raise PassageIndexError(f"{path} cannot be read ({error}); check its permissions") from error
        page = int.from_bytes(header[16:18], "big")
        expected = int.from_bytes(header[28:32], "big") * (65536 if page == 1 else page)
        # The page count is valid only when the version it was written at equals the change counter.
        if header[24:28] == header[92:96] and size < expected:
            raise self._damaged(f"{size} of {expected} bytes are left")

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
            self._run("BEGIN IMMEDIATE" if writing else "BEGIN")
            try:
                yield
                self._run("COMMIT")
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
            raise PassageIndexError(
                f"{self._where}: {error}; another process may hold it, or the directory may be missing, full or "
                "read-only: free it and try again"
            ) from error
        except sqlite3.DatabaseError as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, what: str) -> PassageIndexError:
        return PassageIndexError(
            f"{self._where} is damaged ({what}); restore it from a backup, or delete its directory and ingest the "
            "documents again"
        )

    def _run(self, sql: str, values: Sequence[object] = ()) -> list[Any]:
        with self._lock, self._translated():
            return self._connection.execute(sql, values).fetchall()

    def _many(self, sql: str, values: Iterable[Sequence[object]]) -> None:
        with self._lock, self._translated():
            self._connection.executemany(sql, values)

    def _with_list(self, sql: str, values: Collection[object]) -> list[Any]:
        """All results of `sql`, whose "(?)" stands for a list of any length."""
        results: list[Any] = []
        pending = list(values)
        with self._lock:
            for start in range(0, len(pending), _VALUES_AT_ONCE):
                some = pending[start : start + _VALUES_AT_ONCE]
                results += self._run(sql.replace("(?)", f"({','.join('?' * len(some))})"), some)
        return results

    def _meta(self, name: str) -> str:
        rows = self._run("SELECT value FROM meta WHERE name = ?", (name,))
        if not rows:
            raise self._damaged(f"it lacks {name!r}")
        return str(rows[0][0])

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def stamp(self) -> str:
        """Names the state of the vectors: a counter and a random token, so that no two histories share a stamp."""
        return self._meta("stamp")

    def rows(self) -> Rows:
        """All rows, ascending."""
        return np.array([row for (row,) in self._run("SELECT row FROM embedding ORDER BY row")], dtype=np.int64)

    def count(self) -> tuple[int, int]:
        """Numbers of passages and of documents."""
        (counts,) = self._run("SELECT (SELECT count(*) FROM passage), (SELECT count(*) FROM document)")
        return int(counts[0]), int(counts[1])

    def size_bytes(self) -> int:
        """Bytes of all database pages."""
        (pages,), (size,) = self._run("PRAGMA page_count")[0], self._run("PRAGMA page_size")[0]
        return int(pages * size)

    def embeddings(self, rows: Rows) -> tuple[Rows, Vectors]:
        """Those of `rows` that are there, ascending, with their vectors `[n, dimension]` float32."""
        found = sorted(self._with_list("SELECT row, vector FROM embedding WHERE row IN (?)", rows.tolist()))
        return self._matrix(found)

    def embedding_chunks(self, rows: Rows) -> Iterator[tuple[Rows, Vectors]]:
        """`embeddings` in chunks of bounded size."""
        for start in range(0, len(rows), _VALUES_AT_ONCE):
            yield self.embeddings(rows[start : start + _VALUES_AT_ONCE])

    def _matrix(self, found: list[tuple[int, bytes]]) -> tuple[Rows, Vectors]:
        wanted = 4 * self._dimension
        for row, vector in found:
            if not isinstance(vector, bytes) or len(vector) != wanted:
                raise self._damaged(f"the embedding of row {row} is not {wanted} bytes long")
        matrix = np.frombuffer(b"".join(vector for _, vector in found), dtype="<f4").reshape(-1, self._dimension)
        return np.array([row for row, _ in found], dtype=np.int64), matrix.astype(np.float32, copy=False)

    def passages_at(self, rows: Collection[int]) -> dict[int, Passage]:
        """The passages of `rows`, by row; rows that are gone are left out."""
        sql = "SELECT row, id, text, title, document_id, metadata FROM passage WHERE row IN (?)"
        return {row: self._passage(*columns) for row, *columns in self._with_list(sql, rows)}

    def passage(self, passage_id: str) -> Passage | None:
        """The passage of this id."""
        sql = "SELECT id, text, title, document_id, metadata FROM passage WHERE id = ?"
        found = self._run(sql, (passage_id,))
        return self._passage(*found[0]) if found else None

    def passages(self, document_id: str | None) -> Iterator[Passage]:
        """A document's passages in order, or all passages by row; read a page at a time, without holding the lock."""
        if document_id is not None:
            sql = (
                "SELECT id, text, title, document_id, metadata FROM passage WHERE document_id = ? ORDER BY ordinal, row"
            )
            yield from [self._passage(*columns) for columns in self._run(sql, (document_id,))]
            return
        sql = f"""SELECT row, id, text, title, document_id, metadata FROM passage
                  WHERE row > ? ORDER BY row LIMIT {_PAGE_ROWS}"""
        last = -1
        while page := self._run(sql, (last,)):
            last = page[-1][0]
            yield from [self._passage(*columns) for _, *columns in page]

    def _passage(self, id: str, text: str, title: str, document_id: str, metadata: str) -> Passage:
        try:
            facts = json.loads(metadata)
        except (ValueError, TypeError, RecursionError) as error:
            raise self._damaged(f"the metadata of passage {id!r} is not JSON") from error
        return Passage(id=id, text=text, title=title, document_id=document_id, metadata=facts)

    def stored(self, document_id: str) -> list[StoredPassage]:
        """A document's passages with their rows, in order."""
        sql = """SELECT row, ordinal, id, title, text, metadata, document_id FROM passage
                 WHERE document_id = ? ORDER BY ordinal, row"""
        return [StoredPassage(*columns) for columns in self._run(sql, (document_id,))]

    def stored_passages(self, passage_ids: Collection[str]) -> list[StoredPassage]:
        """Those of these passages that are there, in no particular order."""
        sql = "SELECT row, ordinal, id, title, text, metadata, document_id FROM passage WHERE id IN (?)"
        return [StoredPassage(*columns) for columns in self._with_list(sql, passage_ids)]

    def rows_of(self, passage_ids: Collection[str]) -> dict[str, tuple[int, str]]:
        """Row and document of each of these passages that is there."""
        found = self._with_list("SELECT id, row, document_id FROM passage WHERE id IN (?)", passage_ids)
        return {id: (row, document_id) for id, row, document_id in found}

    def documents(self) -> list[DocumentInfo]:
        """All documents by id."""
        sql = """SELECT document.id, (SELECT count(*) FROM passage WHERE document_id = document.id),
                        coalesce((SELECT content_hash FROM document_hash
                                  WHERE document_id = document.id AND fingerprint = ''), '')
                 FROM document ORDER BY document.id"""
        return [DocumentInfo(*columns) for columns in self._run(sql)]

    def document_hash(self, document_id: str, fingerprint: str) -> str | None:
        """The content hash recorded for a document under a fingerprint; "" for a document without one under ""."""
        sql = """SELECT content_hash FROM document LEFT JOIN document_hash ON document_id = id AND fingerprint = ?
                 WHERE id = ?"""
        found = self._run(sql, (fingerprint, document_id))
        if not found or (found[0][0] is None and fingerprint):
            return None
        return str(found[0][0] or "")

    def superseded(self) -> set[str]:
        """The documents that are marked to be replaced."""
        found = self._run("SELECT document_id FROM document_hash WHERE fingerprint = ?", (SUPERSEDED,))
        return {document_id for (document_id,) in found}

    def is_document(self, document_id: str) -> bool:
        """Whether the document exists, be it without passages."""
        return bool(self._run("SELECT 1 FROM document WHERE id = ?", (document_id,)))

    def copy_to(self, path: Path) -> None:
        """Make the file at `path` a copy of this database, whatever it held; a crash leaves what it held.

        Raises:
            PassageIndexError: The file cannot be written, or is open elsewhere.
        """
        try:
            with self._lock, closing(sqlite3.connect(path, timeout=_BUSY_SECONDS)) as target:
                # Refused while anybody has the file open, who would take the copy's rows for those of the same numbers.
                target.execute("PRAGMA journal_mode = DELETE")
                self._connection.backup(target)
        except sqlite3.Error as error:
            raise PassageIndexError(
                f"{self._where} cannot be copied to {path} ({error}); check that the disk has room and nobody uses it"
            ) from error

    def block_keys(self, fingerprint: str | None) -> set[str]:
        """All block keys, or those recorded under one fingerprint."""
        if fingerprint is None:
            return {key for (key,) in self._run("SELECT DISTINCT key FROM block")}
        return {key for (key,) in self._run("SELECT DISTINCT key FROM block WHERE fingerprint = ?", (fingerprint,))}

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
        found = self._run(" INTERSECT ".join(clauses), values)
        return np.array(sorted(row for (row,) in found), dtype=np.int64)

    # -- writing, inside a transaction --------------------------------------------------------------------------------

    def bump_stamp(self) -> None:
        """Name a new state of the vectors."""
        number = int(self.stamp.partition(":")[0]) + 1
        self._run("UPDATE meta SET value = ? WHERE name = 'stamp'", (f"{number}:{secrets.token_hex(8)}",))

    def insert(self, passage: Passage, ordinal: int, vector: Vectors) -> int:
        """Insert one passage with its vector `[dimension]` float32; returns its row."""
        metadata = encode_metadata(passage)
        sql = "INSERT INTO passage (id, document_id, ordinal, title, text, metadata) VALUES (?, ?, ?, ?, ?, ?)"
        with self._lock, self._translated():
            values = (passage.id, passage.document_id, ordinal, passage.title, passage.text, metadata)
            row = self._connection.execute(sql, values).lastrowid or 0
        self._run("INSERT INTO embedding VALUES (?, ?)", (row, vector.astype("<f4", copy=False).tobytes()))
        self._insert_facts(row, metadata)
        return row

    def revise(self, stored: StoredPassage, passage: Passage, ordinal: int) -> None:
        """Give a kept passage the place and the metadata it has now."""
        metadata = encode_metadata(passage)
        if (ordinal, metadata) == (stored.ordinal, stored.metadata):
            return
        self._run("UPDATE passage SET ordinal = ?, metadata = ? WHERE row = ?", (ordinal, metadata, stored.row))
        if metadata != stored.metadata:
            self._run("DELETE FROM fact WHERE row = ?", (stored.row,))
            self._insert_facts(stored.row, metadata)

    def _insert_facts(self, row: int, metadata: str) -> None:
        facts = json.loads(metadata)
        self._many("INSERT INTO fact VALUES (?, ?)", [(_fact_digest(name, facts[name]), row) for name in facts])

    def delete(self, rows: Sequence[int]) -> set[str]:
        """Delete passages with all that hangs on them; returns the block keys they had."""
        keys = {key for (key,) in self._with_list("SELECT key FROM block WHERE row IN (?)", rows)}
        self._with_list("DELETE FROM passage WHERE row IN (?)", rows)
        return keys

    def put_document(self, document_id: str) -> None:
        """Make sure the document exists."""
        self._run("INSERT OR IGNORE INTO document VALUES (?)", (document_id,))

    def delete_document(self, document_id: str) -> None:
        """Delete a document whose passages are deleted."""
        self._run("DELETE FROM document WHERE id = ?", (document_id,))

    def delete_if_empty(self, document_ids: Collection[str]) -> None:
        """Delete those of these documents that have no passages."""
        sql = """DELETE FROM document WHERE id IN (?)
                 AND NOT EXISTS (SELECT 1 FROM passage WHERE document_id = document.id)"""
        self._with_list(sql, document_ids)

    def delete_everything(self) -> set[str]:
        """Delete all documents with all that hangs on them; returns the block keys they had."""
        keys = self.block_keys(None)
        self._run("DELETE FROM document")
        self._run("DELETE FROM term")
        return keys

    def forget_hashes(self, document_id: str) -> None:
        """Drop all content hashes of a document, because its passages changed; a mark stays."""
        self._run("DELETE FROM document_hash WHERE document_id = ? AND fingerprint != ?", (document_id, SUPERSEDED))

    def mark_superseded(self, document_id: str) -> None:
        """Mark a document that exists."""
        self.set_hash(document_id, SUPERSEDED, "")

    def unmark_superseded(self, document_id: str) -> None:
        """Take the mark from a document that may have one."""
        self._run("DELETE FROM document_hash WHERE document_id = ? AND fingerprint = ?", (document_id, SUPERSEDED))

    def set_hash(self, document_id: str, fingerprint: str, content_hash: str) -> None:
        """Record what a document was replaced with under a fingerprint."""
        self._run("INSERT OR REPLACE INTO document_hash VALUES (?, ?, ?)", (document_id, fingerprint, content_hash))

    def set_blocks(self, row: int, fingerprint: str, keys: Sequence[str]) -> set[str]:
        """Replace a passage's block keys under a fingerprint; returns the keys it had."""
        found = self._run("SELECT key FROM block WHERE row = ? AND fingerprint = ?", (row, fingerprint))
        self._run("DELETE FROM block WHERE row = ? AND fingerprint = ?", (row, fingerprint))
        self._many("INSERT INTO block VALUES (?, ?, ?, ?)", [(row, fingerprint, i, key) for i, key in enumerate(keys)])
        return {key for (key,) in found}

    def unused(self, keys: Collection[str]) -> frozenset[str]:
        """Those of `keys` that no passage has any more."""
        used = {key for (key,) in self._with_list("SELECT DISTINCT key FROM block WHERE key IN (?)", keys)}
        return frozenset(keys) - used

    def count_terms(self, changes: Mapping[str, int]) -> None:
        """Add to the number of passages that hold each term; terms left in none are dropped."""
        sql = """INSERT INTO term VALUES (?, ?)
                 ON CONFLICT (term) DO UPDATE SET passages = passages + excluded.passages"""
        self._many(sql, [(term, change) for term, change in changes.items() if change])
        if any(change < 0 for change in changes.values()):
            self._with_list(
                "DELETE FROM term WHERE passages <= 0 AND term IN (?)", [t for t, c in changes.items() if c < 0]
            )

    def term_counts(self, terms: Collection[str]) -> dict[str, int]:
        """How many passages hold each of `terms`; terms in none are left out."""
        return dict(self._with_list("SELECT term, passages FROM term WHERE term IN (?)", terms))


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


def _fact_digest(name: str, value: object) -> bytes:
    """Sixteen bytes that stand for "this name has this value"; 2 and 2.0 are one value, 1 and true are two."""
    fact = json.loads(json.dumps([name, value]), parse_float=_number)
    return hashlib.blake2b(json.dumps(fact, **_CANONICAL).encode(), digest_size=16).digest()


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value
