"""The memory of prompts: buffers in reserve, and finished prompts that are kept composed, under one cap.

Freshly allocated memory costs two to three times the copy into it, so the buffer of a finished prompt is used again.
Where the next question is likely to be about the same passages, what it holds is worth keeping as well: such a buffer
waits under a key, and gives way, the least recently used first, when the memory is needed for another prompt.

Nothing here knows what a buffer holds.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["BufferPool", "PoolStats", "memory_share"]

_MOST_HOST_BYTES = 4 << 30
_SHARE = 8
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
# Two pages of 2 MiB: below that there may be no whole one inside.
_HUGE_FROM_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class PoolStats:
    """What a pool holds, and what it was good for.

    Args:
        kept_prompts: Prompts kept composed.
        kept_bytes: Bytes of their buffers.
        spare_bytes: Bytes of buffers in reserve that hold nothing of use.
        max_bytes: The cap on both together.
        hits: Prompts that were found composed.
        misses: Prompts that were looked for and composed anew.
    """

    kept_prompts: int
    kept_bytes: int
    spare_bytes: int
    max_bytes: int
    hits: int
    misses: int


@dataclass(slots=True, eq=False)
class _Idle:
    """A buffer no prompt is using; with a key, `content` is what it holds."""

    buffer: torch.Tensor
    key: Hashable | None = None
    content: object = None


class BufferPool:
    """Reuses the large buffers of finished prompts, and keeps what some of them hold.

    Args:
        max_bytes: Bytes of all buffers no prompt is using.
        kept_bytes: Of these, the bytes of kept prompts; by default all, 0 to keep none.
    """

    def __init__(self, max_bytes: int = _MOST_HOST_BYTES, kept_bytes: int | None = None) -> None:
        self.max_bytes = max_bytes
        self.max_kept_bytes = max_bytes if kept_bytes is None else min(kept_bytes, max_bytes)
        # The one that came back last stands last.
        self._idle: list[_Idle] = []
        self._hits = self._misses = 0
        # Reentrant: a stream that is dropped releases its buffer from the garbage collector, which may run in here.
        self._lock = threading.RLock()

    @property
    def free_bytes(self) -> int:
        """Bytes no prompt is using."""
        with self._lock:
            return _total(self._idle)

    def stats(self) -> PoolStats:
        """What the pool holds."""
        with self._lock:
            kept = self._kept()
            return PoolStats(
                kept_prompts=len(kept),
                kept_bytes=_total(kept),
                spare_bytes=_total(self._idle) - _total(kept),
                max_bytes=self.max_bytes,
                hits=self._hits,
                misses=self._misses,
            )

    def acquire(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """A uint8 buffer of at least `nbytes` bytes, contents undefined.

        It is the smallest one in reserve that is not wasteful. A kept prompt's buffer is taken, the oldest first,
        where one more would push a kept prompt out anyway when it comes back.
        """
        with self._lock:
            found = self._fitting(nbytes, device)
            if found is not None:
                self._idle.remove(found)
                return found.buffer
        return _new_buffer(nbytes, device)

    def release(self, buffer: torch.Tensor, *, key: Hashable | None = None, content: object = None) -> None:
        """Give a buffer back; the caller must not use any view of it afterwards.

        Args:
            buffer: From `acquire` or `take`.
            key: Keep what the buffer holds, for `take` with this key; what was kept under it before is not.
            content: What `take` hands out with the buffer.
        """
        with self._lock:
            if key is not None:
                for idle in self._idle:
                    if idle.key == key:
                        idle.key = idle.content = None
            self._idle.append(_Idle(buffer, key, content))
            self._trim()

    def take(self, key: Hashable, fits: Callable[[object], bool]) -> tuple[torch.Tensor, object] | None:
        """What was kept under a key, for one user: it is the pool's no longer.

        Args:
            key: The key.
            fits: Whether the content is of use; where it is not, it stays.

        Returns:
            Buffer and content, or None.
        """
        with self._lock:
            for idle in self._idle:
                if idle.key == key and fits(idle.content):
                    self._idle.remove(idle)
                    self._hits += 1
                    return idle.buffer, idle.content
            self._misses += 1
            return None

    def _kept(self) -> list[_Idle]:
        return [idle for idle in self._idle if idle.key is not None]

    def _fitting(self, nbytes: int, device: torch.device) -> _Idle | None:
        fitting = [
            idle
            for idle in self._idle
            if idle.buffer.device == device and nbytes <= idle.buffer.numel() <= 2 * nbytes + (1 << 20)
        ]
        if spare := [idle for idle in fitting if idle.key is None]:
            return min(spare, key=lambda idle: idle.buffer.numel())
        full = _total(self._idle) + nbytes > self.max_bytes or _total(self._kept()) + nbytes > self.max_kept_bytes
        return fitting[0] if fitting and full else None

    def _trim(self) -> None:
        while _total(kept := self._kept()) > self.max_kept_bytes:
            kept[0].key = kept[0].content = None
        while _total(self._idle) > self.max_bytes:
            # The oldest: prompts tend to grow, and the sizes of today are those asked for next.
            spare = [idle for idle in self._idle if idle.key is None]
            self._idle.remove((spare or self._idle)[0])


def memory_share(device: torch.device) -> int:
    """Bytes of memory that may be set aside for prompts nobody is asking: an eighth of it, on a host at most 4 GiB.

    A control group's limit counts as the memory there is.
    """
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory) // _SHARE
    return min(_MOST_HOST_BYTES, _host_bytes() // _SHARE)


def _host_bytes() -> int:
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        # Not said on this system: what a small machine has.
        physical = 8 << 30
    try:
        limit = _CGROUP_LIMIT.read_text().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def _total(idle: list[_Idle]) -> int:
    return sum(one.buffer.numel() for one in idle)


def _new_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """Uninitialized memory, on the host in pages of 2 MiB where Linux has them: a fifth of the first touch's time."""
    if device.type == "cpu" and nbytes >= _HUGE_FROM_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):
        region = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            region.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            # A kernel built without them.
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
        return torch.frombuffer(region, dtype=torch.uint8)
    return torch.empty(nbytes, dtype=torch.uint8, device=device)
