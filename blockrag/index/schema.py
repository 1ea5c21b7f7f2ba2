"""The tables of a passage index, and what a database file must be before anything in it is read.

A database is data from outside: its schema is a program that SQLite runs. So it must be word for word the one below (no
triggers, no views, no generated columns, no indexes on expressions), which is compared before the first table is read.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from blockrag.index.files import create_private, make_private, refuse_irregular

__all__ = ["ALL_ENTRIES", "BUSY_SECONDS", "OLDER", "SCHEMA_VERSION", "TABLES", "connect", "schema_problem"]

SCHEMA_VERSION: Final = "2"
TABLES: Final = {
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
    # What SQLite has not: it would hand out a text in which a bit has flipped.
    "digest": """CREATE TABLE digest (
        row INTEGER PRIMARY KEY REFERENCES passage (row) ON DELETE CASCADE,
        passage BLOB NOT NULL, vector BLOB NOT NULL)""",
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
BUSY_SECONDS: Final = 60.0
OLDER: Final = "lacks table digest"
"""The schema problem of format 1, which had all but these."""
ALL_ENTRIES: Final = "SELECT type, name, sql FROM sqlite_master"
"""What a database consists of: the statement whose results `schema_problem` looks at."""


# What keeps SQLite from trusting a file (sqlite.org/security.html, "Untrusted SQLite Database Files").
_PRAGMAS: Final = (
    "trusted_schema = OFF",
    "cell_size_check = ON",
    "mmap_size = 0",
    "foreign_keys = ON",
    "synchronous = NORMAL",
)
# SQLite's own: of AUTOINCREMENT, of UNIQUE, and of an ANALYZE that somebody ran.
_OWN: Final = {
    ("table", "sqlite_sequence"): "CREATE TABLE sqlite_sequence(name,seq)",
    ("index", "sqlite_autoindex_passage_1"): None,
    ("table", "sqlite_stat1"): "CREATE TABLE sqlite_stat1(tbl,idx,stat)",
    ("table", "sqlite_stat4"): "CREATE TABLE sqlite_stat4(tbl,idx,neq,nlt,ndlt,sample)",
}


def connect(path: Path | None) -> sqlite3.Connection:
    """A connection in autocommit mode that any thread may use, one at a time; nothing is read yet.

    Args:
        path: The file, made readable for its owner alone when it is not there; None for memory.

    Raises:
        OSError: The file cannot be made or looked at, or it is a link or no file (NotAFileError).
        sqlite3.Error: It cannot be opened.
    """
    if path is not None:
        for name in (path.name, f"{path.name}-wal", f"{path.name}-shm", f"{path.name}-journal"):
            refuse_irregular(path.with_name(name))
            make_private(path.with_name(name))
        with suppress(FileExistsError):
            # SQLite would let everybody read it; its log inherits these permissions.
            create_private(path).close()
    connection = sqlite3.connect(
        ":memory:" if path is None else path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        for pragma in _PRAGMAS:
            connection.execute(f"PRAGMA {pragma}").close()
    except BaseException:
        connection.close()
        raise
    return connection


def schema_problem(entries: Iterable[tuple[str, str, str | None]]) -> str | None:
    """How a database differs from a passage index, e.g. "holds view v"; None when it does not, "" when it is empty.

    Args:
        entries: What `ALL_ENTRIES` selects from it.
    """
    found = {(kind, name): sql for kind, name, sql in entries}
    if not found:
        return ""
    expected = {(sql.split()[1].lower(), name): sql for name, sql in TABLES.items()}
    foreign = found.keys() - expected.keys() - _OWN.keys()
    lacking = expected.keys() - found.keys()
    for verb, items in (("holds", foreign), ("lacks", lacking)):
        if items:
            return f"{verb} {', '.join(sorted(f'{kind} {name}' for kind, name in items))}"[:500]
    allowed = {**expected, **_OWN}
    for (kind, name), sql in found.items():
        if _words(sql) != _words(allowed[kind, name]):
            return f"holds another {kind} {name}"
    return None


def _words(sql: str | None) -> str:
    return " ".join((sql or "").split())
