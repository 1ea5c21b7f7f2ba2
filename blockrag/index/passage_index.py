"""`PassageIndex`: passages found by meaning, kept in step with documents that come, change and go.

It joins the database (the truth) with the searchable vectors (derived), and says what may be asked of them: its methods
are the contract, and refuse what cannot be stored; `writing` and `searching` do the work. It knows no language model
and no block store; of KV states it keeps only the keys, so that they can be dropped when their last passage goes.

A document may be marked as superseded: it answers until its next version is added, which then replaces it in one
transaction. That serves callers who must say "delete" before they have the new version.

Consistency: a write is one SQLite transaction, so a killed process leaves either all of it or nothing. Before every
search the stamp of the database is compared with the stamp of the vectors, and what other processes committed is
caught up with. Inside a process, searches run side by side and exclude only the moment in which a write lands.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np

from blockrag.encoders.protocol import Encoder, Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index.database import PassageDatabase
from blockrag.index.embedding import given_vectors
from blockrag.index.files import DATABASE_FILE, bytes_in, make_directory, refuse_emptied
from blockrag.index.following import FollowingVectors
from blockrag.index.opening import peek
from blockrag.index.records import Change, DocumentInfo, DocumentUpdate, IndexOrigin, IndexStats
from blockrag.index.searching import Searcher
from blockrag.index.updates import additions, storable
from blockrag.index.vectors import Kind, VectorIndex
from blockrag.index.writing import Writer
from blockrag.passage import Hit, Passage

if TYPE_CHECKING:
    from blockrag.index.checking import IndexReport

__all__ = ["PassageIndex"]

_log = logging.getLogger(__name__)


class PassageIndex:
    """Passages with their embeddings: add, replace, delete, search.

    Safe to use from several threads, and from several processes on one directory (SQLite's locking must work there:
    no network file systems).

    Args:
        encoder: Embeds passages and questions. An existing index opens only with the encoder that built it.
        path: The index's directory, made when missing; None keeps everything in memory.
        kind: "flat" is exact; "hnsw" and "ivf" are approximate and faster on millions of passages. The kind is how
            the vectors are searched, not what is stored: an index may be opened with another kind, which rebuilds.

    Raises:
        PassageIndexError: The directory holds a damaged index, another encoder's, or something else.
        InputError: The kind is unknown.
    """

    def __init__(self, encoder: Encoder, path: str | Path | None = None, *, kind: Kind = "flat") -> None:
        self._encoder = encoder
        self._path = Path(path) if path is not None else None
        self._closed = False
        # Refuses an unknown kind before anything is made on disk.
        empty = VectorIndex(kind, encoder.dimension)
        if self._path is not None:
            make_directory(self._path)
            refuse_emptied(self._path)
        database_file = self._path / DATABASE_FILE if self._path is not None else None
        self._database = PassageDatabase(database_file, encoder=encoder.name, dimension=encoder.dimension)
        try:
            self._vectors = FollowingVectors(self._database, empty, self._path)
        except BaseException:
            self._database.connection.close()
            raise
        self._writer = Writer(encoder, self._database, self._vectors)
        self._searcher = Searcher(encoder, self._database, self._vectors)

    @classmethod
    def peek(cls, path: str | Path) -> IndexOrigin | None:
        """What built the index in a directory, for callers who must choose an encoder before they can open it.

        Returns:
            None when there is no index yet.

        Raises:
            PassageIndexError: The directory holds something else, or cannot be read.
        """
        found = peek(Path(path) / DATABASE_FILE)
        return None if found is None else IndexOrigin(*found)

    # -- writing ------------------------------------------------------------------------------------------------------

    def replace_document(
        self,
        document_id: str,
        passages: Sequence[Passage],
        *,
        content_hash: str = "",
        block_keys: Mapping[str, Sequence[str]] | None = None,
        fingerprint: str = "",
    ) -> Change:
        """Make a document consist of exactly these passages, in this order; all or nothing.

        Passages with the id, title and text of one that is there keep its row and embedding (their metadata is
        updated); the rest are embedded in one batch. An empty sequence keeps the document, without passages.

        Args:
            document_id: The document; every passage must carry it.
            passages: All passages of the document.
            content_hash: Kept for `document_hash`.
            block_keys: Passage id -> keys of its blocks; passages left out keep the keys they have.
            fingerprint: What the keys were computed under.

        Raises:
            InputError: A passage id occurs twice or belongs to another document, a passage names another document,
                or metadata is not JSON-serialisable. Nothing is changed.
            PassageIndexError: The database is damaged, locked or closed. Nothing is changed.
        """
        return self.replace_documents([DocumentUpdate(document_id, passages, content_hash, block_keys, fingerprint)])

    def replace_documents(self, documents: Sequence[DocumentUpdate]) -> Change:
        """`replace_document` for many documents in one embedding batch and one transaction.

        Raises:
            InputError: As `replace_document`; also when a document occurs twice.
            PassageIndexError: As `replace_document`.
        """
        return self._writer.update(documents, replace=True)

    def add(
        self,
        passages: Sequence[Passage],
        *,
        vectors: Vectors | None = None,
        block_keys: Mapping[str, Sequence[str]] | None = None,
        fingerprint: str = "",
    ) -> Change:
        """Add passages to their documents, in one embedding batch and one transaction.

        Other passages of those documents stay, unless the document is marked as superseded: then it has only these
        afterwards, and no mark. A passage whose id is there already is kept when title and text are equal, and
        replaced when not. Documents that change lose their recorded content hash.

        Args:
            passages: The passages, of any documents.
            vectors: `[len(passages), dimension]` float32 made elsewhere; None has the encoder embed. A passage is
                then kept only when its vector is equal as well, and one that another document has moves to its new
                document.
            block_keys: As in `replace_document`.
            fingerprint: What the keys were computed under.

        Raises:
            InputError: A passage id occurs twice or (without vectors) belongs to another document, metadata is not
                JSON-serialisable, or the vectors have another shape or are not finite. Nothing is changed.
            PassageIndexError: The database is damaged, locked or closed. Nothing is changed.
        """
        given = None if vectors is None else given_vectors(self._encoder, passages, vectors)
        return self._writer.update(additions(passages, block_keys, fingerprint), replace=False, given=given)

    def delete_document(self, document_id: str) -> Change:
        """Delete a document and its passages; an unknown document is no error and changes nothing."""
        storable("document id", document_id)
        return self._writer.delete_document(document_id)

    def delete_passages(self, passage_ids: Collection[str]) -> Change:
        """Delete passages in one transaction, and the documents whose last passage goes; unknown ids are ignored.

        Documents that lose passages lose their recorded content hash.

        Raises:
            InputError: `passage_ids` is a string, whose letters would be ids.
        """
        if isinstance(passage_ids, str):
            raise InputError(f"passage ids are the string {passage_ids!r}; pass [{passage_ids!r}]")
        for passage_id in passage_ids:
            storable("passage id", passage_id)
        return self._writer.delete_passages(passage_ids)

    def clear(self) -> Change:
        """Delete everything."""
        return self._writer.clear()

    def mark_superseded(self, document_id: str) -> bool:
        """Announce that a document will be replaced; until then it answers, also after a restart.

        The next `add` or `replace_document` of the document replaces all it has and takes the mark away;
        `drop_superseded` deletes it if that does not come. Its recorded content hash is forgotten.

        Returns:
            Whether there is such a document; an unknown one is not marked.
        """
        storable("document id", document_id)
        return self._writer.mark_superseded(document_id)

    def superseded(self) -> set[str]:
        """The documents that are marked."""
        return self._database.superseded()

    def drop_superseded(self, document_ids: Collection[str] | None = None) -> Change:
        """Delete the documents that are marked still: all of them, or those among `document_ids`."""
        return self._writer.drop_superseded(document_ids)

    def set_block_keys(self, passage_id: str, fingerprint: str, keys: Sequence[str]) -> Change:
        """Record which blocks hold a passage's KV states under a fingerprint; replaces those recorded before.

        Raises:
            InputError: There is no such passage.
        """
        for name, value in (("passage id", passage_id), ("fingerprint", fingerprint), *(("key", key) for key in keys)):
            storable(name, value)
        return self._writer.set_block_keys(passage_id, fingerprint, keys)

    # -- searching ----------------------------------------------------------------------------------------------------

    def search(self, question: str, k: int = 5, *, where: Mapping[str, object] | None = None) -> list[Hit]:
        """The `k` passages most similar to a question, best first.

        Args:
            question: The question. One that the encoder gives a zero vector (for the lexical encoder: no word in
                common with the corpus) finds nothing.
            k: How many; fewer are returned when there are fewer.
            where: Metadata that hits must have, by equality; "document_id" means the passage's own. Exact for every
                kind of index. 2 equals 2.0; 1 does not equal True.

        Returns:
            Hits by falling score, equal scores by the order in which the passages were added.

        Raises:
            InputError: `k` is less than 1, or a value of `where` is not JSON-serialisable.
            PassageIndexError: The database is damaged, locked or closed.
        """
        return self._searcher.search_many([question], k, where)[0]

    def search_many(
        self, questions: Sequence[str], k: int = 5, *, where: Mapping[str, object] | None = None
    ) -> list[list[Hit]]:
        """`search` for many questions at once; equal to searching each alone."""
        return self._searcher.search_many(questions, k, where)

    def search_vectors(
        self,
        queries: Vectors,
        k: int = 5,
        *,
        where: Mapping[str, object] | None = None,
        passage_ids: Collection[str] | None = None,
    ) -> list[list[Hit]]:
        """The `k` passages of greatest inner product with each query vector, best first.

        Args:
            queries: `[n, dimension]` float32. A zero vector finds nothing.
            k: How many; fewer are returned when there are fewer.
            where: As in `search`.
            passage_ids: Only these passages, exact for every kind of index; unknown ids find nothing.

        Returns:
            For each query its hits, ordered as `search` orders them.

        Raises:
            InputError: `k` is less than 1, the vectors have another shape or are not finite, or a value of `where` is
                not JSON-serialisable.
            PassageIndexError: The database is damaged, locked or closed.
        """
        return self._searcher.search_vectors(queries, k, where, passage_ids)

    # -- the index as a whole -----------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the vector file, so that the next opening loads it instead of rebuilding.

        Raises:
            PassageIndexError: The index is in memory only, or the file cannot be written (the index stays usable).
        """
        with self._writer.lock:
            self._vectors.save()

    def copy_to(self, path: str | Path) -> None:
        """Make `path` a copy of this index, from which another `PassageIndex` opens; what it held is replaced.

        Raises:
            PassageIndexError: `path` is this index's own directory, is in use, or cannot be written.
        """
        target = Path(path)
        make_directory(target)
        if self._path is not None and target.resolve() == self._path.resolve():
            raise PassageIndexError(f"{str(path)!r} is this index's own directory; call save(), or pass another")
        self._database.connection.copy_to(target / DATABASE_FILE)

    def verify(self, *, fix: bool = False) -> IndexReport:
        """Check the database, what it keeps for looking up and counting, and the vector file against it.

        Reads everything; nothing else uses this object meanwhile. A vector file that is missing or behind is no fault.

        Args:
            fix: Make again what follows from the passages: look-up tables, word counts, the vector file.

        Raises:
            PassageIndexError: The database is locked or closed.
        """
        from blockrag.index.checking import IndexReport, check_database, check_vector_file

        with self._writer.lock, self._vectors.lock.writing(), self._database.connection.transaction(writing=fix):
            faults = check_database(self._database, self._encoder, fix=fix)
            if self._path is not None:
                faults += check_vector_file(self._database, self._path, self._encoder.dimension, fix=fix)
                self._vectors.distrust_file()
            where = "memory" if self._path is None else str(self._path)
            return IndexReport.of(self._database, where, self._encoder.name, faults)

    def close(self) -> None:
        """Save and close; closing again does nothing."""
        if self._closed:
            return
        self._closed = True
        try:
            if self._path is not None:
                self.save()
        except PassageIndexError as error:
            # The vector file is derived: without it the next opening is slower, nothing else.
            _log.warning("closing without saving the vectors: %s", error)
        finally:
            with self._writer.lock, self._vectors.lock.writing():
                self._database.connection.close()

    def __enter__(self) -> PassageIndex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- looking up ---------------------------------------------------------------------------------------------------

    def get(self, passage_id: str) -> Passage | None:
        """The passage of this id, or None."""
        storable("passage id", passage_id)
        return self._database.passage(passage_id)

    def vectors_of(self, passage_ids: Collection[str]) -> dict[str, Vectors]:
        """The stored vector `[dimension]` float32 of each of these passages that is there."""
        for passage_id in passage_ids:
            storable("passage id", passage_id)
        with self._database.connection.transaction(writing=False):
            ids = {row: passage_id for passage_id, (row, _) in self._database.rows_of(set(passage_ids)).items()}
            rows, vectors = self._database.embeddings(np.array(sorted(ids), dtype=np.int64))
        return {ids[row]: vector for row, vector in zip(rows.tolist(), vectors, strict=True)}

    def passages(self, document_id: str | None = None) -> Iterator[Passage]:
        """A document's passages in reading order (none when it is unknown), or all in the order they were added."""
        if document_id is not None:
            storable("document id", document_id)
        return self._database.passages(document_id)

    def documents(self) -> list[DocumentInfo]:
        """All documents, by id."""
        return self._database.documents()

    def document_hash(self, document_id: str, fingerprint: str = "") -> str | None:
        """The content hash a document was last replaced with.

        Args:
            document_id: The document.
            fingerprint: Only if that replacement, or an earlier one of the same passages, was under this fingerprint,
                that is, gave them their block keys; "" asks for any.

        Returns:
            None when the document is unknown, or was not replaced under the fingerprint. "" when it is known but has
            no hash: it came or was changed by `add`.
        """
        storable("document id", document_id)
        storable("fingerprint", fingerprint)
        return self._database.document_hash(document_id, fingerprint)

    def block_keys(self, fingerprint: str | None = None) -> set[str]:
        """All block keys in use, or those recorded under one fingerprint."""
        if fingerprint is not None:
            storable("fingerprint", fingerprint)
        return self._database.block_keys(fingerprint)

    def __len__(self) -> int:
        return self._database.count()[0]

    def __contains__(self, passage_id: object) -> bool:
        return isinstance(passage_id, str) and self.get(passage_id) is not None

    def stats(self) -> IndexStats:
        """Sizes of the index."""
        passages, documents = self._database.count()
        size = self._database.connection.size_bytes() if self._path is None else bytes_in(self._path)
        return IndexStats(
            passages, documents, self._encoder.dimension, self._encoder.name, self._vectors.index.kind, size
        )
