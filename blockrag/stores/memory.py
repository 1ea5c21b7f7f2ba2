"""`MemoryStore`: encoded blocks in this process's memory, least recently used out first.

For tests, single runs, and as the fast tier before a slower store. It knows nothing about what the bytes mean.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from threading import Lock
from typing import TYPE_CHECKING

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.fingerprint import check_key
from blockrag.stores.arguments import byte_view, check_distinct
from blockrag.stores.pins import Pins
from blockrag.stores.protocol import StoreStats

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from blockrag.fingerprint import Fingerprint
    from blockrag.stores.report import StoreReport

__all__ = ["MemoryStore"]


def _can_pin() -> bool:
    import torch

    return torch.cuda.is_available()


def _pinned_copy(data: memoryview) -> memoryview:
    """A copy in page-locked memory, which lives as long as a view of it."""
    import torch

    # What the view keeps alive is the array, and the array the tensor.
    block = torch.empty(len(data), dtype=torch.uint8, pin_memory=True).numpy().data
    block[:] = data
    return block


class MemoryStore:
    """A thread-safe map with a byte budget. Implements `BlockStore`.

    A `put` copies the bytes once, so that the caller may reuse its buffer; a `get` copies nothing. Memory of an
    evicted block is freed when the last view of it is gone.

    Args:
        max_bytes: Budget for the blocks' bytes, at least 1; None for no limit.
        pinned: Keep them in page-locked memory, which a CUDA device copies from by itself while it computes. It is
            slow to allocate, and rounded up to a power of two.

    Raises:
        InputError: `max_bytes` is less than 1, or there is no CUDA device for which memory could be pinned.
    """

    def __init__(self, max_bytes: int | None = None, *, pinned: bool = False) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes}; pass at least 1, or None for no limit")
        if pinned and not _can_pin():
            raise InputError("pinned=True needs a CUDA device; leave it out")
        self._max_bytes = max_bytes
        self._copied = _pinned_copy if pinned else bytearray
        self._lock = Lock()
        self._blocks: OrderedDict[str, bytearray | memoryview] = OrderedDict()
        self._pins = Pins()
        self._fingerprints: dict[str, Fingerprint] = {}
        self._closed = False
        self._bytes = self._hits = self._misses = self._puts = self._evictions = 0

    @property
    def url(self) -> str:
        """`memory://`, with the budget; every store opened from it is a new, empty one."""
        return "memory://" if self._max_bytes is None else f"memory://?max_bytes={self._max_bytes}"

    def get(self, key: str) -> memoryview | None:
        """The encoded block as a view of the stored bytes, or None; counts as a use of the block.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        check_key(key)
        with self._lock:
            self._check_open()
            block = self._blocks.get(key)
            if block is None:
                self._misses += 1
                return None
            self._hits += 1
            self._blocks.move_to_end(key)
            return memoryview(block)

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order.

        Raises:
            InputError: A key comes twice or is malformed (the latter when its turn comes).
        """
        check_distinct(keys)
        return ((key, self.get(key)) for key in keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store a copy of `data`, evicting the least recently used blocks until it fits.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: `data` exceeds the budget, alone or beside the pinned blocks; nothing is evicted for it.
            StoreError: The store is closed.
        """
        check_key(key)
        block = self._copied(byte_view(data))
        if self._max_bytes is not None and len(block) > self._max_bytes:
            raise StoreFullError(f"a block of {len(block)} bytes exceeds max_bytes={self._max_bytes}; raise max_bytes")
        with self._lock:
            self._check_open()
            for victim in self._victims(key, len(block)):
                self._remove(victim)
                self._evictions += 1
            self._remove(key)
            self._blocks[key] = block
            self._bytes += len(block)
            self._puts += 1

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored; does not count as a use.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        wanted = {check_key(key) for key in keys}
        with self._lock:
            self._check_open()
            return wanted & self._blocks.keys()

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks; returns how many there were.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        wanted = {check_key(key) for key in keys}
        with self._lock:
            self._check_open()
            return sum(self._remove(key) for key in wanted)

    def keys(self) -> Iterator[str]:
        """The keys stored at this moment.

        Raises:
            StoreError: The store is closed.
        """
        with self._lock:
            self._check_open()
            return iter(list(self._blocks))

    def stats(self) -> StoreStats:
        """Counters of this store.

        Raises:
            StoreError: The store is closed.
        """
        with self._lock:
            self._check_open()
            return StoreStats(
                blocks=len(self._blocks),
                bytes=self._bytes,
                max_bytes=self._max_bytes,
                hits=self._hits,
                misses=self._misses,
                puts=self._puts,
                evictions=self._evictions,
            )

    def pinned(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Until the context ends, no `put` evicts any of these blocks."""
        return self._pins.held(keys)

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note that blocks of this fingerprint are written here."""
        with self._lock:
            self._fingerprints[fingerprint.digest] = fingerprint

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The remembered fingerprints by digest."""
        with self._lock:
            return dict(self._fingerprints)

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Check every block.

        Raises:
            StoreError: The store is closed.
        """
        from blockrag.stores.report import check_blocks

        return check_blocks(self, fix=fix)

    def close(self) -> None:
        """Drop all blocks; closing twice is fine."""
        with self._lock:
            self._closed = True
            self._blocks.clear()
            self._bytes = 0

    def _check_open(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.url} is closed; open it again with open_store()")

    def _victims(self, key: str, size: int) -> list[str]:
        """The least recently used blocks that must go for `size` bytes under `key`."""
        if self._max_bytes is None:
            return []
        excess = self._bytes - len(self._blocks.get(key, b"")) + size - self._max_bytes
        victims = []
        for other, block in self._blocks.items():
            if excess <= 0:
                break
            if other != key and other not in self._pins:
                victims.append(other)
                excess -= len(block)
        if excess > 0:
            raise StoreFullError(
                f"a block of {size} bytes finds no room in max_bytes={self._max_bytes} beside the blocks that running "
                "prompts use; raise max_bytes"
            )
        return victims

    def _remove(self, key: str) -> bool:
        block = self._blocks.pop(key, None)
        if block is None:
            return False
        self._bytes -= len(block)
        return True
