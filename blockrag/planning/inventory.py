"""What a pass over documents would find: documents, passages, distinct blocks, tokens.

Documents are read, cut and tokenized by the functions that a pass uses, in the same batches, so that the counts are
its counts. Of a large corpus everything is read, but only a random part of the documents is cut and tokenized, which
is what takes long; the rest is inferred from its length in bytes.

Nothing here computes or stores anything.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

from blockrag.codec import encoded_nbytes
from blockrag.errors import InputError
from blockrag.ingest.estimate import expected_documents
from blockrag.ingest.pipeline import in_batches
from blockrag.ingest.reading import Document, DocumentFailure, DocumentReader, Source, read_documents
from blockrag.ingest.splitting import split_documents

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.ingest.progress import Progress
    from blockrag.kv import KVLayout
    from blockrag.model.outline import ModelOutline
    from blockrag.passage import Passage
    from blockrag.prompt import Block

__all__ = ["Inventory", "take_inventory"]

_BATCH_DOCUMENTS = 32
_KEPT = 64
_SEED = 0
# Normal distribution: this many standard errors to either side hold 95 %.
_TWO_SIDED_95 = 1.96


@dataclass(frozen=True, slots=True)
class Inventory:
    """What the documents consist of; estimated from a part of them where `scale` is not 1.

    Args:
        documents: Documents that can be used, as far as they were looked at.
        documents_counted: Those that were cut and tokenized.
        text_bytes: UTF-8 bytes of all their texts.
        scale: Bytes of all texts as a multiple of those counted; 1 where all were.
        error: Half of the 95 % interval of the token count, as a part of it; None where it cannot be told.
        counted_passages: Passages counted.
        lengths: Tokens of a block to distinct blocks counted of that length.
        stored: The same for those of them that the store has already.
        failures: Documents that cannot be used, among those counted, and sources that cannot be read.
        blocks: Some of the distinct blocks, each as likely as any other, for measurements.
        passages_kept: The passages of these.
    """

    documents: int
    documents_counted: int
    text_bytes: int
    scale: float
    error: float | None
    counted_passages: int
    lengths: Mapping[int, int]
    stored: Mapping[int, int]
    failures: tuple[DocumentFailure, ...]
    blocks: tuple[Block, ...]
    passages_kept: tuple[Passage, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every document was counted."""
        return self.scale == 1

    @property
    def passages(self) -> int:
        """Passages of all documents."""
        return round(self.scale * self.counted_passages)

    @property
    def distinct_blocks(self) -> int:
        """Blocks: passages with the same tokens share one."""
        return round(self.scale * sum(self.lengths.values()))

    @property
    def tokens(self) -> int:
        """Tokens of the distinct blocks."""
        return round(self.scale * sum(length * count for length, count in self.lengths.items()))

    @property
    def stored_blocks(self) -> int:
        """Distinct blocks that need not be computed."""
        return round(self.scale * sum(self.stored.values()))

    @property
    def stored_tokens(self) -> int:
        """Their tokens."""
        return round(self.scale * sum(length * count for length, count in self.stored.items()))

    def nbytes(self, layout: KVLayout, precision: Precision) -> int:
        """Bytes of the distinct blocks at rest, headers included."""
        return self._nbytes(self.lengths, layout, precision)

    def stored_nbytes(self, layout: KVLayout, precision: Precision) -> int:
        """Bytes of those of them that are stored already."""
        return self._nbytes(self.stored, layout, precision)

    def _nbytes(self, lengths: Mapping[int, int], layout: KVLayout, precision: Precision) -> int:
        total = sum(count * encoded_nbytes(layout, length, precision) for length, count in lengths.items())
        return round(self.scale * total)


def take_inventory(
    sources: Source | Iterable[Source],
    outline: ModelOutline,
    *,
    max_passage_tokens: int = 256,
    sample_bytes: int | None = None,
    stored: Callable[[Sequence[Block]], Collection[int]] | None = None,
    progress: Progress | None = None,
    readers: Mapping[str, DocumentReader] | None = None,
) -> Inventory:
    """Count what a pass over the sources would compute.

    Args:
        sources: What `read_documents` takes.
        outline: Of the model whose blocks are counted.
        max_passage_tokens: Most tokens of a passage's text.
        sample_bytes: Text that is cut and tokenized at most, chosen by a fixed seed; None for all of it. It is kept
            in memory while the rest is read.
        stored: Which of some blocks, by place, the store has already.
        progress: Told how far the counting is.
        readers: Reader per suffix, for file types that are not text.

    Raises:
        InputError: `max_passage_tokens` or `sample_bytes` is less than one.
    """
    for name, value in (("max_passage_tokens", max_passage_tokens), ("sample_bytes", sample_bytes)):
        if value is not None and value < 1:
            raise InputError(f"{name} is {value}; pass at least 1")
    # Of a sample, reading is what takes long; it is told as it goes.
    per_document = 1 if sample_bytes is None else 0
    counting = _Counting(outline, max_passage_tokens, stored, progress, per_document)
    documents = read_documents(sources, on_failure=counting.failures.append, readers=readers)
    read = _Reading(documents, progress, 1 - per_document)
    if progress is not None:
        progress.start(expected_documents(sources))
    try:
        chosen = read if sample_bytes is None else _sample(read, sample_bytes)
        for batch in in_batches(chosen, _BATCH_DOCUMENTS):
            counting.run(batch)
    finally:
        if progress is not None:
            progress.finish()
    return counting.inventory(read)


@dataclass(slots=True)
class _Reading:
    """Documents as they are read, and how much there was."""

    source: Iterator[Document]
    progress: Progress | None
    per_document: int
    documents: int = 0
    text_bytes: int = 0

    def __iter__(self) -> Iterator[Document]:
        for document in self.source:
            self.documents += 1
            self.text_bytes += _text_bytes(document)
            if self.progress is not None:
                self.progress.advance(documents=self.per_document)
            yield document


@dataclass(slots=True)
class _Counting:
    """What was counted so far."""

    outline: ModelOutline
    max_tokens: int
    is_stored: Callable[[Sequence[Block]], Collection[int]] | None
    progress: Progress | None
    per_document: int
    failures: list[DocumentFailure] = field(default_factory=list)
    documents: int = 0
    failed: int = 0
    failed_bytes: int = 0
    passages: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    stored: Counter[int] = field(default_factory=Counter)
    kept: list[tuple[Block, Passage]] = field(default_factory=list)
    # Sums over documents: bytes x bytes, bytes x tokens, tokens x tokens.
    squares: tuple[int, int, int] = (0, 0, 0)
    text_bytes: int = 0
    all_tokens: int = 0
    _seen: set[bytes] = field(default_factory=set)
    _random: random.Random = field(default_factory=lambda: random.Random(_SEED))

    def run(self, documents: Sequence[Document]) -> None:
        """Count one batch."""
        cut: list[tuple[Document, list[Passage]]] = []
        split = split_documents(documents, self.outline.tokenizer, max_tokens=self.max_tokens)
        for document, passages in zip(documents, split, strict=True):
            if isinstance(passages, InputError):
                self._fail(document, passages)
            else:
                cut.append((document, passages))
        new: list[Block] = []
        for document, passages, blocks in self._encoded(cut):
            new += self._add(document, passages, blocks)
        if self.is_stored is not None and new:
            self.stored.update(len(new[place].token_ids) for place in self.is_stored(new))

    def inventory(self, read: _Reading) -> Inventory:
        """The result."""
        counted_bytes = self.text_bytes + self.failed_bytes
        is_exact = self.documents + self.failed == read.documents
        return Inventory(
            documents=read.documents - self.failed,
            documents_counted=self.documents,
            text_bytes=read.text_bytes - self.failed_bytes,
            scale=1.0 if is_exact or not counted_bytes else read.text_bytes / counted_bytes,
            error=0.0 if is_exact else self._error(read.documents),
            counted_passages=self.passages,
            lengths=dict(sorted(self.lengths.items())),
            stored=dict(sorted(self.stored.items())),
            failures=tuple(self.failures),
            blocks=tuple(block for block, _ in self.kept),
            passages_kept=tuple(passage for _, passage in self.kept),
        )

    def _encoded(
        self, cut: list[tuple[Document, list[Passage]]]
    ) -> Iterator[tuple[Document, list[Passage], list[Block]]]:
        """Documents with their passages' blocks, in one batch; where that fails for its input, each alone."""
        try:
            blocks = iter(self._blocks([passage for _, passages in cut for passage in passages]))
        except InputError as error:
            if len(cut) == 1:
                self._fail(cut[0][0], error)
                return
            for one in cut:
                yield from self._encoded([one])
            return
        for document, passages in cut:
            yield document, passages, [next(blocks) for _ in passages]

    def _blocks(self, passages: Sequence[Passage]) -> list[Block]:
        blocks = self.outline.template.passage_blocks(self.outline.tokenizer, passages)
        for block in blocks:
            self.outline.profile.room_after(len(block.token_ids), what=f"the block of {block.source or block.kind!r}")
        return blocks

    def _add(self, document: Document, passages: Sequence[Passage], blocks: Sequence[Block]) -> list[Block]:
        """Count a document; returns its blocks that no document had before."""
        size, tokens = _text_bytes(document), sum(len(block.token_ids) for block in blocks)
        self.documents += 1
        self.text_bytes += size
        self.all_tokens += tokens
        both, mixed, own = self.squares
        self.squares = both + size * size, mixed + size * tokens, own + tokens * tokens
        self.passages += len(passages)
        new = []
        for block, passage in zip(blocks, passages, strict=True):
            digest = blake2b(repr(block.token_ids).encode(), digest_size=16).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                self.lengths[len(block.token_ids)] += 1
                self._keep(block, passage)
                new.append(block)
        if self.progress is not None:
            self.progress.advance(documents=self.per_document, passages=len(passages), tokens=tokens)
        return new

    def _keep(self, block: Block, passage: Passage) -> None:
        """Keep some of all blocks, each with the same chance (Vitter's algorithm R)."""
        if len(self.kept) < _KEPT:
            self.kept.append((block, passage))
        elif (place := self._random.randrange(len(self._seen))) < _KEPT:
            self.kept[place] = block, passage

    def _fail(self, document: Document, error: InputError) -> None:
        self.failures.append(DocumentFailure(document.id, error, document.id))
        self.failed += 1
        self.failed_bytes += _text_bytes(document)
        if self.progress is not None:
            self.progress.advance(documents=self.per_document)

    def _error(self, all_documents: int) -> float | None:
        """How far off the token count may be: the ratio estimator's error (Cochran, Sampling Techniques, 6.4)."""
        count = self.documents
        if count < 2 or not self.all_tokens:
            return None
        ratio = self.all_tokens / self.text_bytes
        both, mixed, own = self.squares
        residuals = own - 2 * ratio * mixed + ratio * ratio * both
        unseen = 1 - count / all_documents
        variance = max(0.0, residuals) * unseen * count / (count - 1)
        return _TWO_SIDED_95 * math.sqrt(variance) / self.all_tokens


def _sample(documents: Iterable[Document], most_bytes: int) -> list[Document]:
    """As many documents as fit, at least one, chosen at random without knowing how many come; in their order."""
    chance = random.Random(_SEED)
    kept: list[tuple[float, int, Document]] = []
    total = 0
    for place, document in enumerate(documents):
        heapq.heappush(kept, (-chance.random(), place, document))
        total += _text_bytes(document)
        while total > most_bytes and len(kept) > 1:
            total -= _text_bytes(heapq.heappop(kept)[2])
    return [document for _, _, document in sorted(kept, key=lambda entry: entry[1])]


def _text_bytes(document: Document) -> int:
    if document.passages:
        return sum(len(passage.text.encode()) for passage in document.passages)
    return len(document.text.encode())
