"""How long the search takes that comes before a prompt: a small index of random vectors, kept in memory.

The encoder's own time is left out: it depends on the encoder, not on anything measured here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from blockrag.encoders.protocol import Vectors
from blockrag.index import PassageIndex
from blockrag.passage import Passage

__all__ = ["RandomIndex"]

_DIMENSION = 384


class RandomIndex:
    """An exact index over random vectors.

    Args:
        passages: How many.
        seed: Of the vectors.
    """

    def __init__(self, passages: int, *, seed: int) -> None:
        self.passages = passages
        self._index = PassageIndex(_RandomEncoder(seed))
        self._index.add([Passage(id=str(number), text=f"passage {number}") for number in range(passages)])

    def search_s(self, count: int, *, repeats: int) -> list[float]:
        """Seconds of finding `count` passages, once per repeat; at least one search before them warms up.

        Raises:
            RuntimeError: The index found fewer.
        """
        times = []
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            hits = self._index.search(f"question {repeat}", count)
            times.append(time.perf_counter() - started)
            if len(hits) != count:
                raise RuntimeError(f"asked for {count} of {self.passages} passages, found {len(hits)}")
        return times[1:]

    def close(self) -> None:
        """Drop the index."""
        self._index.close()


class _RandomEncoder:
    """Vectors that say nothing about the texts."""

    name = f"random-{_DIMENSION}"
    dimension = _DIMENSION

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """One random vector per question."""
        return self._vectors(len(questions))

    def encode_passages(self, passages: Sequence[Passage]) -> Vectors:
        """One random vector per passage."""
        return self._vectors(len(passages))

    def _vectors(self, count: int) -> Vectors:
        return self._generator.standard_normal((count, _DIMENSION), dtype=np.float32)
