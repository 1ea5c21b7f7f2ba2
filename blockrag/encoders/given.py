"""Vectors that come from outside: for indexes whose passages somebody else embeds, such as a framework's own model.

It says what an index must know of such vectors, their name and length, and refuses to make any.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from blockrag.encoders.protocol import Vectors
from blockrag.errors import InputError
from blockrag.passage import Passage

__all__ = ["GivenVectors", "as_vectors"]


def as_vectors(values: ArrayLike, *, what: str = "vectors") -> Vectors:
    """Numbers from outside as a float32 array of the same shape; too large ones become infinite.

    Args:
        values: Vectors, or one of them.
        what: What they are, for the error.

    Raises:
        InputError: They are no numbers, or vectors of several lengths.
    """
    try:
        with np.errstate(over="ignore"):
            return np.asarray(values, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what} are no numbers in rows of one length ({error}); pass those of one model") from error


class GivenVectors:
    """An encoder that stands for vectors made elsewhere; similarity is their inner product.

    Args:
        name: Names what makes them; an index opens only under the name it was built with.
        dimension: Length of every vector.

    Raises:
        InputError: The name is empty, or the dimension is less than 1.
    """

    def __init__(self, name: str, dimension: int) -> None:
        if not name:
            raise InputError("given vectors need a name; pass e.g. the name of the embedding model")
        if dimension < 1:
            raise InputError(f"the dimension is {dimension}; pass the length of the vectors")
        self._name = name
        self._dimension = dimension

    @property
    def name(self) -> str:
        """What makes the vectors."""
        return self._name

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return self._dimension

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """Refused: a question's vector must be given.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"the index of {self._name!r} embeds no questions; embed them yourself and call "
            "PassageIndex.search_vectors(vectors, k)"
        )

    def encode_passages(self, passages: Sequence[Passage]) -> Vectors:
        """Refused: a passage's vector must be given.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"the index of {self._name!r} embeds no passages; embed them yourself and call "
            "PassageIndex.add(passages, vectors=vectors)"
        )
