"""`PassageIndex`: passages found by meaning, kept in step with documents that come, change and go.

It joins the database (the truth) with the searchable vectors (derived), decides what a write changes, and asks the
encoder for exactly the vectors that are missing, unless the caller brings them. It knows no language model and no
block store; of KV states it keeps only the keys, so that they can be dropped when their last passage goes.

A document may be marked as superseded: it answers until its next version is added, which then replaces it in one
transaction. That serves callers who must say "delete" before they have the new version.

Consistency: a write is one SQLite transaction, so a killed process leaves either all of it or nothing. Before every
search the stamp of the database is compared with the stamp of the vectors, and what other processes committed is
caught up with. Inside a process, searches run side by side and exclude only the moment in which a write lands.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from blockrag.encoders.given import as_vectors
from blockrag.encoders.protocol import Encoder, RescoringEncoder, StatisticalEncoder, Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index.database import PassageDatabase, StoredPassage, TermCounts, peek
from blockrag.index.files import DATABASE_FILE, VECTOR_FILE, make_private, refuse_emptied
from blockrag.index.locks import ReadWriteLock
from blockrag.index.nearest import nearest_rows
from blockrag.index.records import Change, DocumentInfo, DocumentUpdate, IndexOrigin, IndexStats
from blockrag.index.updates import Plan, check_updates, plan_document, storable
from blockrag.index.vectors import Kind, Rows, VectorFileError, VectorIndex
from blockrag.passage import Hit, Passage

if TYPE_CHECKING:
    from blockrag.index.checking import IndexReport

__all__ = ["PassageIndex"]

_log = logging.getLogger(__name__)

_QUERIES_AT_ONCE = 64
_WORN = "most of what they were built from has changed"


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
        self._kind = kind
        self._path = Path(path) if path is not None else None
        self._lock = ReadWriteLock()
        self._writer = threading.Lock()
        self._vectors = VectorIndex(kind, encoder.dimension)
        self._closed = False
        if self._path is not None:
            _make_directory(self._path)
            refuse_emptied(self._path)
        database_file = self._path / DATABASE_FILE if self._path is not None else None
        self._database = PassageDatabase(database_file, encoder=encoder.name, dimension=encoder.dimension)
        # The database state the vectors in memory are, and the one in the vector file; "" is neither.
        self._stamp = self._saved_stamp = ""
        try:
            self._load()
        except BaseException:
            self._database.close()
            raise

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
        return self._write(documents, replace=True)

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
        given = None if vectors is None else self._given(passages, vectors)
        grouped: dict[str, list[Passage]] = {}
        for passage in passages:
            grouped.setdefault(passage.document_id, []).append(passage)
        unknown = set(block_keys or ()) - {passage.id for passage in passages}
        if unknown:
            raise InputError(f"block keys are given for passage {min(unknown)!r}, which is not among those added")
        updates = []
        for name, group in grouped.items():
            keys = {passage.id: block_keys[passage.id] for passage in group if block_keys and passage.id in block_keys}
            updates.append(DocumentUpdate(name, group, block_keys=keys, fingerprint=fingerprint))
        return self._write(updates, replace=False, given=given)

    def delete_document(self, document_id: str) -> Change:
        """Delete a document and its passages; an unknown document is no error and changes nothing."""
        storable("document id", document_id)
        return self._delete_documents(lambda: [document_id])

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
        with self._writer, self._lock.writing():
            with self._database.transaction():
                before = self._database.stamp
                stored = self._database.stored_passages(set(passage_ids))
                keys = self._delete(stored)
                self._leave({passage.document_id for passage in stored})
                change, after = self._deleted(stored, keys)
            self._apply(before, after, gone=[passage.row for passage in stored])
        return change

    def clear(self) -> Change:
        """Delete everything."""
        with self._writer, self._lock.writing():
            with self._database.transaction():
                before, rows = self._database.stamp, self._database.rows().tolist()
                keys = self._database.delete_everything()
                if rows:
                    self._database.bump_stamp()
                after = self._database.stamp
            self._apply(before, after, gone=rows)
        return Change(removed=len(rows), orphaned_block_keys=frozenset(keys))

    def mark_superseded(self, document_id: str) -> bool:
        """Announce that a document will be replaced; until then it answers, also after a restart.

        The next `add` or `replace_document` of the document replaces all it has and takes the mark away;
        `drop_superseded` deletes it if that does not come. Its recorded content hash is forgotten.

        Returns:
            Whether there is such a document; an unknown one is not marked.
        """
        storable("document id", document_id)
        with self._writer, self._database.transaction():
            if not self._database.is_document(document_id):
                return False
            self._database.forget_hashes(document_id)
            self._database.mark_superseded(document_id)
            return True

    def superseded(self) -> set[str]:
        """The documents that are marked."""
        return self._database.superseded()

    def drop_superseded(self, document_ids: Collection[str] | None = None) -> Change:
        """Delete the documents that are marked still: all of them, or those among `document_ids`."""

        def marked() -> list[str]:
            found = self._database.superseded()
            return sorted(found if document_ids is None else found.intersection(document_ids))

        return self._delete_documents(marked)

    def _delete_documents(self, choose: Callable[[], Sequence[str]]) -> Change:
        """Delete the documents that `choose` names inside the transaction."""
        with self._writer, self._lock.writing():
            with self._database.transaction():
                before, names = self._database.stamp, choose()
                stored = [passage for name in names for passage in self._database.stored(name)]
                keys = self._delete(stored)
                for name in names:
                    self._database.delete_document(name)
                change, after = self._deleted(stored, keys)
            self._apply(before, after, gone=[passage.row for passage in stored])
        return change

    def _deleted(self, stored: Sequence[StoredPassage], keys: Collection[str]) -> tuple[Change, str]:
        """The change that these deletions are, and the stamp after it; still inside the transaction."""
        if stored:
            self._database.bump_stamp()
        return Change(removed=len(stored), orphaned_block_keys=self._database.unused(keys)), self._database.stamp

    def _leave(self, document_ids: Collection[str]) -> None:
        """Forget the hashes of documents that lost passages, and documents that lost their last one."""
        for document_id in document_ids:
            self._database.forget_hashes(document_id)
        self._database.delete_if_empty(document_ids)

    def set_block_keys(self, passage_id: str, fingerprint: str, keys: Sequence[str]) -> Change:
        """Record which blocks hold a passage's KV states under a fingerprint; replaces those recorded before.

        Raises:
            InputError: There is no such passage.
        """
        for name, value in (("passage id", passage_id), ("fingerprint", fingerprint), *(("key", key) for key in keys)):
            storable(name, value)
        with self._writer, self._database.transaction():
            found = self._database.rows_of([passage_id]).get(passage_id)
            if found is None:
                raise InputError(f"there is no passage {passage_id!r}; add it before setting its block keys")
            before = self._database.set_blocks(found[0], fingerprint, keys)
            return Change(kept=1, orphaned_block_keys=self._database.unused(before))

    def _write(self, documents: Sequence[DocumentUpdate], *, replace: bool, given: _ById | None = None) -> Change:
        check_updates(documents)
        if not documents:
            return Change()
        vectors: dict[str, Vectors] = dict(given or {})
        with self._writer:
            while True:
                with self._database.transaction(writing=False):
                    plans = self._plan(documents, replace=replace, given=given)
                # Embedding is slow: it happens outside transactions and beside searches. Should another process
                # change these documents meanwhile, the plan made inside the transaction asks for more: once more then.
                self._embed([passage for plan in plans for _, passage in plan.fresh], vectors)
                with self._lock.writing():
                    change = self._commit(documents, vectors, replace=replace, given=given)
                if change is not None:
                    return change

    def _plan(self, documents: Sequence[DocumentUpdate], *, replace: bool, given: _ById | None) -> list[Plan]:
        """What each document's update means for the passages stored now."""
        marked = self._database.superseded()
        plans = []
        for update in documents:
            stored = self._database.stored(update.document_id)
            changed = frozenset[str]() if given is None else self._with_other_vectors(stored, given)
            plans.append(plan_document(update, stored, replace or update.document_id in marked, changed))
        leaving = {passage.row for plan in plans for passage in plan.gone}
        fresh = {passage.id: plan for plan in plans for _, passage in plan.fresh}
        for passage in self._database.stored_passages(fresh):
            if passage.row in leaving:
                continue
            if given is None:
                raise InputError(
                    f"passage id {passage.id!r} of document {fresh[passage.id].document_id!r} belongs to document "
                    f"{passage.document_id!r} already; ids are unique in an index: put the document id into the "
                    "passage id"
                )
            fresh[passage.id].gone.append(passage)
        return plans

    def _given(self, passages: Sequence[Passage], vectors: Vectors) -> _ById:
        """Vectors from outside by passage id, checked."""
        checked = self._checked_vectors(vectors, what="vectors")
        if len(checked) != len(passages):
            raise InputError(f"{len(checked)} vectors are given for {len(passages)} passages; pass one for each")
        return {passage.id: vector for passage, vector in zip(passages, checked, strict=True)}

    def _checked_vectors(self, vectors: Vectors, *, what: str) -> Vectors:
        """`[n, dimension]` float32, finite."""
        array = as_vectors(vectors, what=what)
        if array.shape[:1] == (0,):
            return np.zeros((0, self._encoder.dimension), dtype=np.float32)
        if array.ndim != 2 or array.shape[1] != self._encoder.dimension:
            raise InputError(
                f"{what} have shape {array.shape}, but the index of {self._encoder.name!r} holds "
                f"{self._encoder.dimension} dimensions: use the embedding model that built it, or a new index"
            )
        if not np.isfinite(array).all():
            row = int(np.argmin(np.isfinite(array).all(axis=1)))
            raise InputError(f"{what}: row {row} is not finite; check the embedding model's precision and weights")
        return array

    def _with_other_vectors(self, stored: Sequence[StoredPassage], given: _ById) -> frozenset[str]:
        """The ids of the stored passages whose vector is not the one that is given."""
        ids = {passage.row: passage.id for passage in stored if passage.id in given}
        rows, vectors = self._database.embeddings(np.array(sorted(ids), dtype=np.int64))
        pairs = zip(rows.tolist(), vectors, strict=True)
        return frozenset(ids[row] for row, vector in pairs if not np.array_equal(vector, given[ids[row]]))

    def _embed(self, passages: Sequence[Passage], vectors: dict[str, Vectors]) -> None:
        """Add the vectors that `vectors` lacks, by passage id; equal texts are embedded once."""
        missing = [passage for passage in passages if passage.id not in vectors]
        first = {(passage.title, passage.text): passage for passage in reversed(missing)}
        distinct = list(first.values())[::-1]
        if not distinct:
            return
        embedded = self._encoder.encode_passages(distinct)
        if embedded.shape != (len(distinct), self._encoder.dimension):
            raise PassageIndexError(
                f"encoder {self._encoder.name!r} gave vectors of shape {embedded.shape} for {len(distinct)} passages, "
                f"not ({len(distinct)}, {self._encoder.dimension}); fix the encoder"
            )
        finite = np.isfinite(embedded).all(axis=1)
        if not finite.all():
            culprit = distinct[int(np.argmin(finite))]
            raise PassageIndexError(
                f"encoder {self._encoder.name!r} gave a vector that is not finite for passage {culprit.id!r}; check "
                "the encoder's precision and weights"
            )
        by_text = {
            (passage.title, passage.text): vector
            for passage, vector in zip(distinct, embedded.astype(np.float32, copy=False), strict=True)
        }
        vectors.update((passage.id, by_text[passage.title, passage.text]) for passage in missing)

    def _commit(
        self, documents: Sequence[DocumentUpdate], vectors: _ById, *, replace: bool, given: _ById | None
    ) -> Change | None:
        """One transaction and its effect on the vectors; None, and nothing done, when a vector is missing."""
        with self._database.transaction():
            before = self._database.stamp
            plans = self._plan(documents, replace=replace, given=given)
            if any(passage.id not in vectors for plan in plans for _, passage in plan.fresh):
                return None
            leaving = [passage for plan in plans for passage in plan.gone]
            keys = self._delete(leaving)
            new: dict[int, Vectors] = {}
            for update, plan in zip(documents, plans, strict=True):
                new.update(self._insert(update, plan, vectors))
                keys |= self._set_blocks(update)
                self._set_hashes(update, changed=plan.changes, replace=replace)
            # What moved to another document came out of one that is not in this update.
            self._leave({passage.document_id for passage in leaving} - {update.document_id for update in documents})
            self._count_terms([p for plan in plans for _, p in plan.fresh], +1)
            gone = [passage.row for passage in leaving]
            if new or gone:
                self._database.bump_stamp()
            orphans = self._database.unused(keys)
            after = self._database.stamp
        self._apply(before, after, gone=gone, new=new)
        kept = sum(len(plan.kept) for plan in plans)
        return Change(added=len(new), kept=kept, removed=len(gone), orphaned_block_keys=orphans)

    def _insert(self, update: DocumentUpdate, plan: Plan, vectors: _ById) -> dict[int, Vectors]:
        self._database.put_document(update.document_id)
        for ordinal, stored, passage in plan.kept:
            self._database.revise(stored, passage, ordinal)
        new: dict[int, Vectors] = {}
        for ordinal, passage in plan.fresh:
            vector = vectors[passage.id]
            new[self._database.insert(passage, ordinal, vector)] = vector
        return new

    def _delete(self, stored: Sequence[StoredPassage]) -> set[str]:
        """Delete passages and uncount their terms; returns the block keys they had."""
        passages = [Passage(id=passage.id, text=passage.text, title=passage.title) for passage in stored]
        self._count_terms(passages, -1)
        return self._database.delete([passage.row for passage in stored])

    def _set_blocks(self, update: DocumentUpdate) -> set[str]:
        """Record an update's block keys; returns the keys they replace."""
        replaced: set[str] = set()
        found = self._database.rows_of(list(update.block_keys or {}))
        for passage_id, keys in (update.block_keys or {}).items():
            replaced |= self._database.set_blocks(found[passage_id][0], update.fingerprint, keys)
        return replaced

    def _set_hashes(self, update: DocumentUpdate, *, changed: bool, replace: bool) -> None:
        self._database.unmark_superseded(update.document_id)
        if changed:
            self._database.forget_hashes(update.document_id)
        if replace:
            for fingerprint in {"", update.fingerprint}:
                self._database.set_hash(update.document_id, fingerprint, update.content_hash)

    def _count_terms(self, passages: Sequence[Passage], sign: int) -> None:
        if isinstance(self._encoder, StatisticalEncoder) and passages:
            counts = Counter(term for terms in self._encoder.passage_terms(passages) for term in terms)
            self._database.count_terms({term: sign * count for term, count in counts.items()})

    def _apply(self, before: str, after: str, *, gone: Sequence[int], new: Mapping[int, Vectors] | None = None) -> None:
        """Bring a committed write into the vectors; the write lock is held."""
        if before != self._stamp:
            # Another process wrote before us: the next search catches up with both.
            return
        self._stamp = ""
        self._vectors.remove(np.array(gone, dtype=np.int64))
        if new:
            self._vectors.add(np.array(list(new), dtype=np.int64), np.stack(list(new.values())))
        self._stamp = after
        if self._vectors.worn:
            self._rebuild(_WORN)

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
        return self.search_many([question], k, where=where)[0]

    def search_many(
        self, questions: Sequence[str], k: int = 5, *, where: Mapping[str, object] | None = None
    ) -> list[list[Hit]]:
        """`search` for many questions at once; equal to searching each alone."""
        _check_search(k, where)
        self._catch_up()
        queries = self._encode_queries(questions)
        hits: list[list[Hit]] = []
        with self._lock.reading():
            allowed = self._database.matching(where) if where else None
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                some = slice(start, start + _QUERIES_AT_ONCE)
                hits += self._hits(questions[some], queries[some], k, allowed)
        return hits

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
        _check_search(k, where)
        for passage_id in passage_ids or ():
            storable("passage id", passage_id)
        checked = self._checked_vectors(queries, what="query vectors")
        self._catch_up()
        hits: list[list[Hit]] = []
        with self._lock.reading():
            allowed = self._database.matching(where) if where else None
            if passage_ids is not None:
                chosen = np.array([row for row, _ in self._database.rows_of(set(passage_ids)).values()], dtype=np.int64)
                allowed = np.sort(chosen) if allowed is None else np.intersect1d(chosen, allowed)
            for start in range(0, len(checked), _QUERIES_AT_ONCE):
                hits += self._nearest(checked[start : start + _QUERIES_AT_ONCE], k, allowed)
        return hits

    def vectors_of(self, passage_ids: Collection[str]) -> dict[str, Vectors]:
        """The stored vector `[dimension]` float32 of each of these passages that is there."""
        for passage_id in passage_ids:
            storable("passage id", passage_id)
        with self._database.transaction(writing=False):
            ids = {row: passage_id for passage_id, (row, _) in self._database.rows_of(set(passage_ids)).items()}
            rows, vectors = self._database.embeddings(np.array(sorted(ids), dtype=np.int64))
        return {ids[row]: vector for row, vector in zip(rows.tolist(), vectors, strict=True)}

    def _nearest(self, queries: Vectors, k: int, allowed: Rows | None) -> list[list[Hit]]:
        """The hits of some queries, ordered by inner product."""
        best = self._nearest_rows(queries, k, allowed)
        found = self._database.passages_at({row for rows in best for row, _ in rows})
        return [[Hit(found[row], score) for row, score in rows if row in found] for rows in best]

    def _hits(self, questions: Sequence[str], queries: Vectors, k: int, allowed: Rows | None) -> list[list[Hit]]:
        """The hits of some queries, ordered by inner product, or by the score the encoder computes from the text."""
        encoder = self._encoder
        if not isinstance(encoder, RescoringEncoder):
            return self._nearest(queries, k, allowed)
        best = self._nearest_rows(queries, k + encoder.spare_candidates, allowed)
        found = self._database.passages_at({row for rows in best for row, _ in rows})
        hits = []
        for question, rows in zip(questions, best, strict=True):
            candidates = [found[row] for row, _ in sorted(rows) if row in found]
            scores = encoder.score(question, candidates, self._term_counts())
            # Sorting is stable: equal scores stay in order of addition.
            ranked = sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])
            hits.append([Hit(passage, score) for passage, score in ranked[:k]])
        return hits

    def _term_counts(self) -> TermCounts:
        return TermCounts(self._database, passages=len(self._vectors.rows))

    def _encode_queries(self, questions: Sequence[str]) -> Vectors:
        if isinstance(self._encoder, StatisticalEncoder):
            return self._encoder.encode_queries_with(questions, self._term_counts())
        return self._encoder.encode_queries(questions)

    def _nearest_rows(self, queries: Vectors, k: int, allowed: Rows | None) -> list[list[tuple[int, float]]]:
        return nearest_rows(self._database, self._vectors, self._kind, queries, k, allowed)

    # -- keeping the vectors in step ----------------------------------------------------------------------------------

    def _load(self) -> None:
        """Take the vectors from their file if they are those of the database, else from the database."""
        with self._database.transaction(writing=False):
            stamp, rows = self._database.stamp, self._database.rows()
            if self._path is None:
                self._stamp = stamp
                return
            try:
                file = self._path / VECTOR_FILE
                make_private(file)
                self._vectors = VectorIndex.load(file, self._kind, self._encoder.dimension, stamp=stamp, rows=rows)
            except VectorFileError as error:
                level = logging.INFO if error.ordinary else logging.WARNING
                self._rebuild(f"{VECTOR_FILE} cannot be used: {error}", level)
            else:
                self._stamp = self._saved_stamp = stamp

    def _rebuild(self, reason: str, level: int = logging.WARNING) -> None:
        """Build the vectors from the database; the write lock is held, or nobody else has the index yet."""
        self._stamp = ""
        with self._database.transaction(writing=False):
            stamp, rows = self._database.stamp, self._database.rows()
            if len(rows):
                _log.log(level, "building the vectors of %d passages anew: %s", len(rows), reason)
            self._vectors = VectorIndex(self._kind, self._encoder.dimension, self._database.embedding_chunks(rows))
        self._stamp = stamp

    def _catch_up(self) -> None:
        """Follow what was committed since the vectors were last in step, by this process or another."""
        if self._database.stamp == self._stamp:
            return
        with self._lock.writing(), self._database.transaction(writing=False):
            stamp, rows, known = self._database.stamp, self._database.rows(), self._vectors.rows
            if stamp == self._stamp:
                return
            if not self._stamp:
                self._rebuild("an earlier change did not complete")
                return
            self._stamp = ""
            self._vectors.remove(np.setdiff1d(known, rows))
            for some, vectors in self._database.embedding_chunks(np.setdiff1d(rows, known)):
                self._vectors.add(some, vectors)
            self._stamp = stamp
            if self._vectors.worn:
                self._rebuild(_WORN)

    def save(self) -> None:
        """Write the vector file, so that the next opening loads it instead of rebuilding.

        Raises:
            PassageIndexError: The index is in memory only, or the file cannot be written (the index stays usable).
        """
        if self._path is None:
            raise PassageIndexError("this index is in memory only; open PassageIndex(encoder, path) to save one")
        self._catch_up()
        # Writers wait, searches do not.
        with self._writer, self._lock.reading():
            if self._stamp == self._saved_stamp:
                return
            try:
                self._vectors.save(self._path / VECTOR_FILE, self._stamp)
            except OSError as error:
                raise PassageIndexError(
                    f"cannot write {self._path / VECTOR_FILE} ({error}); free the disk and call save() again. No "
                    "passage is lost: the file is rebuilt from the database"
                ) from error
            self._saved_stamp = self._stamp

    def copy_to(self, path: str | Path) -> None:
        """Make `path` a copy of this index, from which another `PassageIndex` opens; what it held is replaced.

        Raises:
            PassageIndexError: `path` is this index's own directory, is in use, or cannot be written.
        """
        target = Path(path)
        _make_directory(target)
        if self._path is not None and target.resolve() == self._path.resolve():
            raise PassageIndexError(f"{str(path)!r} is this index's own directory; call save(), or pass another")
        self._database.copy_to(target / DATABASE_FILE)

    def verify(self, *, fix: bool = False) -> IndexReport:
        """Check the database, what it keeps for looking up and counting, and the vector file against it.

        Reads everything; nothing else uses this object meanwhile. A vector file that is missing or behind is no fault.

        Args:
            fix: Make again what follows from the passages: look-up tables, word counts, the vector file.

        Raises:
            PassageIndexError: The database is locked or closed.
        """
        from blockrag.index.checking import IndexReport, check_database, check_vector_file

        with self._writer, self._lock.writing(), self._database.transaction(writing=fix):
            faults = check_database(self._database, self._encoder, fix=fix)
            if self._path is not None:
                faults += check_vector_file(self._database, self._path, self._encoder.dimension, fix=fix)
                # It may be another one now.
                self._saved_stamp = ""
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
            with self._writer, self._lock.writing():
                self._database.close()

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
        size = self._database.size_bytes()
        if self._path is not None:
            size = _bytes_in(self._path)
        return IndexStats(passages, documents, self._encoder.dimension, self._encoder.name, self._kind, size)


# One vector `[dimension]` float32 for each passage id.
_ById: TypeAlias = Mapping[str, Vectors]


def _check_search(k: int, where: Mapping[str, object] | None) -> None:
    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 passage")
    for name, value in (where or {}).items():
        if name == "document_id" and isinstance(value, str):
            storable("document id", value)


def _bytes_in(directory: Path) -> int:
    """Bytes of an index's files; one that goes meanwhile, as those that are being written do, has none."""
    total = 0
    for name in (DATABASE_FILE, VECTOR_FILE):
        for file in directory.glob(f"{name}*"):
            with suppress(FileNotFoundError):
                total += file.stat().st_size
    return total


def _make_directory(path: Path) -> None:
    try:
        # Documents are as private as the files they came from: who may list them is for their owner to widen.
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise PassageIndexError(f"cannot make the index directory {str(path)!r} ({error}); pass another") from error
