"""`Pins`: which blocks a store's running callers still need, so that it evicts others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from threading import Lock

__all__ = ["Pins"]


class Pins:
    """Keys that are held, each as often as somebody holds it; threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[object] = Counter()

    @contextmanager
    def held(self, keys: Iterable[str]) -> Iterator[None]:
        """Hold `keys` until the context ends."""
        mine: Counter[object] = Counter(set(keys))
        with self._lock:
            self._counts += mine
        try:
            yield
        finally:
            with self._lock:
                self._counts -= mine

    def __contains__(self, key: object) -> bool:
        return key in self._counts
