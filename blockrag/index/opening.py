"""How a file becomes the database of a passage index: made, brought to the format of today, or refused with the reason.

It owns the facts that never change in a database: its format, and the encoder and dimension of its vectors.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

from blockrag.errors import PassageIndexError
from blockrag.index.connection import Connection
from blockrag.index.digests import row_digest
from blockrag.index.schema import ALL_ENTRIES, OLDER, SCHEMA_VERSION, TABLES, connect, schema_problem

__all__ = ["open_connection", "peek", "read_meta"]


def peek(path: Path) -> tuple[str, int] | None:
    """Encoder name and dimension of the database at `path`, read without an encoder; None when there is none yet.

    Raises:
        PassageIndexError: The file cannot be read, or is not a passage index.
    """
    try:
        if not path.exists() or not path.stat().st_size:
            return None
        with closing(connect(path)) as connection:
            problem = schema_problem(connection.execute(ALL_ENTRIES))
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


def open_connection(path: Path | None, *, encoder: str, dimension: int) -> Connection:
    """Connect to a passage index's database, made when it is missing or empty.

    Args:
        path: The database file, or None for memory.
        encoder: Name of the encoder whose vectors it holds.
        dimension: Length of those vectors.

    Raises:
        PassageIndexError: The file is damaged, is not a passage index, or belongs to another encoder or format.
    """
    connection = Connection(path)
    try:
        with connection.transaction():
            problem = schema_problem(connection.run(ALL_ENTRIES))
            if problem == "":
                _create(connection, encoder, dimension)
                return connection
            if problem == OLDER and read_meta(connection, "schema") == "1":
                _add_digests(connection)
            elif problem:
                raise PassageIndexError(f"{connection.where} is no passage index ({problem}); pass another directory")
            _check_meta(connection, encoder, dimension)
    except BaseException:
        connection.close()
        raise
    return connection


def read_meta(connection: Connection, name: str) -> str:
    """A fact about the database itself: its "schema", "encoder", "dimension" or "stamp".

    Raises:
        PassageIndexError: It is not there: the file is damaged.
    """
    rows = connection.run("SELECT value FROM meta WHERE name = ?", (name,), (str,))
    if not rows:
        raise connection.damaged(f"it lacks {name!r}")
    return str(rows[0][0])


def _create(connection: Connection, encoder: str, dimension: int) -> None:
    for sql in TABLES.values():
        connection.run(sql)
    facts = {"schema": SCHEMA_VERSION, "encoder": encoder, "dimension": str(dimension), "stamp": "0:new"}
    connection.run_many("INSERT INTO meta VALUES (?, ?)", facts.items())


def _add_digests(connection: Connection) -> None:
    """Make a database of format 1 one of format 2; what it holds is taken to be sound."""
    connection.run(TABLES["digest"])
    sql = """SELECT passage.row, ordinal, id, title, text, metadata, document_id, vector
             FROM passage LEFT JOIN embedding USING (row) WHERE passage.row > ? ORDER BY passage.row"""
    for page in connection.pages(sql):
        digests = [(row, row_digest(row, *passage), row_digest(row, vector)) for row, *passage, vector in page]
        connection.run_many("INSERT INTO digest VALUES (?, ?, ?)", digests)
    connection.run("UPDATE meta SET value = ? WHERE name = 'schema'", (SCHEMA_VERSION,))


def _check_meta(connection: Connection, encoder: str, dimension: int) -> None:
    schema, name, length = (read_meta(connection, key) for key in ("schema", "encoder", "dimension"))
    if schema != SCHEMA_VERSION:
        raise PassageIndexError(
            f"{connection.where} has format {schema:.20}, this blockrag reads format {SCHEMA_VERSION}; open it with "
            "the release that wrote it, or ingest the documents into a new directory"
        )
    if (name, length) != (encoder, str(dimension)):
        raise PassageIndexError(
            f"{connection.where} was built with encoder {name!r:.200} ({length:.20} dimensions), not {encoder!r} "
            f"({dimension}); open it with that encoder, or ingest the documents into a new directory"
        )
