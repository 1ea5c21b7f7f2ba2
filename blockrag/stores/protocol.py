"""What every block store is: a map from block keys to encoded blocks, nothing more.

Stores move opaque bytes (`blockrag.codec` gives them meaning and checks them), so one protocol serves memory, a
directory, or an object store, and nothing here assumes a single process. A store may lose a block at any time (it
was evicted, a disk failed): readers treat that as a miss and recompute. It must never return other bytes than those
put, short of damage to the medium, which the codec's checksum catches.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

__all__ = ["BlockStore", "StoreStats"]


@dataclass(frozen=True, slots=True)
class StoreStats:
    """Counters of one store: its contents now, its traffic since it was opened.

    `max_bytes` is None where there is no budget.
    """

    blocks: int
    bytes: int
    max_bytes: int | None
    hits: int
    misses: int
    puts: int
    evictions: int


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

    def close(self) -> None:
        """Release files and handles; the store must not be used afterwards."""
        ...
