"""The seam to a device: memory it can copy from while it computes, a queue of copies beside the one it computes in.

On a CUDA device copies from pinned host memory run on a stream of their own, and marks say what has to come before
what. On any other device everything happens at once in the calling thread, and a mark means nothing; the code that
uses this is the same, so that it runs in tests without a GPU. Nothing here knows what is copied.
Source: https://docs.pytorch.org/docs/stable/notes/cuda.html
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CudaLink", "Link", "Mark", "link_to"]

# Pinned memory that copies may be reading from at one time: enough to keep the bus busy while threads fill the rest.
_MOST_STAGED_BYTES: Final = 512 << 20


class Mark:
    """A point in a device's work; on a device that works at once, nothing."""

    def wait(self) -> None:
        """What is given to the current stream from now on begins behind this point."""

    def synchronize(self) -> None:
        """Wait in the calling thread until the device has reached this point."""

    @property
    def reached(self) -> bool:
        """Whether the device has reached this point."""
        return True


class Link:
    """A device whose work is done when the call returns, such as a CPU.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @contextmanager
    def copying(self) -> Iterator[None]:
        """Within, work goes to the queue of copies instead of the current stream."""
        yield

    @contextmanager
    def current(self) -> Iterator[None]:
        """Within, this is the device that kernels are launched on."""
        yield

    def mark(self) -> Mark:
        """What has been given to the current stream so far."""
        return Mark()

    def is_pinned(self, memory: torch.Tensor) -> bool:
        """Whether the device copies from this host memory by itself."""
        return False

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy host memory to the device, in the queue of copies; the source may be used again at once.

        Args:
            source: One-dimensional uint8, in host memory of any kind.
            target: Of the same size, on the device.
        """
        target.copy_(source)

    def fetch_pinned(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """As `fetch`, several sources and targets, from memory for which `is_pinned` holds.

        The sources stay alive until the copies are over; nobody writes to them before that.
        """
        for source, target in copies:
            target.copy_(source)

    def upload(self, *arrays: NDArray[np.int64]) -> list[torch.Tensor]:
        """Small tables for the next kernel on the current stream, each one-dimensional, from a multiple of 16 bytes."""
        # Sixteen bytes hold two numbers.
        sizes = [array.size + array.size % 2 for array in arrays]
        host = self._host_memory(sum(sizes), torch.int64)
        numbers, offset, cuts = host.numpy(), 0, []
        for array, size in zip(arrays, sizes, strict=True):
            numbers[offset : offset + array.size] = array.reshape(-1)
            cuts.append(slice(offset, offset + array.size))
            offset += size
        device = self._to_device(host)
        return [device[cut] for cut in cuts]

    def used_here(self, memory: torch.Tensor) -> None:
        """Memory that was allocated while `copying` is read by the current stream: not to be used again before that."""

    def _host_memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype)

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device)


class _Event(Mark):
    """An event recorded on a stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._device = stream.device
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(stream)

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def synchronize(self) -> None:
        self._event.synchronize()

    @property
    def reached(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _Underway:
    """Host memory that copies before a mark are reading."""

    mark: Mark
    sources: Sequence[torch.Tensor]
    staged_bytes: int


class CudaLink(Link):
    """A CUDA device. Thread-safe: several threads may copy, each has a current stream of its own.

    Args:
        device: The device, with its index.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._lock = threading.Lock()
        # Host memory that copies are reading; PyTorch knows only of memory that begins where it was allocated.
        self._underway: deque[_Underway] = deque()

    @contextmanager
    def copying(self) -> Iterator[None]:  # noqa: D102 -- as for every link; also below
        with torch.cuda.stream(self._stream):
            yield

    @contextmanager
    def current(self) -> Iterator[None]:  # noqa: D102
        with torch.cuda.device(self.device):
            yield

    def mark(self) -> Mark:  # noqa: D102
        return _Event(torch.cuda.current_stream(self.device))

    def is_pinned(self, memory: torch.Tensor) -> bool:  # noqa: D102
        return bool(memory.is_pinned())

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> None:  # noqa: D102
        self._sweep(source.numel())
        staged = self._host_memory(source.numel(), torch.uint8)
        staged.copy_(source)
        self._copy([(staged, target)], staged.numel())

    def fetch_pinned(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:  # noqa: D102
        self._sweep(0)
        self._copy(copies, 0)

    def _copy(self, copies: Sequence[tuple[torch.Tensor, torch.Tensor]], staged_bytes: int) -> None:
        with self.copying():
            for source, target in copies:
                target.copy_(source, non_blocking=True)
            mark = self.mark()
        with self._lock:
            self._underway.append(_Underway(mark, [source for source, _ in copies], staged_bytes))

    def used_here(self, memory: torch.Tensor) -> None:  # noqa: D102
        memory.record_stream(torch.cuda.current_stream(self.device))

    def _sweep(self, coming: int) -> None:
        """Let go of what has been copied; where too much is staged, wait for some of it."""
        waited: list[_Underway] = []
        with self._lock:
            while self._underway and self._underway[0].mark.reached:
                self._underway.popleft()
            surplus = sum(one.staged_bytes for one in self._underway) + coming - _MOST_STAGED_BYTES
            while self._underway and surplus > 0 < coming:
                waited.append(self._underway.popleft())
                surplus -= waited[-1].staged_bytes
        for one in waited:
            one.mark.synchronize()

    def _host_memory(self, count: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(count, dtype=dtype, pin_memory=True)

    def _to_device(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self.device, non_blocking=True)


@lru_cache(maxsize=16)
def link_to(device: torch.device) -> Link:
    """The one link to a device, so that all copies to it go through one queue."""
    if device.type != "cuda":
        return Link(device)
    return CudaLink(torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index))
