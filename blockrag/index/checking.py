"""The check of a passage index: the database's own soundness, what it keeps twice, and the vector file against it.

What can be made again from the passages is mended where that is asked for: look-up tables, word counts, the vector
file. Passages and their embeddings are the truth: where they are damaged, only their documents can restore them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from blockrag.encoders.given import GivenVectors
from blockrag.encoders.lexical import LexicalEncoder
from blockrag.encoders.protocol import Encoder, StatisticalEncoder, Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index.database import PassageDatabase
from blockrag.index.digests import fact_digests
from blockrag.index.files import DATABASE_FILE, VECTOR_FILE, refuse_emptied
from blockrag.index.opening import peek
from blockrag.index.vector_file import VectorFileError, read_kind
from blockrag.index.vectors import Kind, Rows, VectorIndex
from blockrag.passage import Passage
from blockrag.stores.report import Fault

__all__ = ["IndexReport", "check_database", "check_index", "check_vector_file"]

_AT_ONCE = 900
# A file that is being written is renamed when it is whole; one that is older than this is a killed process's.
_UNFINISHED_S = 3600.0
# What may be left of a passage that is gone, and how it is found.
_STRAYS = {
    "fact": "row NOT IN (SELECT row FROM passage)",
    "block": "row NOT IN (SELECT row FROM passage)",
    "embedding": "row NOT IN (SELECT row FROM passage)",
    "digest": "row NOT IN (SELECT row FROM passage)",
    "document_hash": "document_id NOT IN (SELECT id FROM document)",
}
_AGAIN = "delete its document and ingest it again"
_LOST = "restore the index from a backup, or delete its directory and ingest the documents again"


@dataclass(frozen=True, slots=True)
class IndexReport:
    """The result of `PassageIndex.verify`.

    Args:
        where: The index's directory; "memory" for one in memory.
        passages: Passages in it.
        documents: Documents in it.
        encoder: What made its vectors.
        block_keys: Keys of all blocks that its passages name.
        faults: What is wrong.
    """

    where: str
    passages: int
    documents: int
    encoder: str
    block_keys: frozenset[str] = field(default=frozenset(), repr=False)
    faults: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, database: PassageDatabase, where: str, encoder: str, faults: Sequence[Fault]) -> IndexReport:
        """The report of these faults."""
        try:
            passages, documents = database.count()
            keys = frozenset(database.block_keys(None))
        except PassageIndexError as error:
            passages, documents, keys = 0, 0, frozenset[str]()
            faults = [*faults, Fault("damaged", f"{DATABASE_FILE}: block", str(error))]
        return cls(where, passages, documents, encoder, keys, tuple(faults))

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return all(fault.fixed for fault in self.faults)


def check_index(path: Path, *, fix: bool = False) -> IndexReport:
    """Check the index in a directory, without what embeds its questions.

    Args:
        path: The index's directory.
        fix: Make again what follows from the passages.

    Raises:
        InputError: There is no index.
        PassageIndexError: The database cannot be opened; the message says what to do.
    """
    refuse_emptied(path)
    origin = peek(path / DATABASE_FILE)
    if origin is None:
        raise InputError(f"there is no passage index in {path}; pass the directory of one")
    name, dimension = origin
    encoder = _stand_in(name, dimension)
    database = PassageDatabase(path / DATABASE_FILE, encoder=name, dimension=dimension)
    try:
        with database.connection.transaction(writing=fix):
            # Faults of the database may change its state, which is the one that the vectors must have.
            faults = [
                *check_database(database, encoder, fix=fix),
                *check_vector_file(database, path, dimension, fix=fix),
            ]
            return IndexReport.of(database, str(path), name, faults)
    finally:
        database.connection.close()


def _stand_in(name: str, dimension: int) -> Encoder:
    """Something that has the encoder's name and dimension, and its words if it counts words; loads no model."""
    try:
        lexical = LexicalEncoder(dimension)
    except InputError:
        return GivenVectors(name, dimension)
    return lexical if lexical.name == name else GivenVectors(name, dimension)


def check_database(database: PassageDatabase, encoder: Encoder, *, fix: bool) -> list[Fault]:
    """What is wrong in a database; inside a transaction, a writing one where `fix` is set.

    Args:
        database: It.
        encoder: Whose words it counts, if it counts words.
        fix: Make again what follows from the passages.
    """
    faults: list[Fault] = []
    try:
        faults += _integrity(database, fix=fix)
        faults += _strays(database, fix=fix)
        faults += _embeddings(database)
        faults += _passages(database, encoder, fix=fix)
    except PassageIndexError as error:
        # The rest cannot be looked at.
        faults.append(Fault("damaged", DATABASE_FILE, str(error)))
    return faults


def _integrity(database: PassageDatabase, *, fix: bool) -> list[Fault]:
    found = _problems(database)
    if found and fix:
        database.connection.run("REINDEX")
    mended = bool(found) and fix and not _problems(database)
    return [Fault("damaged", DATABASE_FILE, f"{message}; {_LOST}", fixed=mended) for message in found]


def _problems(database: PassageDatabase) -> list[str]:
    messages = [str(message) for (message,) in database.connection.run("PRAGMA integrity_check(10)")]
    return [] if messages == ["ok"] else messages


def _strays(database: PassageDatabase, *, fix: bool) -> Iterator[Fault]:
    for table, condition in _STRAYS.items():
        ((count,),) = database.connection.run(f"SELECT count(*) FROM {table} WHERE {condition}", (), (int,))
        if not count:
            continue
        if fix:
            database.connection.run(f"DELETE FROM {table} WHERE {condition}")
            if table == "embedding":
                database.bump_stamp()
        yield Fault("stray", f"{DATABASE_FILE}: {table}", f"{count} rows belong to nothing", fixed=fix)
    orphans = "SELECT id FROM passage WHERE document_id NOT IN (SELECT id FROM document)"
    for (passage_id,) in database.connection.run(orphans, (), (str,)):
        yield Fault("missing", f"document of passage {passage_id!r}", f"it is gone; {_AGAIN}")


def _embeddings(database: PassageDatabase) -> Iterator[Fault]:
    sql = "SELECT id FROM passage WHERE row NOT IN (SELECT row FROM embedding)"
    for (passage_id,) in database.connection.run(sql, (), (str,)):
        yield Fault("missing", f"vector of passage {passage_id!r}", f"it cannot be found; {_AGAIN}")
    rows = database.rows()
    for start in range(0, len(rows), _AT_ONCE):
        try:
            database.embeddings(rows[start : start + _AT_ONCE])
        except PassageIndexError:
            yield from _single_embeddings(database, rows[start : start + _AT_ONCE])


def _single_embeddings(database: PassageDatabase, rows: Rows) -> Iterator[Fault]:
    for row in rows:
        try:
            database.embeddings(np.array([row], dtype=np.int64))
        except PassageIndexError as error:
            yield Fault("damaged", f"vector of row {row}", f"{error}")


def _passages(database: PassageDatabase, encoder: Encoder, *, fix: bool) -> Iterator[Fault]:
    """Whether every passage can be read, and the look-up tables say what the passages say."""
    words: Counter[str] = Counter()
    wrong: dict[int, set[bytes]] = {}
    for rows in database.passage_rows():
        try:
            passages = database.passages_at(rows)
        except PassageIndexError:
            passages = {}
            yield from _single_passages(database, rows, passages)
        if isinstance(encoder, StatisticalEncoder):
            words.update(word for some in encoder.passage_terms(list(passages.values())) for word in some)
        facts = _facts(database, rows)
        expected = {row: fact_digests(passage.metadata) for row, passage in passages.items()}
        wrong.update((row, digests) for row, digests in expected.items() if facts.get(row, set()) != digests)
    if wrong:
        if fix:
            database.connection.run_with_list("DELETE FROM fact WHERE row IN (?)", list(wrong))
            pairs = [(digest, row) for row, digests in wrong.items() for digest in digests]
            database.connection.run_many("INSERT INTO fact VALUES (?, ?)", pairs)
        message = (
            f"the metadata of {len(wrong)} passages are looked up under other values, the first in row {min(wrong)}"
        )
        yield Fault("totals", f"{DATABASE_FILE}: fact", message, fixed=fix)
    if isinstance(encoder, StatisticalEncoder):
        yield from _words(database, words, fix=fix)


def _single_passages(database: PassageDatabase, rows: list[int], passages: dict[int, Passage]) -> Iterator[Fault]:
    """Read each alone, into `passages`."""
    for row in rows:
        try:
            passages.update(database.passages_at([row]))
        except PassageIndexError as error:
            yield Fault("damaged", f"passage of row {row}", str(error))


def _facts(database: PassageDatabase, rows: list[int]) -> Mapping[int, set[bytes]]:
    facts: dict[int, set[bytes]] = {}
    for row, digest in database.connection.run_with_list("SELECT row, digest FROM fact WHERE row IN (?)", rows):
        facts.setdefault(row, set()).add(digest)
    return facts


def _words(database: PassageDatabase, words: Counter[str], *, fix: bool) -> Iterator[Fault]:
    counted = dict(database.connection.run("SELECT term, passages FROM term"))
    wrong = [word for word in counted.keys() | words.keys() if counted.get(word) != words.get(word)]
    if not wrong:
        return
    if fix:
        database.connection.run("DELETE FROM term")
        database.connection.run_many("INSERT INTO term VALUES (?, ?)", words.items())
    first = min(wrong, key=repr)
    message = (
        f"the counts of {len(wrong)} words are wrong, the first is {first!r:.60}: said to be in "
        f"{counted.get(first, 0)!r:.20} passages, is in {words.get(first, 0)}"
    )
    yield Fault("totals", f"{DATABASE_FILE}: term", message, fixed=fix)


def check_vector_file(database: PassageDatabase, path: Path, dimension: int, *, fix: bool) -> list[Fault]:
    """What is wrong with the vector file; one that is missing or behind is not, for it is made when it is needed.

    Args:
        database: What it is made from; inside a transaction.
        path: The index's directory.
        dimension: Length of its vectors.
        fix: Write it again, and remove what killed processes left of others.
    """
    faults = list(_unfinished(path, fix=fix))
    file = path / VECTOR_FILE
    try:
        stamp, rows = database.stamp, database.rows()
        problem = _vector_problem(database, file, dimension, stamp=stamp, rows=rows)
        if problem is not None and fix:
            VectorIndex(_kind(file), dimension, database.embedding_chunks(rows)).save(file, stamp)
    except PassageIndexError as error:
        problem, fix = f"it cannot be compared with the database: {error}", False
    except OSError as error:
        problem, fix = f"it is damaged, and cannot be written anew: {error}", False
    return faults if problem is None else [*faults, Fault("damaged", VECTOR_FILE, problem, fixed=fix)]


def _unfinished(path: Path, *, fix: bool) -> Iterator[Fault]:
    for file in sorted(path.glob(f"{VECTOR_FILE}.*.partial")):
        try:
            if time.time() - file.lstat().st_mtime < _UNFINISHED_S:
                continue
            if fix:
                file.unlink()
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Fault("stray", file.name, f"its writer was killed, and it cannot be removed: {error}")
            continue
        yield Fault("stray", file.name, "its writer was killed", fixed=fix)


def _kind(file: Path) -> Kind:
    kind = read_kind(file)
    return "hnsw" if kind == "hnsw" else "ivf" if kind == "ivf" else "flat"


def _vector_problem(database: PassageDatabase, file: Path, dimension: int, *, stamp: str, rows: Rows) -> str | None:
    try:
        loaded = VectorIndex.load(file, _kind(file), dimension, stamp=stamp, rows=rows)
    except VectorFileError as error:
        return None if error.ordinary else str(error)
    wrong = sum(_differing(database, some, vectors) for some, vectors in loaded.vectors())
    return f"{wrong} vectors are not those of the database" if wrong else None


def _differing(database: PassageDatabase, rows: Rows, vectors: Vectors) -> int:
    """How many of these vectors are not those of the database; rows that it has no more may be any."""
    wrong = 0
    order = np.argsort(rows)
    for start in range(0, len(rows), _AT_ONCE):
        some = order[start : start + _AT_ONCE]
        known, true = database.embeddings(rows[some])
        held = vectors[some][np.isin(rows[some], known)]
        wrong += int((held != true).any(axis=1).sum())
    return wrong
