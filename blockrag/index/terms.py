"""How many passages hold each word, for encoders that weigh words by it; the counts themselves lie in the database."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from blockrag.encoders.protocol import Encoder, StatisticalEncoder
from blockrag.index.database import PassageDatabase
from blockrag.passage import Passage

__all__ = ["TermCounts", "count_passages"]


class TermCounts:
    """The database's corpus statistics, in the form encoders take.

    Args:
        database: Where the counts are.
        passages: The number of passages in it, which its reader knows without counting.
    """

    def __init__(self, database: PassageDatabase, *, passages: int) -> None:
        self._database = database
        self._passages = passages

    @property
    def passages(self) -> int:
        """Number of passages in the index."""
        return self._passages

    def passages_with(self, terms: Collection[str]) -> Mapping[str, int]:
        """How many passages hold each of `terms`."""
        return self._database.term_counts(terms)


def count_passages(database: PassageDatabase, encoder: Encoder, passages: Sequence[Passage], sign: int) -> None:
    """Count the words of passages that come (`sign` +1) or go (-1), if the encoder counts words; in a transaction."""
    if isinstance(encoder, StatisticalEncoder) and passages:
        counts = Counter(term for terms in encoder.passage_terms(passages) for term in terms)
        database.count_terms({term: sign * count for term, count in counts.items()})
