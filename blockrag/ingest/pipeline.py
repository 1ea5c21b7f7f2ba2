"""The pass from sources to an index whose passages' KV states are already stored, and the way back.

Batch by batch: read, split, tokenize, prefill and store what the store lacks, then commit to the index. That order is
the whole recovery story. The index, the record of what is done, never names a block that was not written; whatever
stops a pass leaves whole batches behind, and the next pass finds the blocks of the unfinished batch in the store by
their content and the committed documents by their hash. Blocks that lose their last passage are dropped after the
commit that took it; a pass killed between the two leaves a few unused blocks, which `delete_unused_blocks` finds.
Where several indexes share a store, one may drop what another names: a miss there, which its next pass makes good.

Nothing here knows how text is read, how blocks are computed, or how either store works.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Protocol, TypeVar

from blockrag.errors import DocumentError, InputError
from blockrag.fingerprint import Fingerprint, hash_tokenizer
from blockrag.index.records import Change, DocumentUpdate
from blockrag.ingest.estimate import expected_documents
from blockrag.ingest.progress import Progress
from blockrag.ingest.reading import Document, DocumentFailure, DocumentReader, Source, read_documents
from blockrag.ingest.report import IngestReport
from blockrag.ingest.splitting import SPLITTER_VERSION, split_documents
from blockrag.passage import Passage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.index import PassageIndex
    from blockrag.model.materialize import MaterializeReport
    from blockrag.prompt import Block, PromptTemplate
    from blockrag.stores.protocol import BlockStore

__all__ = ["PrefillModel", "delete", "delete_unused_blocks", "in_batches", "ingest"]

_log = logging.getLogger(__name__)

T = TypeVar("T")

# A batch is held in memory whole; a few very long documents fill one before their number does.
_BATCH_CHARACTERS = 1 << 22
_KEYS_AT_ONCE = 10_000


class PrefillModel(Protocol):
    """What a pass needs of a language model; `blockrag.model.BlockModel` is one."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Counts and encodes passages."""
        ...

    @property
    def template(self) -> PromptTemplate:
        """Turns a passage into its block."""
        ...

    @property
    def fingerprint(self) -> Fingerprint:
        """What shapes the KV states."""
        ...

    def block_key(self, token_ids: Sequence[int]) -> str:
        """The key a block is stored under."""
        ...

    def materialize(
        self,
        blocks: Sequence[Block],
        store: BlockStore,
        *,
        on_block: Callable[[Block, bool, int], None] | None = None,
    ) -> MaterializeReport:
        """Compute and store the blocks that the store lacks."""
        ...


def ingest(
    sources: Source | Iterable[Source],
    *,
    index: PassageIndex,
    model: PrefillModel | None,
    store: BlockStore,
    max_passage_tokens: int = 256,
    batch_documents: int = 256,
    progress: Progress | None = None,
    prune: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    readers: Mapping[str, DocumentReader] | None = None,
) -> IngestReport:
    """Bring index and block store up to date with the sources; doing it twice does nothing the second time.

    A document is up to date when its text, title and metadata, the way it is cut, and the model are those of an
    earlier pass; it costs a hash. Its blocks are looked for in the store all the same, and those that were evicted
    or deleted are computed again. Of a document that changed, only passages with new text are embedded, and only
    blocks with new tokens are prefilled.

    A document that cannot be read, cut or stored is a failure in the report, and the others go on; an earlier version
    of it stays. A full store, a damaged index or an interruption ends the pass, and the batches before it stay.

    Args:
        sources: What `read_documents` takes: files, folders, documents, passages.
        index: Receives the passages; embeds them.
        model: Computes the KV states. None: passages are only indexed, and blocks are computed by the first question.
        store: Receives the KV states.
        max_passage_tokens: Most tokens of a passage's text.
        batch_documents: Documents per commit; fewer where they are long. Blocks of one commit share forwards, so that
            many small documents take few.
        progress: Told how far the pass is.
        prune: Afterwards remove every document that the index had before and the sources do not have. Nothing is
            removed when a source could not be read to its end, or no document was found: a folder that is not mounted
            today must not empty the index. The report's failures then say so.
        tokenizer: Counts tokens where there is no model; by default the model's.
        readers: Reader per suffix, for file types that are not text.

    Returns:
        What was done.

    Raises:
        InputError: `max_passage_tokens` or `batch_documents` is less than one.
        StoreError: A block cannot be stored.
        PassageIndexError: The index is damaged or closed.
    """
    for name, value in (("max_passage_tokens", max_passage_tokens), ("batch_documents", batch_documents)):
        if value < 1:
            raise InputError(f"{name} is {value}; pass at least 1")
    started = time.perf_counter()
    counted = model.tokenizer if model is not None else tokenizer
    fingerprint = "" if model is None else model.fingerprint.digest
    work = _Pass(index, model, store, counted, fingerprint, max_passage_tokens, progress)
    evictions = store.stats().evictions
    if prune:
        work.known = frozenset(info.document_id for info in index.documents())
    documents = read_documents(sources, on_failure=work.failures.append, readers=readers)
    if progress is not None:
        progress.start(expected_documents(sources))
    try:
        for batch in in_batches(documents, batch_documents):
            work.run(batch)
        if prune:
            work.prune()
    finally:
        if progress is not None:
            progress.finish()
    if (evicted := store.stats().evictions - evictions) and model is not None:
        _log.warning(
            "the block store evicted %d blocks during this pass: its budget is smaller than what was ingested, and "
            "every pass computes blocks that the next ones evict; raise max_bytes",
            evicted,
        )
    return work.report(time.perf_counter() - started)


def delete(document_id: str, *, index: PassageIndex, store: BlockStore) -> Change:
    """Remove a document, its passages, and the blocks that no other passage uses; an unknown one changes nothing.

    Returns:
        The index's change; `orphaned_block_keys` are the keys removed from the store.
    """
    change = index.delete_document(document_id)
    _drop(change.orphaned_block_keys, store)
    return change


def delete_unused_blocks(*, index: PassageIndex, store: BlockStore) -> int:
    """Remove every block that no passage of this index uses: what killed passes and other models left behind.

    For a store that serves this index alone, while nothing is ingested: blocks whose documents are not committed yet
    go as well, as those of prompts' first and last parts do, and are computed again when they are needed.

    Returns:
        The number of blocks removed.
    """
    # In this order: blocks are stored before their documents are committed.
    stored = list(store.keys())
    used = index.block_keys()
    return _drop([key for key in stored if key not in used], store)


@dataclass(slots=True)
class _Prepared:
    """A document on its way into the index."""

    document: Document
    content_hash: str
    passages: list[Passage]
    blocks: list[Block] = field(default_factory=list)
    block_keys: dict[str, list[str]] = field(default_factory=dict)


@dataclass(slots=True)
class _Pass:
    """One pass: where things go, and what was counted."""

    index: PassageIndex
    model: PrefillModel | None
    store: BlockStore
    tokenizer: PreTrainedTokenizerBase | None
    fingerprint: str
    max_tokens: int
    progress: Progress | None
    failures: list[DocumentFailure] = field(default_factory=list)
    done: set[str] = field(default_factory=set)
    known: frozenset[str] = frozenset()
    documents_unchanged: int = 0
    documents_removed: int = 0
    passages: int = 0
    blocks_new: int = 0
    blocks_reused: int = 0
    tokens_new: int = 0
    tokens_reused: int = 0
    bytes_new: int = 0
    blocks_deleted: int = 0
    _in_flight: frozenset[str] = frozenset()
    _missing: frozenset[str] | None = None
    _recipe: str = ""

    def run(self, batch: Sequence[Document]) -> None:
        """Bring one batch up to date: blocks first, then the index, then what became unused."""
        changed: list[Document] = []
        unchanged: list[Document] = []
        hashes: dict[str, str] = {}
        for document in batch:
            try:
                hashes[document.id] = self._content_hash(document)
            except DocumentError as error:
                self._fail(document, error)
                continue
            is_known = self.index.document_hash(document.id, self.fingerprint) == hashes[document.id]
            (unchanged if is_known else changed).append(document)
        self._confirm(unchanged)
        encoded = self._isolated(self._split(changed, hashes), self._encode)
        stored = self._isolated(encoded, self._materialize)
        self._in_flight = frozenset(key for one in stored for keys in one.block_keys.values() for key in keys)
        self._isolated(stored, self._commit)

    def prune(self) -> None:
        """Remove the documents that the sources no longer have, if it is certain which these are.

        What another pass has added meanwhile came from sources that are newer than these.
        """
        unknown = [failure for failure in self.failures if failure.document_id is None]
        kept = self.done | {failure.document_id for failure in self.failures if failure.document_id is not None}
        if unknown or not kept:
            reason = f"{len(unknown)} sources could not be read" if unknown else "the sources hold no document"
            error = InputError(f"nothing was pruned, because {reason}; delete documents by their id, or run it again")
            self.failures.append(DocumentFailure("prune", error))
            return
        there = {info.document_id for info in self.index.documents()}
        for document_id in sorted(self.known.intersection(there).difference(kept)):
            change = self.index.delete_document(document_id)
            self.blocks_deleted += _drop(change.orphaned_block_keys, self.store)
            self.documents_removed += 1

    def report(self, seconds: float) -> IngestReport:
        """What was counted."""
        return IngestReport(
            documents=len(self.done),
            documents_unchanged=self.documents_unchanged,
            passages=self.passages,
            blocks_new=self.blocks_new,
            blocks_reused=self.blocks_reused,
            tokens_new=self.tokens_new,
            tokens_reused=self.tokens_reused,
            bytes_new=self.bytes_new,
            seconds=seconds,
            failures=tuple(self.failures),
            documents_removed=self.documents_removed,
            blocks_deleted=self.blocks_deleted,
        )

    # -- steps -------------------------------------------------------------------------------------------------------

    def _confirm(self, documents: Sequence[Document]) -> None:
        """Documents that are up to date: put back those of their blocks that the store lost."""
        if self.model is not None and documents and self._lost:
            passages = [passage for document in documents for passage in self.index.passages(document.id)]
            lost = [block for block in self._blocks(passages) if self.model.block_key(block.token_ids) in self._lost]
            self._materialize_blocks(lost)
        for document in documents:
            self.documents_unchanged += 1
            self._finish(document)

    def _split(self, documents: Sequence[Document], hashes: Mapping[str, str]) -> list[_Prepared]:
        prepared = []
        cut = split_documents(documents, self.tokenizer, max_tokens=self.max_tokens)
        for document, passages in zip(documents, cut, strict=True):
            if isinstance(passages, InputError):
                self._fail(document, passages)
            else:
                prepared.append(_Prepared(document, hashes[document.id], passages))
        return prepared

    def _encode(self, prepared: Sequence[_Prepared]) -> None:
        """Tokenize the passages of several documents in one batch, and name their blocks."""
        if self.model is None:
            return
        blocks = iter(self._blocks(passage for one in prepared for passage in one.passages))
        for one in prepared:
            one.blocks = list(islice(blocks, len(one.passages)))
            one.block_keys = {
                passage.id: [self.model.block_key(block.token_ids)]
                for passage, block in zip(one.passages, one.blocks, strict=True)
            }

    def _materialize(self, prepared: Sequence[_Prepared]) -> None:
        self._materialize_blocks([block for one in prepared for block in one.blocks])

    def _materialize_blocks(self, blocks: Sequence[Block]) -> None:
        if self.model is None or not blocks:
            return
        report = self.model.materialize(blocks, self.store, on_block=self._on_block)
        self.blocks_new += report.blocks_new
        self.blocks_reused += report.blocks_reused
        self.tokens_new += report.tokens_new
        self.tokens_reused += report.tokens_reused
        self.bytes_new += report.bytes_new

    def _commit(self, prepared: Sequence[_Prepared]) -> None:
        updates = [
            DocumentUpdate(one.document.id, one.passages, one.content_hash, one.block_keys, self.fingerprint)
            for one in prepared
        ]
        change = self.index.replace_documents(updates)
        # A document of this batch that is committed next may need what this one gave up.
        self.blocks_deleted += _drop(change.orphaned_block_keys - self._in_flight, self.store)
        for one in prepared:
            self.passages += len(one.passages)
            self._finish(one.document, passages=len(one.passages))

    def _isolated(self, prepared: list[_Prepared], step: Callable[[Sequence[_Prepared]], None]) -> list[_Prepared]:
        """Do a step for all at once; where that fails for its input, for each alone. Returns those that made it."""
        if not prepared:
            return []
        try:
            step(prepared)
        except InputError as error:
            if len(prepared) > 1:
                return [one for each in prepared for one in self._isolated([each], step)]
            self._fail(prepared[0].document, error)
            return []
        return prepared

    # -- small things ------------------------------------------------------------------------------------------------

    @property
    def _lost(self) -> Collection[str]:
        """Block keys that the index names under this model and the store did not have when first asked."""
        if self._missing is None:
            keys = self.index.block_keys(self.fingerprint)
            found = self.store.contains_many(keys)
            self._missing = frozenset(keys - found)
        return self._missing

    def _blocks(self, passages: Iterable[Passage]) -> list[Block]:
        return [] if self.model is None else self.model.template.passage_blocks(self.model.tokenizer, passages)

    def _content_hash(self, document: Document) -> str:
        """SHA-256 of everything that decides which passages and blocks a document has."""
        if not self._recipe:
            tokenizer = "" if self.tokenizer is None else hash_tokenizer(self.tokenizer)
            # A block's key also depends on the model's namespace, which its fingerprint leaves out.
            probe = "" if self.model is None else self.model.block_key([0])
            self._recipe = json.dumps([SPLITTER_VERSION, self.max_tokens, tokenizer, probe])
        passages = [[p.id, p.title, p.text, _plain(p.metadata)] for p in document.passages]
        content = [document.title, document.text, _plain(document.metadata), passages]
        try:
            text = json.dumps(content, sort_keys=True, default=_plain)
        except (TypeError, ValueError, RecursionError) as error:
            raise DocumentError(
                f"document {document.id!r}: its metadata cannot be written as JSON ({error}); pass plain values"
            ) from None
        return hashlib.sha256(f"{self._recipe}{text}".encode()).hexdigest()

    def _on_block(self, block: Block, reused: bool, nbytes: int) -> None:
        if self.progress is not None:
            self.progress.advance(tokens=0 if reused else len(block))

    def _finish(self, document: Document, *, passages: int = 0) -> None:
        self.done.add(document.id)
        if self.progress is not None:
            self.progress.advance(documents=1, passages=passages)

    def _fail(self, document: Document, error: Exception) -> None:
        self.failures.append(DocumentFailure(document.id, error, document.id))
        if self.progress is not None:
            self.progress.advance(documents=1)


def _plain(value: object) -> object:
    """Mappings as dictionaries, for JSON.

    Raises:
        TypeError: It is no mapping.
    """
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not JSON")


def in_batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Documents in batches bounded by number and by length."""
    batch: list[Document] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document.text)
        if len(batch) == size or characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _drop(keys: Iterable[str], store: BlockStore) -> int:
    """Delete blocks in portions, so that no store gets one enormous statement."""
    rest, dropped = iter(keys), 0
    while portion := list(islice(rest, _KEYS_AT_ONCE)):
        dropped += store.delete_many(portion)
    return dropped
