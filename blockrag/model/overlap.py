"""Finishing what was computed while the next is computed.

A model computes one batch of blocks after the other; what is left to do with a block (converting, checksumming,
writing) needs no model. Nothing here knows what a block is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

__all__ = ["overlapped"]

T = TypeVar("T")
R = TypeVar("R")


def overlapped(batches: Iterator[Sequence[T]], finish: Callable[[T], R], *, threads: int) -> Iterator[R]:
    """Finish the items of each batch in other threads while the caller's thread gets the next batch.

    At most one batch waits to be finished while the next is on its way, so that memory does not depend on how many
    there are. Where the caller stops early, what is being finished is finished, and what waits is dropped.

    Args:
        batches: Advanced in the caller's thread.
        finish: Called once for each item.
        threads: How many items may be finished at the same time; with 0 the caller's thread does it.

    Yields:
        What `finish` returned, in the order of the items.

    Raises:
        BaseException: What `batches` or `finish` raised; of the latter in the place of the item's result.
    """
    if threads == 0:
        for batch in batches:
            yield from map(finish, batch)
        return
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="blockrag-writer") as pool:
        try:
            for batch in batches:
                waiting.extend(pool.submit(finish, item) for item in batch)
                newest = len(batch)
                del batch
                while len(waiting) > newest:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
