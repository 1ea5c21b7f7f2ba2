"""What every block store is: a map from block keys to encoded blocks, nothing more.

Stores move opaque bytes (`blockrag.codec` gives them meaning and checks them), so one protocol serves memory, a
directory, or an object store, and nothing here assumes a single process. A store may lose a block at any time (it
was evicted, a disk failed): readers treat that as a miss and recompute. It must never return other bytes than those
put, short of damage to the medium, which the codec's checksum catches.

Beside the blocks a store remembers which fingerprints wrote into it, so that a miss after an upgrade can say what
changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from blockrag.fingerprint import Fingerprint
    from blockrag.stores.report import StoreReport

__all__ = ["BlockStore", "StoreStats"]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters of one store: its contents now, its traffic since it was opened.

    Args:
        blocks: Stored blocks; None where counting them would mean listing a bucket.
        bytes: Their bytes; None likewise.
        max_bytes: The byte budget; None where there is none.
        hits: Blocks asked for and handed out.
        misses: Blocks asked for and not handed out, whatever the reason.
        puts: Blocks stored.
        evictions: Blocks dropped for the budget.
        failures: Misses and writes that a fault or a deadline caused; each is logged.
        tiers: Counters of the stores it is made of, fastest first, by URL.
    """

    blocks: int | None
    bytes: int | None
    max_bytes: int | None
    hits: int
    misses: int
    puts: int
    evictions: int
    failures: int = 0
    tiers: tuple[tuple[str, StoreStats], ...] = ()


class BlockStore(Protocol):
    """A write-once, content-addressed map from block keys (64 lower-case hex digits) to encoded blocks.

    Every method may be called from several threads. Values are handed out as writable memoryviews only so that
    tensors can be made over them without a copy; callers never write into them.
    """

    @property
    def url(self) -> str:
        """Where the store is, in the form `open_store` takes."""
        ...

    def get(self, key: str) -> memoryview | None:
        """The encoded block, or None when it is not there."""
        ...

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each key with its encoded block or None, reading a bounded number ahead; keys must be distinct.

        Yields in the order of `keys`. A consumer that drops each value before it takes the next holds only the
        read-ahead in memory.
        """
        ...

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store one encoded block; replaces a block already there (a damaged copy is overwritten this way).

        Raises:
            StoreFullError: The block alone exceeds the store's byte budget, or the disk is full.
        """
        ...

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored, without reading the blocks."""
        ...

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks; missing keys are ignored. Returns how many were removed."""
        ...

    def keys(self) -> Iterator[str]:
        """All stored keys, in no particular order."""
        ...

    def stats(self) -> StoreStats:
        """Counters of this store."""
        ...

    def pinned(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Until the context ends, no `put` of this object evicts any of these blocks; may be nested and overlap.

        A running prompt pins its blocks, so that storing one it had to compute cannot push out one it has yet to read.
        A block that finds no room beside the pinned ones is refused with StoreFullError. Stores that evict nothing
        themselves do nothing here.
        """
        ...

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note that blocks of this fingerprint are written here; noting it again does nothing.

        Raises:
            StoreError: It cannot be written.
        """
        ...

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The remembered fingerprints by digest; one that cannot be read is left out and logged."""
        ...

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Read and check every block, and whatever else the store keeps.

        Args:
            fix: Remove what is damaged or belongs to nobody; a removed block is computed again when it is needed.

        Raises:
            StoreError: The store cannot be read at all.
        """
        ...

    def close(self) -> None:
        """Release files and handles; the store must not be used afterwards."""
        ...
