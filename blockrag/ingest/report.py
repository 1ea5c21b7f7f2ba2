"""`IngestReport`: what one pass over the sources did, in numbers and in words."""

from __future__ import annotations

from dataclasses import dataclass

from blockrag.ingest.reading import DocumentFailure

__all__ = ["IngestReport"]

_SHOWN_FAILURES = 10


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What an ingest pass did.

    Args:
        documents: Documents that are in the index now and came from the sources.
        documents_unchanged: Those of them that were there already, as they are.
        passages: Passages of the documents that were new or changed.
        blocks_new: Blocks computed and stored.
        blocks_reused: Blocks the store had already; passages with the same text share one.
        tokens_new: Tokens prefilled.
        tokens_reused: Tokens of the blocks reused.
        bytes_new: Bytes of the blocks stored, as they lie in the store.
        seconds: Wall-clock seconds of the whole pass.
        failures: Documents that could not be used, in the order they were met.
        documents_removed: Documents pruned because the sources no longer have them.
        blocks_deleted: Blocks dropped from the store because no passage uses them any more.
    """

    documents: int
    documents_unchanged: int
    passages: int
    blocks_new: int
    blocks_reused: int
    tokens_new: int
    tokens_reused: int
    bytes_new: int
    seconds: float
    failures: tuple[DocumentFailure, ...] = ()
    documents_removed: int = 0
    blocks_deleted: int = 0

    def __str__(self) -> str:
        rate = f", {self.tokens_new / self.seconds:,.0f} tokens/s" if self.tokens_new and self.seconds else ""
        lines = [
            f"{_many(self.documents, 'document')} ({self.documents_unchanged:,} unchanged), "
            f"{_many(self.passages, 'passage')} written in {self.seconds:.1f} s",
            f"{_many(self.blocks_new, 'block')} computed ({self.tokens_new:,} tokens, {_size(self.bytes_new)}{rate}), "
            f"{self.blocks_reused:,} reused ({self.tokens_reused:,} tokens)",
        ]
        if self.documents_removed or self.blocks_deleted:
            removed, deleted = _many(self.documents_removed, "document"), _many(self.blocks_deleted, "unused block")
            lines.append(f"{removed} removed, {deleted} deleted")
        if self.failures:
            lines.append(f"{len(self.failures):,} failed:")
            lines += [f"  {failure}" for failure in self.failures[:_SHOWN_FAILURES]]
        if len(self.failures) > _SHOWN_FAILURES:
            lines.append(f"  ... and {len(self.failures) - _SHOWN_FAILURES:,} more")
        return "\n".join(lines)


def _many(count: int, noun: str) -> str:
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def _size(nbytes: int) -> str:
    """Bytes in the largest binary unit that gives a number of at least one."""
    size, unit = float(nbytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
