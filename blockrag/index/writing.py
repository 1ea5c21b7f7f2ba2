"""Writing to an index: what a write changes, in one transaction, and then its effect on the vectors.

It owns the order of things in a write: one writer at a time in this process, the encoder asked for exactly the vectors
that are missing, outside of transactions, and the searchable vectors told only what was committed. What a document's
update means for its passages is in `updates`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence

import numpy as np

from blockrag.encoders.protocol import Encoder, Vectors
from blockrag.errors import InputError
from blockrag.index.database import PassageDatabase, StoredPassage
from blockrag.index.embedding import VectorsById, embed_missing
from blockrag.index.following import FollowingVectors
from blockrag.index.records import Change, DocumentUpdate
from blockrag.index.terms import count_passages
from blockrag.index.updates import Plan, check_updates, plan_document
from blockrag.passage import Passage

__all__ = ["Writer"]


class Writer:
    """Makes the changes `PassageIndex` is asked for; what its methods take, give and raise is said there.

    Args:
        encoder: Embeds passages, and says which words are counted.
        database: What is written.
        vectors: What follows.
    """

    def __init__(self, encoder: Encoder, database: PassageDatabase, vectors: FollowingVectors) -> None:
        self._encoder = encoder
        self._database = database
        self._vectors = vectors
        # Held during a write; always taken before the lock of the vectors.
        self.lock = threading.Lock()

    # -- adding and replacing -----------------------------------------------------------------------------------------

    def update(self, documents: Sequence[DocumentUpdate], *, replace: bool, given: VectorsById | None = None) -> Change:
        """Add to documents, or replace what they have; with `given`, these vectors instead of the encoder's."""
        check_updates(documents)
        if not documents:
            return Change()
        vectors: dict[str, Vectors] = dict(given or {})
        with self.lock:
            while True:
                with self._database.connection.transaction(writing=False):
                    plans = self._plan(documents, replace=replace, given=given)
                # Embedding is slow: it happens outside transactions and beside searches. Should another process
                # change these documents meanwhile, the plan made inside the transaction asks for more: once more then.
                embed_missing(self._encoder, [passage for plan in plans for _, passage in plan.fresh], vectors)
                with self._vectors.lock.writing():
                    change = self._commit(documents, vectors, replace=replace, given=given)
                if change is not None:
                    return change

    def _plan(self, documents: Sequence[DocumentUpdate], *, replace: bool, given: VectorsById | None) -> list[Plan]:
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

    def _with_other_vectors(self, stored: Sequence[StoredPassage], given: VectorsById) -> frozenset[str]:
        """The ids of the stored passages whose vector is not the one that is given."""
        ids = {passage.row: passage.id for passage in stored if passage.id in given}
        rows, vectors = self._database.embeddings(np.array(sorted(ids), dtype=np.int64))
        pairs = zip(rows.tolist(), vectors, strict=True)
        return frozenset(ids[row] for row, vector in pairs if not np.array_equal(vector, given[ids[row]]))

    def _commit(
        self, documents: Sequence[DocumentUpdate], vectors: VectorsById, *, replace: bool, given: VectorsById | None
    ) -> Change | None:
        """One transaction and its effect on the vectors; None, and nothing done, when a vector is missing."""
        with self._database.connection.transaction():
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
            count_passages(self._database, self._encoder, [p for plan in plans for _, p in plan.fresh], +1)
            gone = [passage.row for passage in leaving]
            if new or gone:
                self._database.bump_stamp()
            orphans = self._database.unused(keys)
            after = self._database.stamp
        self._vectors.apply(before, after, gone=gone, new=new)
        kept = sum(len(plan.kept) for plan in plans)
        return Change(added=len(new), kept=kept, removed=len(gone), orphaned_block_keys=orphans)

    def _insert(self, update: DocumentUpdate, plan: Plan, vectors: VectorsById) -> dict[int, Vectors]:
        self._database.put_document(update.document_id)
        for ordinal, stored, passage in plan.kept:
            self._database.revise(stored, passage, ordinal)
        new: dict[int, Vectors] = {}
        for ordinal, passage in plan.fresh:
            vector = vectors[passage.id]
            new[self._database.insert(passage, ordinal, vector)] = vector
        return new

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

    # -- deleting -----------------------------------------------------------------------------------------------------

    def delete_document(self, document_id: str) -> Change:
        """Delete a document and its passages."""
        return self._delete_documents(lambda: [document_id])

    def drop_superseded(self, document_ids: Collection[str] | None) -> Change:
        """Delete the documents that are marked: all of them, or those among `document_ids`."""

        def marked() -> list[str]:
            found = self._database.superseded()
            return sorted(found if document_ids is None else found.intersection(document_ids))

        return self._delete_documents(marked)

    def _delete_documents(self, choose: Callable[[], Sequence[str]]) -> Change:
        """Delete the documents that `choose` names inside the transaction."""
        with self.lock, self._vectors.lock.writing():
            with self._database.connection.transaction():
                before, names = self._database.stamp, choose()
                stored = [passage for name in names for passage in self._database.stored(name)]
                keys = self._delete(stored)
                for name in names:
                    self._database.delete_document(name)
                change, after = self._deleted(stored, keys)
            self._vectors.apply(before, after, gone=[passage.row for passage in stored])
        return change

    def delete_passages(self, passage_ids: Collection[str]) -> Change:
        """Delete passages, and the documents whose last passage goes."""
        with self.lock, self._vectors.lock.writing():
            with self._database.connection.transaction():
                before = self._database.stamp
                stored = self._database.stored_passages(set(passage_ids))
                keys = self._delete(stored)
                self._leave({passage.document_id for passage in stored})
                change, after = self._deleted(stored, keys)
            self._vectors.apply(before, after, gone=[passage.row for passage in stored])
        return change

    def clear(self) -> Change:
        """Delete everything."""
        with self.lock, self._vectors.lock.writing():
            with self._database.connection.transaction():
                before, rows = self._database.stamp, self._database.rows().tolist()
                keys = self._database.delete_everything()
                if rows:
                    self._database.bump_stamp()
                after = self._database.stamp
            self._vectors.apply(before, after, gone=rows)
        return Change(removed=len(rows), orphaned_block_keys=frozenset(keys))

    def _delete(self, stored: Sequence[StoredPassage]) -> set[str]:
        """Delete passages and uncount their terms; returns the block keys they had."""
        passages = [Passage(id=passage.id, text=passage.text, title=passage.title) for passage in stored]
        count_passages(self._database, self._encoder, passages, -1)
        return self._database.delete([passage.row for passage in stored])

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

    # -- what no vector depends on ------------------------------------------------------------------------------------

    def mark_superseded(self, document_id: str) -> bool:
        """Mark a document that will be replaced, if there is such a document."""
        with self.lock, self._database.connection.transaction():
            if not self._database.is_document(document_id):
                return False
            self._database.forget_hashes(document_id)
            self._database.mark_superseded(document_id)
            return True

    def set_block_keys(self, passage_id: str, fingerprint: str, keys: Sequence[str]) -> Change:
        """Record which blocks hold a passage's KV states."""
        with self.lock, self._database.connection.transaction():
            found = self._database.rows_of([passage_id]).get(passage_id)
            if found is None:
                raise InputError(f"there is no passage {passage_id!r}; add it before setting its block keys")
            before = self._database.set_blocks(found[0], fingerprint, keys)
            return Change(kept=1, orphaned_block_keys=self._database.unused(before))
