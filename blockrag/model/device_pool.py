"""Hot blocks in a device's memory, as they are at rest: what a prompt finds here crosses no bus.

One piece of memory, taken once, holds payloads of many blocks under their keys; the least recently used ones give way.
What a prompt being composed reads stays until it has been given to the device. Nothing here knows how a payload is
laid out or what it is used for.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import torch

from blockrag.errors import InputError
from blockrag.kernels.device import link_to

if TYPE_CHECKING:
    from blockrag.kernels.device import Link, Mark

__all__ = ["DevicePool", "DevicePoolStats", "Lease"]

T = TypeVar("T")

# Kernels read 16 bytes at a time; copies like whole lines of the memory.
_ALIGNMENT = 256


@dataclass(frozen=True, slots=True)
class DevicePoolStats:
    """What a pool holds, and what it was good for.

    Args:
        blocks: Blocks held.
        bytes: Their bytes.
        max_bytes: Bytes of the pool.
        hits: Blocks that were asked for and found.
        misses: Blocks that were asked for and not found.
        evictions: Blocks that gave way.
    """

    blocks: int
    bytes: int
    max_bytes: int
    hits: int
    misses: int
    evictions: int


class _Arena:
    """Which parts of a piece of memory are free: first fit, neighbours merged."""

    def __init__(self, size: int) -> None:
        # Offset to size, in the order of offsets.
        self._holes: list[tuple[int, int]] = [(0, size)]

    def take(self, size: int) -> int | None:
        """The offset of a free part of that size, which is free no longer; None where there is none."""
        for index, (offset, room) in enumerate(self._holes):
            if room >= size:
                self._holes[index : index + 1] = [(offset + size, room - size)] if room > size else []
                return offset
        return None

    def give(self, offset: int, size: int) -> None:
        """Free a part that was taken."""
        merged: list[tuple[int, int]] = []
        for hole in sorted([*self._holes, (offset, size)]):
            if merged and merged[-1][0] + merged[-1][1] == hole[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + hole[1])
            else:
                merged.append(hole)
        self._holes = merged


@dataclass(slots=True, eq=False)
class _Entry(Generic[T]):
    """A block in the pool; nobody finds it before it is `published`."""

    offset: int
    size: int
    memory: torch.Tensor
    content: T | None = None
    users: int = 0
    published: bool = False


class Lease(Generic[T]):
    """A block that stays in the pool until the lease is released; releasing twice is fine.

    A lease that is dropped is released. One that was never published leaves nothing behind.
    """

    __slots__ = ("_entry", "_key", "_pool")

    def __init__(self, pool: DevicePool[T], key: str, entry: _Entry[T]) -> None:
        self._pool: DevicePool[T] | None = pool
        self._key, self._entry = key, entry

    @property
    def memory(self) -> torch.Tensor:
        """The block's bytes on the device, one-dimensional uint8."""
        return self._entry.memory

    @property
    def content(self) -> T:
        """What was published with the block."""
        if self._entry.content is None:
            raise AssertionError("a lease from find() is of a published block")
        return self._entry.content

    def publish(self, content: T) -> None:
        """Let others find the block: all that fills its memory has been given to the link's queue of copies."""
        self._entry.content, self._entry.published = content, True

    def release(self) -> None:
        """The block may give way to others: all that reads its memory has been given to the device."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._released.append((self._key, self._entry))

    def __del__(self) -> None:
        self.release()


class DevicePool(Generic[T]):
    """A thread-safe map from block keys to payloads in a device's memory.

    Args:
        max_bytes: Bytes to take, at least 256.
        device: Whose memory; a CPU will do for tests.

    Raises:
        InputError: `max_bytes` is too small.
    """

    def __init__(self, max_bytes: int, device: torch.device | str) -> None:
        if max_bytes < _ALIGNMENT:
            raise InputError(f"a pool of {max_bytes} bytes holds no block; pass max_bytes of a gigabyte or more")
        self.link: Link = link_to(torch.device(device))
        self.max_bytes = max_bytes
        self._memory = torch.empty(max_bytes, dtype=torch.uint8, device=self.link.device)
        self._arena = _Arena(max_bytes)
        # The one used last stands last.
        self._entries: OrderedDict[str, _Entry[T]] = OrderedDict()
        # Leases end in any thread, also from the garbage collector while the lock is held: they only queue up here.
        self._released: list[tuple[str, _Entry[T]]] = []
        # Marks behind what has been reading blocks that may give way.
        self._reads: list[Mark] = []
        self._hits = self._misses = self._evictions = 0
        self._lock = threading.Lock()

    def find(self, key: str) -> Lease[T] | None:
        """The block of a key, to be read on a stream that waits for the link's queue of copies; None if not here."""
        with self._lock:
            self._settle()
            entry = self._entries.get(key)
            if entry is None or not entry.published:
                self._misses += 1
                return None
            self._hits += 1
            self._entries.move_to_end(key)
            return self._lease(key, entry)

    def held(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that can be found now; does not count as a use."""
        with self._lock:
            return {key for key in keys if (entry := self._entries.get(key)) is not None and entry.published}

    def reserve(self, key: str, nbytes: int) -> Lease[T] | None:
        """Memory for a new block, to be filled in the link's queue of copies and published.

        Blocks that gave way may still be being read: the queue of copies waits for that before it goes on.

        Returns:
            The lease; None where the key is taken, or too little can be freed.
        """
        size = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        with self._lock:
            self._settle()
            if key in self._entries or size > self.max_bytes:
                return None
            offset = self._make_room(size)
            if offset is None:
                return None
            entry: _Entry[T] = _Entry(offset, size, self._memory[offset : offset + nbytes])
            self._entries[key] = entry
            lease, reads = self._lease(key, entry), list(self._reads)
        with self.link.copying():
            for mark in reads:
                mark.wait()
        return lease

    def used(self, mark: Mark) -> None:
        """Blocks on lease were read by the device before this mark; to be called before they are released."""
        with self._lock:
            self._reads = [*(read for read in self._reads if not read.reached), mark]

    def stats(self) -> DevicePoolStats:
        """Counters of this pool."""
        with self._lock:
            self._settle()
            return DevicePoolStats(
                blocks=len(self._entries),
                bytes=sum(entry.memory.numel() for entry in self._entries.values()),
                max_bytes=self.max_bytes,
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
            )

    def clear(self) -> None:
        """Drop all blocks that no prompt is being composed from."""
        with self._lock:
            self._settle()
            for key in [key for key, entry in self._entries.items() if not entry.users]:
                self._drop(key)

    def _lease(self, key: str, entry: _Entry[T]) -> Lease[T]:
        entry.users += 1
        return Lease(self, key, entry)

    def _make_room(self, size: int) -> int | None:
        while (offset := self._arena.take(size)) is None:
            oldest = next((key for key, entry in self._entries.items() if not entry.users), None)
            if oldest is None:
                return None
            self._drop(oldest)
            self._evictions += 1
        return offset

    def _settle(self) -> None:
        """Account for the leases that have ended."""
        while self._released:
            key, entry = self._released.pop()
            entry.users -= 1
            if not entry.users and not entry.published:
                self._drop(key)

    def _drop(self, key: str) -> None:
        entry = self._entries.pop(key)
        self._arena.give(entry.offset, entry.size)
