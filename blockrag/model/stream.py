"""Something produced piece by piece that ends with a result: an answer in progress."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

from blockrag.errors import InputError

__all__ = ["ResultStream"]

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class ResultStream(Iterator[Piece], Generic[Piece, Result]):
    """Iterate for the pieces, then read `result`. Closing or dropping the stream stops the work and frees its cache.

    Args:
        run: Yields the pieces and returns the result. Nothing runs before the first piece is asked for.
    """

    def __init__(self, run: Generator[Piece, None, Result]) -> None:
        self._results: list[Result] = []
        self._pieces = self._remember(run)

    @property
    def result(self) -> Result:
        """What the stream ended with.

        Raises:
            InputError: The stream has not been read to its end.
        """
        if not self._results:
            raise InputError("the answer is not finished; read the stream to its end, or call finish()")
        return self._results[0]

    def __next__(self) -> Piece:
        return next(self._pieces)

    def finish(self) -> Result:
        """Read the rest of the stream; returns the result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Stop the work. Safe to call twice, and after the end."""
        self._pieces.close()

    def _remember(self, run: Generator[Piece, None, Result]) -> Generator[Piece, None, None]:
        self._results.append((yield from run))
