"""What goes into a passage index and what comes out of it, apart from passages and hits: plain frozen records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from blockrag.passage import Passage

__all__ = ["Change", "DocumentInfo", "DocumentUpdate", "IndexOrigin", "IndexStats"]


@dataclass(frozen=True, slots=True)
class DocumentUpdate:
    """The state a document should have after an update.

    Args:
        document_id: The document; every passage must carry the same id.
        passages: All its passages, in reading order.
        content_hash: What the caller compares to see whether the document changed.
        block_keys: Passage id -> keys of its blocks in a block store; passages left out keep the keys they have.
        fingerprint: What those keys were computed under (model, template, precision).
    """

    document_id: str
    passages: Sequence[Passage]
    content_hash: str = ""
    block_keys: Mapping[str, Sequence[str]] | None = None
    fingerprint: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    """What one write did, in passages.

    Args:
        added: Passages embedded and inserted; a passage whose text changed counts here and in `removed`.
        kept: Passages of the update that were there already, with equal title and text.
        removed: Passages that are gone.
        orphaned_block_keys: Block keys that this write took from their last passage: the store may drop them.
    """

    added: int = 0
    kept: int = 0
    removed: int = 0
    orphaned_block_keys: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """One document of an index: its id, its number of passages, and the content hash it was last replaced with."""

    document_id: str
    passages: int
    content_hash: str


@dataclass(frozen=True, slots=True)
class IndexOrigin:
    """What an index was built with, which never changes: the encoder's name and the length of its vectors."""

    encoder: str
    dimension: int


@dataclass(frozen=True, slots=True)
class IndexStats:
    """Sizes of an index; `bytes` counts its files, or the database pages of an index in memory."""

    passages: int
    documents: int
    dimension: int
    encoder: str
    kind: str
    bytes: int
