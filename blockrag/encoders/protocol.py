"""What an encoder is: text in, vectors out, and a name that says when two encoders agree.

Similarity is the inner product everywhere. An encoder sees questions and passages only; it knows no index, no
database and no language model. Encoders whose query side weighs words by how rare they are in the corpus do not keep
those counts themselves: they are handed a `CorpusStatistics`, which the index keeps in step with its passages. That
is why one encoder object can serve several indexes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from blockrag.passage import Passage

__all__ = ["CorpusStatistics", "Encoder", "RescoringEncoder", "StatisticalEncoder", "Vectors"]

Vectors = NDArray[np.float32]
"""A `[n, dimension]` float32 array, one row per text."""


@runtime_checkable
class Encoder(Protocol):
    """Turns questions and passages into vectors whose inner product is their similarity.

    A passage's vector depends on its title and text alone, never on its id, its metadata or the rest of the corpus:
    an index keeps it for as long as the text is unchanged.
    """

    @property
    def name(self) -> str:
        """The encoder's identity: two encoders with equal names give equal vectors (to rounding)."""
        ...

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        ...

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """`[len(questions), dimension]` float32; an empty sequence gives a `[0, dimension]` array."""
        ...

    def encode_passages(self, passages: Sequence[Passage]) -> Vectors:
        """`[len(passages), dimension]` float32; an empty sequence gives a `[0, dimension]` array."""
        ...


class CorpusStatistics(Protocol):
    """Counts over the passages of one corpus, as they stand now."""

    @property
    def passages(self) -> int:
        """Number of passages in the corpus."""
        ...

    def passages_with(self, terms: Collection[str]) -> Mapping[str, int]:
        """How many passages hold each term (the document frequency); terms in no passage may be left out."""
        ...


@runtime_checkable
class StatisticalEncoder(Encoder, Protocol):
    """An encoder whose query vectors use corpus statistics; its passage vectors do not.

    The index counts `passage_terms` when passages come and go, and asks for query vectors with those counts. Adding
    passages therefore never makes a stored passage vector wrong.
    """

    def passage_terms(self, passages: Sequence[Passage]) -> list[frozenset[str]]:
        """The distinct terms of each passage, as `CorpusStatistics` must count them."""
        ...

    def encode_queries_with(self, questions: Sequence[str], statistics: CorpusStatistics) -> Vectors:
        """Like `encode_queries`, weighing each term by the corpus counts."""
        ...


@runtime_checkable
class RescoringEncoder(StatisticalEncoder, Protocol):
    """An encoder whose vectors only approximate the score it means, and which can compute that score from the text.

    The index finds candidates by the vectors, and orders them by `score`.
    """

    @property
    def spare_candidates(self) -> int:
        """How many candidates beyond the wanted ones to look at."""
        ...

    def score(self, question: str, passages: Sequence[Passage], statistics: CorpusStatistics) -> list[float]:
        """What the inner product of the question with each passage approximates."""
        ...
