"""`PassageIndex`: passages found by meaning, kept in step with documents that come, change and go.

It joins the database (the truth) with the searchable vectors (derived), decides what a write changes, and asks the
encoder for exactly the vectors that are missing. It knows no language model and no block store; of KV states it
keeps only the keys, so that they can be dropped when their last passage goes.

Consistency: a write is one SQLite transaction, so a killed process leaves either all of it or nothing. Before every
search the stamp of the database is compared with the stamp of the vectors, and what other processes committed is
caught up with. Inside a process, searches run side by side and exclude only the moment in which a write lands.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from blockrag.encoders.protocol import Encoder, RescoringEncoder, StatisticalEncoder, Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index.database import PassageDatabase, StoredPassage, TermCounts, encode_metadata
from blockrag.index.locks import ReadWriteLock
from blockrag.index.records import Change, DocumentInfo, DocumentUpdate, IndexStats
from blockrag.index.vectors import Kind, Rows, VectorFileError, VectorIndex
from blockrag.passage import Hit, Passage

__all__ = ["PassageIndex"]

_log = logging.getLogger(__name__)

_DATABASE_FILE = "passages.sqlite3"
_VECTOR_FILE = "vectors.faiss"
# Candidates fetched beyond k, so that ties at the edge are seen; and how far to look when they go on.
_SPARE = 16
_MOST_TIED = 4096
# FAISS's float32 sums depend on how queries are batched; scores closer than this, relative to the best, may be ties.
_ROUNDING = 1e-5
# Filters that leave at most this many rows are answered from the database, for every kind of index.
_FEW_ROWS = 4096
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
        database_file = self._path / _DATABASE_FILE if self._path is not None else None
        self._database = PassageDatabase(database_file, encoder=encoder.name, dimension=encoder.dimension)
        # The database state the vectors in memory are, and the one in the vector file; "" is neither.
        self._stamp = self._saved_stamp = ""
        try:
            self._load()
        except BaseException:
            self._database.close()
            raise

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

    def add(self, passages: Sequence[Passage]) -> Change:
        """Add passages to their documents, in one embedding batch and one transaction.

        Other passages of those documents stay. A passage whose id is there already is kept when title and text are
        equal, and replaced when not. Documents that change lose their recorded content hash.

        Raises:
            InputError: A passage id occurs twice or belongs to another document, or metadata is not JSON-serialisable.
            PassageIndexError: The database is damaged, locked or closed.
        """
        grouped: dict[str, list[Passage]] = {}
        for passage in passages:
            grouped.setdefault(passage.document_id, []).append(passage)
        return self._write([DocumentUpdate(name, group) for name, group in grouped.items()], replace=False)

    def delete_document(self, document_id: str) -> Change:
        """Delete a document and its passages; an unknown document is no error and changes nothing."""
        _storable("document id", document_id)
        with self._writer, self._lock.writing():
            with self._database.transaction():
                before = self._database.stamp
                stored = self._database.stored(document_id)
                keys = self._delete(stored)
                self._database.delete_document(document_id)
                orphans = self._database.unused(keys)
                if stored:
                    self._database.bump_stamp()
                after = self._database.stamp
            self._apply(before, after, gone=[passage.row for passage in stored])
        return Change(removed=len(stored), orphaned_block_keys=orphans)

    def set_block_keys(self, passage_id: str, fingerprint: str, keys: Sequence[str]) -> Change:
        """Record which blocks hold a passage's KV states under a fingerprint; replaces those recorded before.

        Raises:
            InputError: There is no such passage.
        """
        for name, value in (("passage id", passage_id), ("fingerprint", fingerprint), *(("key", key) for key in keys)):
            _storable(name, value)
        with self._writer, self._database.transaction():
            found = self._database.rows_of([passage_id]).get(passage_id)
            if found is None:
                raise InputError(f"there is no passage {passage_id!r}; add it before setting its block keys")
            before = self._database.set_blocks(found[0], fingerprint, keys)
            return Change(kept=1, orphaned_block_keys=self._database.unused(before))

    def _write(self, documents: Sequence[DocumentUpdate], *, replace: bool) -> Change:
        _check_updates(documents)
        if not documents:
            return Change()
        vectors: dict[tuple[str, str], Vectors] = {}
        with self._writer:
            while True:
                with self._database.transaction(writing=False):
                    plans = self._plan(documents, replace=replace)
                # Embedding is slow: it happens outside transactions and beside searches. Should another process
                # change these documents meanwhile, the plan made inside the transaction asks for more: once more then.
                self._embed([passage for plan in plans for _, passage in plan.fresh], vectors)
                with self._lock.writing():
                    change = self._commit(documents, vectors, replace=replace)
                if change is not None:
                    return change

    def _plan(self, documents: Sequence[DocumentUpdate], *, replace: bool) -> list[_Plan]:
        """What each document's update means for the passages stored now."""
        plans = [_plan_document(update, self._database.stored(update.document_id), replace) for update in documents]
        leaving = {passage.row for plan in plans for passage in plan.gone}
        fresh = {passage.id: passage for plan in plans for _, passage in plan.fresh}
        for passage_id, (row, owner) in self._database.rows_of(fresh).items():
            if row not in leaving:
                raise InputError(
                    f"passage id {passage_id!r} of document {fresh[passage_id].document_id!r} belongs to document "
                    f"{owner!r} already; ids are unique in an index: put the document id into the passage id"
                )
        return plans

    def _embed(self, passages: Sequence[Passage], vectors: dict[tuple[str, str], Vectors]) -> None:
        """Add the vectors that `vectors` lacks, by title and text."""
        missing: dict[tuple[str, str], Passage] = {}
        for passage in passages:
            if (passage.title, passage.text) not in vectors:
                missing.setdefault((passage.title, passage.text), passage)
        if not missing:
            return
        embedded = self._encoder.encode_passages(list(missing.values()))
        if embedded.shape != (len(missing), self._encoder.dimension):
            raise PassageIndexError(
                f"encoder {self._encoder.name!r} gave vectors of shape {embedded.shape} for {len(missing)} passages, "
                f"not ({len(missing)}, {self._encoder.dimension}); fix the encoder"
            )
        finite = np.isfinite(embedded).all(axis=1)
        if not finite.all():
            culprit = list(missing.values())[int(np.argmin(finite))]
            raise PassageIndexError(
                f"encoder {self._encoder.name!r} gave a vector that is not finite for passage {culprit.id!r}; check "
                "the encoder's precision and weights"
            )
        vectors.update(zip(missing, embedded.astype(np.float32, copy=False), strict=True))

    def _commit(
        self, documents: Sequence[DocumentUpdate], vectors: Mapping[tuple[str, str], Vectors], *, replace: bool
    ) -> Change | None:
        """One transaction and its effect on the vectors; None, and nothing done, when a vector is missing."""
        with self._database.transaction():
            before = self._database.stamp
            plans = self._plan(documents, replace=replace)
            if any((p.title, p.text) not in vectors for plan in plans for _, p in plan.fresh):
                return None
            keys = self._delete([passage for plan in plans for passage in plan.gone])
            new: dict[int, Vectors] = {}
            for update, plan in zip(documents, plans, strict=True):
                new.update(self._insert(update, plan, vectors))
                keys |= self._set_blocks(update)
                self._set_hashes(update, changed=plan.changes, replace=replace)
            self._count_terms([p for plan in plans for _, p in plan.fresh], +1)
            gone = [passage.row for plan in plans for passage in plan.gone]
            if new or gone:
                self._database.bump_stamp()
            orphans = self._database.unused(keys)
            after = self._database.stamp
        self._apply(before, after, gone=gone, new=new)
        kept = sum(len(plan.kept) for plan in plans)
        return Change(added=len(new), kept=kept, removed=len(gone), orphaned_block_keys=orphans)

    def _insert(
        self, update: DocumentUpdate, plan: _Plan, vectors: Mapping[tuple[str, str], Vectors]
    ) -> dict[int, Vectors]:
        self._database.put_document(update.document_id)
        for ordinal, stored, passage in plan.kept:
            self._database.revise(stored, passage, ordinal)
        new: dict[int, Vectors] = {}
        for ordinal, passage in plan.fresh:
            vector = vectors[passage.title, passage.text]
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
        if k < 1:
            raise InputError(f"k is {k}; ask for at least 1 passage")
        for name, value in (where or {}).items():
            if name == "document_id" and isinstance(value, str):
                _storable("document id", value)
        self._catch_up()
        queries = self._encode_queries(questions)
        hits: list[list[Hit]] = []
        with self._lock.reading():
            allowed = self._database.matching(where) if where else None
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                some = slice(start, start + _QUERIES_AT_ONCE)
                hits += self._hits(questions[some], queries[some], k, allowed)
        return hits

    def _hits(self, questions: Sequence[str], queries: Vectors, k: int, allowed: Rows | None) -> list[list[Hit]]:
        """The hits of some queries, ordered by inner product, or by the score the encoder computes from the text."""
        encoder = self._encoder
        if not isinstance(encoder, RescoringEncoder):
            best = self._best(queries, k, allowed)
            found = self._database.passages_at({row for rows in best for row, _ in rows})
            return [[Hit(found[row], score) for row, score in rows if row in found] for rows in best]
        best = self._best(queries, k + encoder.spare_candidates, allowed)
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

    def _best(self, queries: Vectors, k: int, allowed: Rows | None) -> list[list[tuple[int, float]]]:
        """Rows and scores of the best `k` of each query, ordered; scores are exact products of the stored vectors."""
        if allowed is not None and (self._kind != "flat" or len(allowed) <= _FEW_ROWS):
            return self._scan(queries, k, allowed)
        candidates = self._candidates(queries, k, allowed)
        rows, vectors = self._database.embeddings(np.unique(np.concatenate(candidates)))
        results = []
        for query, some in zip(queries, candidates, strict=True):
            chosen = np.searchsorted(rows, np.intersect1d(some, rows))
            results.append(_rank(query, rows[chosen], vectors[chosen], k))
        return results

    def _scan(self, queries: Vectors, k: int, allowed: Rows) -> list[list[tuple[int, float]]]:
        """The best of `allowed` by comparing with every one of them."""
        best: list[list[tuple[int, float]]] = [[] for _ in queries]
        for rows, vectors in self._database.embedding_chunks(allowed):
            for i, query in enumerate(queries):
                best[i] = sorted(best[i] + _rank(query, rows, vectors, k), key=lambda hit: (-hit[1], hit[0]))[:k]
        return best

    def _candidates(self, queries: Vectors, k: int, allowed: Rows | None) -> list[Rows]:
        """For each query the rows that may be among its best `k`: those found, and all that tie with the last."""
        available = len(self._vectors.rows) if allowed is None else len(allowed)
        results: list[Rows] = [np.zeros(0, dtype=np.int64)] * len(queries)
        # A zero vector has nothing to find.
        pending = np.flatnonzero(queries.any(axis=1))
        fetch = min(k + _SPARE, available)
        while len(pending) and fetch:
            scores, rows = self._vectors.search(queries[pending], fetch, allowed)
            for i, found in zip(pending, rows, strict=True):
                results[i] = found[found >= 0]
            if fetch >= min(available, max(_MOST_TIED, k + _SPARE)):
                break
            margin = _ROUNDING * np.abs(scores[:, 0])
            tied = (rows[:, -1] >= 0) & (scores[:, k - 1] - scores[:, -1] <= margin)
            pending = pending[tied]
            fetch = min(4 * fetch, available)
        return results

    # -- keeping the vectors in step ----------------------------------------------------------------------------------

    def _load(self) -> None:
        """Take the vectors from their file if they are those of the database, else from the database."""
        with self._database.transaction(writing=False):
            stamp, rows = self._database.stamp, self._database.rows()
            if self._path is None:
                self._stamp = stamp
                return
            try:
                file = self._path / _VECTOR_FILE
                self._vectors = VectorIndex.load(file, self._kind, self._encoder.dimension, stamp=stamp, rows=rows)
            except VectorFileError as error:
                level = logging.INFO if error.ordinary else logging.WARNING
                self._rebuild(f"{_VECTOR_FILE} cannot be used: {error}", level)
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
                self._vectors.save(self._path / _VECTOR_FILE, self._stamp)
            except OSError as error:
                raise PassageIndexError(
                    f"cannot write {self._path / _VECTOR_FILE} ({error}); free the disk and call save() again. No "
                    "passage is lost: the file is rebuilt from the database"
                ) from error
            self._saved_stamp = self._stamp

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
        _storable("passage id", passage_id)
        return self._database.passage(passage_id)

    def passages(self, document_id: str | None = None) -> Iterator[Passage]:
        """A document's passages in reading order (none when it is unknown), or all in the order they were added."""
        if document_id is not None:
            _storable("document id", document_id)
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
        _storable("document id", document_id)
        _storable("fingerprint", fingerprint)
        return self._database.document_hash(document_id, fingerprint)

    def block_keys(self, fingerprint: str | None = None) -> set[str]:
        """All block keys in use, or those recorded under one fingerprint."""
        if fingerprint is not None:
            _storable("fingerprint", fingerprint)
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
            size = sum(file.stat().st_size for file in self._path.iterdir() if file.name.startswith(_OWN_FILES))
        return IndexStats(passages, documents, self._encoder.dimension, self._encoder.name, self._kind, size)


_OWN_FILES = (_DATABASE_FILE, _VECTOR_FILE)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What an update does to one document's passages, with their places in it."""

    fresh: list[tuple[int, Passage]]
    kept: list[tuple[int, StoredPassage, Passage]]
    gone: list[StoredPassage]

    @property
    def changes(self) -> bool:
        return bool(self.fresh or self.gone)


def _plan_document(update: DocumentUpdate, stored: Sequence[StoredPassage], replace: bool) -> _Plan:
    """Compare an update with what is stored: equal title and text under an id means kept."""
    plan = _Plan([], [], [])
    left = {passage.id: passage for passage in stored}
    end = max((passage.ordinal + 1 for passage in stored), default=0)
    for place, passage in enumerate(update.passages):
        old = left.pop(passage.id, None)
        ordinal = place if replace else (end + place if old is None else old.ordinal)
        if old is not None and (old.title, old.text) == (passage.title, passage.text):
            plan.kept.append((ordinal, old, passage))
            continue
        plan.fresh.append((ordinal, passage))
        if old is not None:
            plan.gone.append(old)
    if replace:
        plan.gone.extend(left.values())
    return plan


def _rank(query: Vectors, rows: Rows, vectors: Vectors, k: int) -> list[tuple[int, float]]:
    """The best `k` of `rows` with their scores, equal scores by row.

    Sums are taken row by row in float64, so that equal vectors have equal scores however they were found.
    """
    if not query.any():
        return []
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    order = np.lexsort((rows, -scores))[:k]
    return [(int(rows[i]), float(scores[i])) for i in order]


def _check_updates(documents: Sequence[DocumentUpdate]) -> None:
    """Refuse what cannot be stored, before anything is embedded."""
    documents_seen: set[str] = set()
    passages_seen: set[str] = set()
    for update in documents:
        if not update.document_id or update.document_id in documents_seen:
            problem = "occurs twice in one update" if update.document_id else "is empty"
            raise InputError(f"document id {update.document_id!r} {problem}; give each document one id of its own")
        documents_seen.add(update.document_id)
        for name in ("document_id", "content_hash", "fingerprint"):
            _storable(name, getattr(update, name))
        for passage in update.passages:
            _check_passage(passage, update.document_id, passages_seen)
        _check_block_keys(update)


def _check_passage(passage: Passage, document_id: str, seen: set[str]) -> None:
    if passage.document_id != document_id:
        raise InputError(
            f"passage {passage.id!r} names document {passage.document_id!r}, not {document_id!r}; pass "
            f"Passage(document_id={document_id!r})"
        )
    if passage.id in seen:
        raise InputError(f"passage id {passage.id!r} occurs twice; ids are unique in an index")
    seen.add(passage.id)
    encode_metadata(passage)


def _check_block_keys(update: DocumentUpdate) -> None:
    ids = {passage.id for passage in update.passages}
    for passage_id, keys in (update.block_keys or {}).items():
        if passage_id not in ids:
            raise InputError(
                f"block keys are given for passage {passage_id!r}, which document {update.document_id!r} does not have"
            )
        for key in keys:
            _storable("block key", key)


def _storable(what: str, text: str) -> None:
    """Refuse lone surrogates, which no UTF-8 file can hold."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} {text!r} holds a lone surrogate; decode its source with errors='replace'") from error


def _make_directory(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise PassageIndexError(f"cannot make the index directory {str(path)!r} ({error}); pass another") from error
