"""The threads that bring blocks from a store into a prompt's cache.

Reading, verifying and placing a block are one piece of work for one thread, so that its bytes are still in the
processor's cache from one step to the next; different blocks go to different threads. The calling thread is one of
them. All of it happens in calls that release Python's lock. Nothing here knows what a block is.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

import torch

__all__ = ["Dealer", "Readers"]

T = TypeVar("T")

# Copying reaches the memory's bandwidth with a few threads on every machine; more only wake more sleepers.
_MAX_THREADS = 8


class Readers:
    """A few threads that live as long as this object; they keep their connections to a store open between prompts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = os.getpid()

    @property
    def count(self) -> int:
        """Threads worth using, the calling one included: as many as torch computes with."""
        return max(1, min(_MAX_THREADS, torch.get_num_threads()))

    def run(self, tasks: Sequence[Callable[[], None]]) -> None:
        """Run all tasks at the same time, the first in the calling thread, and wait for them.

        Raises:
            BaseException: What the first failing task raised, once all have ended.
        """
        futures = [self._executor().submit(task) for task in tasks[1:]]
        try:
            tasks[0]()
        finally:
            errors = [future.exception() for future in futures]
        for error in errors:
            if error is not None:
                raise error

    def _executor(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None or self._pid != os.getpid():
                # The threads of a pool do not survive a fork.
                self._pool = ThreadPoolExecutor(_MAX_THREADS, thread_name_prefix="blockrag-reader")
                self._pid = os.getpid()
            return self._pool


class Dealer(Generic[T]):
    """Deals out a sequence to several threads: large pieces first, small ones at the end, so that all end together.

    Args:
        items: What to deal out.
        readers: How many threads take pieces.
    """

    def __init__(self, items: Sequence[T], readers: int) -> None:
        self._items, self._readers, self._next = items, readers, 0
        self._lock = threading.Lock()

    def take(self) -> Sequence[T]:
        """The next piece; empty when there is none left."""
        with self._lock:
            left = len(self._items) - self._next
            size = left if self._readers == 1 else -(-left // (2 * self._readers))
            piece = self._items[self._next : self._next + size]
            self._next += size
            return piece
