"""The truth of a passage index: what its tables hold, and the statements that read and change them together.

It owns passages, and what must change together with them: embeddings, block keys, document hashes, the facts that
`where` filters look up, term counts, and the stamp that names the state of the vectors. How a file is opened is in
`opening`, how a statement is run and a transaction made in `connection`. Rows are numbered by
AUTOINCREMENT and never used twice, and a row's embedding never changes; so two states differ exactly by the rows they
hold, and whoever follows the database (the FAISS side, here or in another process) catches up by comparing row
numbers. Nothing here knows encoders or FAISS.

Security: a file is data from outside. Its schema must be exactly the one of `schema`, every value is bound, nothing is
pickled, and what is read has the types and the order that were written, or the file is damaged. Passages and vectors
carry checksums, because SQLite's pages do not; they find accidents, not forgers.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from blockrag.encoders.protocol import Vectors
from blockrag.errors import InputError
from blockrag.index.connection import VALUES_AT_ONCE
from blockrag.index.digests import encode_metadata, fact_digest, fact_digests, row_digest
from blockrag.index.opening import open_connection, read_meta
from blockrag.index.records import DocumentInfo
from blockrag.index.vectors import Rows
from blockrag.passage import Passage

__all__ = ["SUPERSEDED", "PassageDatabase", "StoredPassage"]

SUPERSEDED = "superseded"
"""The fingerprint under which a document's mark lies among its content hashes: no fingerprint is this word, and
directories written before there were marks stay readable."""

# The fields of `StoredPassage`, and their checksum.
_PASSAGES = """SELECT row, ordinal, id, title, text, metadata, document_id, digest.passage
               FROM passage LEFT JOIN digest USING (row)"""


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


class PassageDatabase:
    """The SQLite side of one passage index.

    Its `connection` makes the transactions, and is what to close; what the arguments are and what is refused, says
    `open_connection`.
    """

    def __init__(self, path: Path | None, *, encoder: str, dimension: int) -> None:
        self._dimension = dimension
        self.connection = open_connection(path, encoder=encoder, dimension=dimension)

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def stamp(self) -> str:
        """Names the state of the vectors: a counter and a random token, so that no two histories share a stamp."""
        return read_meta(self.connection, "stamp")

    def rows(self) -> Rows:
        """All rows, ascending.

        Raises:
            PassageIndexError: They are not: the file is damaged.
        """
        return self.connection.row_numbers("SELECT row FROM embedding ORDER BY row")

    def count(self) -> tuple[int, int]:
        """Numbers of passages and of documents."""
        (counts,) = self.connection.run("SELECT (SELECT count(*) FROM passage), (SELECT count(*) FROM document)")
        return int(counts[0]), int(counts[1])

    def embeddings(self, rows: Rows) -> tuple[Rows, Vectors]:
        """Those of `rows` that are there, ascending, with their vectors `[n, dimension]` float32."""
        wanted = 4 * self._dimension
        # The length is known without reading the vector, which in a damaged file could be as long as the file.
        sql = f"""SELECT row, CASE WHEN typeof(embedding.vector) = 'blob' AND length(embedding.vector) = {wanted}
                              THEN embedding.vector END, digest.vector
                  FROM embedding LEFT JOIN digest USING (row) WHERE row IN (?)"""
        found = sorted(self.connection.run_with_list(sql, rows.tolist()), key=lambda pair: pair[0])
        for row, vector, digest in found:
            if vector is None:
                raise self.connection.damaged(f"the embedding of row {row} is not {wanted} bytes long")
            if row_digest(row, vector) != digest:
                raise self.connection.damaged(f"the embedding of row {row} fails its checksum")
        matrix = np.frombuffer(b"".join(vector for _, vector, _ in found), dtype="<f4").reshape(-1, self._dimension)
        numbers = np.array([row for row, *_ in found], dtype=np.int64)
        self.connection.check_ascending(numbers)
        if not np.isfinite(matrix).all():
            row = numbers[int(np.argmin(np.isfinite(matrix).all(axis=1)))]
            raise self.connection.damaged(f"the embedding of row {row} is not finite")
        return numbers, matrix.astype(np.float32, copy=False)

    def embedding_chunks(self, rows: Rows) -> Iterator[tuple[Rows, Vectors]]:
        """`embeddings` in chunks of bounded size."""
        for start in range(0, len(rows), VALUES_AT_ONCE):
            yield self.embeddings(rows[start : start + VALUES_AT_ONCE])

    def passages_at(self, rows: Collection[int]) -> dict[int, Passage]:
        """The passages of `rows`, by row; rows that are gone are left out."""
        found = self._checked(self.connection.run_with_list(f"{_PASSAGES} WHERE row IN (?)", rows))
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
        for page in self.connection.pages(f"{_PASSAGES} WHERE row > ? ORDER BY row"):
            yield from map(self._passage, self._checked(page))

    def passage_rows(self) -> Iterator[list[int]]:
        """The rows of all passages, a page at a time."""
        for page in self.connection.pages("SELECT row FROM passage WHERE row > ? ORDER BY row"):
            yield [row for (row,) in page]

    def _checked(self, found: list[Any]) -> list[StoredPassage]:
        """What `_PASSAGES` selects, if it is what was written."""
        for *columns, digest in found:
            if tuple(map(type, columns)) != (int, int, str, str, str, str, str):
                raise self.connection.damaged(f"a row holds {columns!r:.100}")
            if row_digest(*columns) != digest:
                raise self.connection.damaged(f"passage {columns[2]!r:.200} fails its checksum")
        return [StoredPassage(*columns) for *columns, _ in found]

    def _passage(self, stored: StoredPassage) -> Passage:
        try:
            facts = json.loads(stored.metadata)
            if not isinstance(facts, dict):
                raise ValueError(f"a {type(facts).__name__}, not an object")
        except (ValueError, RecursionError) as error:
            raise self.connection.damaged(f"the metadata of passage {stored.id!r:.200} is not JSON") from error
        try:
            return Passage(stored.id, stored.text, stored.title, stored.document_id, facts)
        except InputError as error:
            raise self.connection.damaged(f"passage {stored.id!r:.200} cannot be: {error}") from error

    def stored(self, document_id: str) -> list[StoredPassage]:
        """A document's passages with their rows, in order."""
        return self._checked(
            self.connection.run(f"{_PASSAGES} WHERE document_id = ? ORDER BY ordinal, row", (document_id,))
        )

    def stored_passages(self, passage_ids: Collection[str]) -> list[StoredPassage]:
        """Those of these passages that are there, in no particular order."""
        return self._checked(self.connection.run_with_list(f"{_PASSAGES} WHERE id IN (?)", passage_ids))

    def rows_of(self, passage_ids: Collection[str]) -> dict[str, tuple[int, str]]:
        """Row and document of each of these passages that is there."""
        sql = "SELECT id, row, document_id FROM passage WHERE id IN (?)"
        found = self.connection.run_with_list(sql, passage_ids, (str, int, str))
        return {id: (row, document_id) for id, row, document_id in found}

    def documents(self) -> list[DocumentInfo]:
        """All documents by id."""
        sql = """SELECT document.id, (SELECT count(*) FROM passage WHERE document_id = document.id),
                        coalesce((SELECT content_hash FROM document_hash
                                  WHERE document_id = document.id AND fingerprint = ''), '')
                 FROM document ORDER BY document.id"""
        return [DocumentInfo(*columns) for columns in self.connection.run(sql, (), (str, int, str))]

    def document_hash(self, document_id: str, fingerprint: str) -> str | None:
        """The content hash recorded for a document under a fingerprint; "" for a document without one under ""."""
        sql = """SELECT content_hash FROM document LEFT JOIN document_hash ON document_id = id AND fingerprint = ?
                 WHERE id = ?"""
        found = self.connection.run(sql, (fingerprint, document_id))
        if not found or (found[0][0] is None and fingerprint):
            return None
        return str(found[0][0] or "")

    def superseded(self) -> set[str]:
        """The documents that are marked to be replaced."""
        found = self.connection.run(
            "SELECT document_id FROM document_hash WHERE fingerprint = ?", (SUPERSEDED,), (str,)
        )
        return {document_id for (document_id,) in found}

    def is_document(self, document_id: str) -> bool:
        """Whether the document exists, be it without passages."""
        return bool(self.connection.run("SELECT 1 FROM document WHERE id = ?", (document_id,)))

    def block_keys(self, fingerprint: str | None) -> set[str]:
        """All block keys, or those recorded under one fingerprint."""
        if fingerprint is None:
            return {key for (key,) in self.connection.run("SELECT DISTINCT key FROM block", (), (str,))}
        sql = "SELECT DISTINCT key FROM block WHERE fingerprint = ?"
        return {key for (key,) in self.connection.run(sql, (fingerprint,), (str,))}

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
                values.append(fact_digest(name, value))
        found = self.connection.run(" INTERSECT ".join(clauses), values, (int,))
        return np.array(sorted(row for (row,) in found), dtype=np.int64)

    # -- writing, inside a transaction --------------------------------------------------------------------------------

    def bump_stamp(self) -> None:
        """Name a new state of the vectors."""
        stamp = self.stamp
        number, _, _ = stamp.partition(":")
        if not (number.isascii() and number.isdigit() and len(number) < 20):
            raise self.connection.damaged(f"its stamp is {stamp!r:.60}")
        self.connection.run(
            "UPDATE meta SET value = ? WHERE name = 'stamp'", (f"{int(number) + 1}:{secrets.token_hex(8)}",)
        )

    def insert(self, passage: Passage, ordinal: int, vector: Vectors) -> int:
        """Insert one passage with its vector `[dimension]` float32; returns its row."""
        metadata = encode_metadata(passage)
        sql = "INSERT INTO passage (id, document_id, ordinal, title, text, metadata) VALUES (?, ?, ?, ?, ?, ?)"
        values = (passage.id, passage.document_id, ordinal, passage.title, passage.text, metadata)
        row = self.connection.insert(sql, values)
        blob = vector.astype("<f4", copy=False).tobytes()
        self.connection.run("INSERT INTO embedding VALUES (?, ?)", (row, blob))
        digest = row_digest(row, ordinal, passage.id, passage.title, passage.text, metadata, passage.document_id)
        self.connection.run("INSERT INTO digest VALUES (?, ?, ?)", (row, digest, row_digest(row, blob)))
        self._insert_facts(row, metadata)
        return row

    def revise(self, stored: StoredPassage, passage: Passage, ordinal: int) -> None:
        """Give a kept passage the place and the metadata it has now."""
        metadata = encode_metadata(passage)
        if (ordinal, metadata) == (stored.ordinal, stored.metadata):
            return
        self.connection.run(
            "UPDATE passage SET ordinal = ?, metadata = ? WHERE row = ?", (ordinal, metadata, stored.row)
        )
        digest = row_digest(stored.row, ordinal, stored.id, stored.title, stored.text, metadata, stored.document_id)
        self.connection.run("UPDATE digest SET passage = ? WHERE row = ?", (digest, stored.row))
        if metadata != stored.metadata:
            self.connection.run("DELETE FROM fact WHERE row = ?", (stored.row,))
            self._insert_facts(stored.row, metadata)

    def _insert_facts(self, row: int, metadata: str) -> None:
        self.connection.run_many(
            "INSERT INTO fact VALUES (?, ?)", [(digest, row) for digest in fact_digests(json.loads(metadata))]
        )

    def delete(self, rows: Sequence[int]) -> set[str]:
        """Delete passages with all that hangs on them; returns the block keys they had."""
        keys = {key for (key,) in self.connection.run_with_list("SELECT key FROM block WHERE row IN (?)", rows, (str,))}
        self.connection.run_with_list("DELETE FROM passage WHERE row IN (?)", rows)
        return keys

    def put_document(self, document_id: str) -> None:
        """Make sure the document exists."""
        self.connection.run("INSERT OR IGNORE INTO document VALUES (?)", (document_id,))

    def delete_document(self, document_id: str) -> None:
        """Delete a document whose passages are deleted."""
        self.connection.run("DELETE FROM document WHERE id = ?", (document_id,))

    def delete_if_empty(self, document_ids: Collection[str]) -> None:
        """Delete those of these documents that have no passages."""
        sql = """DELETE FROM document WHERE id IN (?)
                 AND NOT EXISTS (SELECT 1 FROM passage WHERE document_id = document.id)"""
        self.connection.run_with_list(sql, document_ids)

    def delete_everything(self) -> set[str]:
        """Delete all documents with all that hangs on them; returns the block keys they had."""
        keys = self.block_keys(None)
        self.connection.run("DELETE FROM document")
        self.connection.run("DELETE FROM term")
        return keys

    def forget_hashes(self, document_id: str) -> None:
        """Drop all content hashes of a document, because its passages changed; a mark stays."""
        self.connection.run(
            "DELETE FROM document_hash WHERE document_id = ? AND fingerprint != ?", (document_id, SUPERSEDED)
        )

    def mark_superseded(self, document_id: str) -> None:
        """Mark a document that exists."""
        self.set_hash(document_id, SUPERSEDED, "")

    def unmark_superseded(self, document_id: str) -> None:
        """Take the mark from a document that may have one."""
        self.connection.run(
            "DELETE FROM document_hash WHERE document_id = ? AND fingerprint = ?", (document_id, SUPERSEDED)
        )

    def set_hash(self, document_id: str, fingerprint: str, content_hash: str) -> None:
        """Record what a document was replaced with under a fingerprint."""
        self.connection.run(
            "INSERT OR REPLACE INTO document_hash VALUES (?, ?, ?)", (document_id, fingerprint, content_hash)
        )

    def set_blocks(self, row: int, fingerprint: str, keys: Sequence[str]) -> set[str]:
        """Replace a passage's block keys under a fingerprint; returns the keys it had."""
        found = self.connection.run(
            "SELECT key FROM block WHERE row = ? AND fingerprint = ?", (row, fingerprint), (str,)
        )
        self.connection.run("DELETE FROM block WHERE row = ? AND fingerprint = ?", (row, fingerprint))
        self.connection.run_many(
            "INSERT INTO block VALUES (?, ?, ?, ?)", [(row, fingerprint, i, key) for i, key in enumerate(keys)]
        )
        return {key for (key,) in found}

    def unused(self, keys: Collection[str]) -> frozenset[str]:
        """Those of `keys` that no passage has any more."""
        used = {
            key
            for (key,) in self.connection.run_with_list("SELECT DISTINCT key FROM block WHERE key IN (?)", keys, (str,))
        }
        return frozenset(keys) - used

    def count_terms(self, changes: Mapping[str, int]) -> None:
        """Add to the number of passages that hold each term; terms left in none are dropped."""
        sql = """INSERT INTO term VALUES (?, ?)
                 ON CONFLICT (term) DO UPDATE SET passages = passages + excluded.passages"""
        self.connection.run_many(sql, [(term, change) for term, change in changes.items() if change])
        if any(change < 0 for change in changes.values()):
            self.connection.run_with_list(
                "DELETE FROM term WHERE passages <= 0 AND term IN (?)", [t for t, c in changes.items() if c < 0]
            )

    def term_counts(self, terms: Collection[str]) -> dict[str, int]:
        """How many passages hold each of `terms`; terms in none are left out."""
        counts = dict(
            self.connection.run_with_list("SELECT term, passages FROM term WHERE term IN (?)", terms, (str, int))
        )
        for term, count in counts.items():
            if count < 1:
                raise self.connection.damaged(f"{count} passages are said to hold {term!r}")
        return counts
