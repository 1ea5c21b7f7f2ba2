"""Searching an index: from a question or a vector to the nearest passages, in step with the database.

It owns the order of things in a search: the vectors catch up first, then filters, candidates and texts are read while
no write lands. Which rows are nearest is in `nearest`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from blockrag.encoders.protocol import Encoder, RescoringEncoder, StatisticalEncoder, Vectors
from blockrag.errors import InputError
from blockrag.index.database import PassageDatabase
from blockrag.index.embedding import checked_vectors
from blockrag.index.following import FollowingVectors
from blockrag.index.nearest import nearest_rows
from blockrag.index.terms import TermCounts
from blockrag.index.updates import storable
from blockrag.index.vectors import Rows
from blockrag.passage import Hit

__all__ = ["Searcher"]

_QUERIES_AT_ONCE = 64


class Searcher:
    """Answers what `PassageIndex` is asked; what its methods take, give and raise is said there.

    Args:
        encoder: Embeds questions, and may score candidates by their text.
        database: Holds passages and vectors.
        vectors: Finds candidates.
    """

    def __init__(self, encoder: Encoder, database: PassageDatabase, vectors: FollowingVectors) -> None:
        self._encoder = encoder
        self._database = database
        self._vectors = vectors

    def search_many(self, questions: Sequence[str], k: int, where: Mapping[str, object] | None) -> list[list[Hit]]:
        """The best `k` passages for each question."""
        _check(k, where)
        self._vectors.catch_up()
        queries = self._encode(questions)
        hits: list[list[Hit]] = []
        with self._vectors.lock.reading():
            allowed = self._database.matching(where) if where else None
            for start in range(0, len(queries), _QUERIES_AT_ONCE):
                some = slice(start, start + _QUERIES_AT_ONCE)
                hits += self._hits(questions[some], queries[some], k, allowed)
        return hits

    def search_vectors(
        self,
        queries: Vectors,
        k: int,
        where: Mapping[str, object] | None,
        passage_ids: Collection[str] | None,
    ) -> list[list[Hit]]:
        """The best `k` passages for each query vector."""
        _check(k, where)
        for passage_id in passage_ids or ():
            storable("passage id", passage_id)
        checked = checked_vectors(self._encoder, queries, what="query vectors")
        self._vectors.catch_up()
        hits: list[list[Hit]] = []
        with self._vectors.lock.reading():
            allowed = self._database.matching(where) if where else None
            if passage_ids is not None:
                chosen = np.array([row for row, _ in self._database.rows_of(set(passage_ids)).values()], dtype=np.int64)
                allowed = np.sort(chosen) if allowed is None else np.intersect1d(chosen, allowed)
            for start in range(0, len(checked), _QUERIES_AT_ONCE):
                hits += self._nearest(checked[start : start + _QUERIES_AT_ONCE], k, allowed)
        return hits

    def _nearest(self, queries: Vectors, k: int, allowed: Rows | None) -> list[list[Hit]]:
        """The hits of some queries, ordered by inner product."""
        best = nearest_rows(self._database, self._vectors.index, queries, k, allowed)
        found = self._database.passages_at({row for rows in best for row, _ in rows})
        return [[Hit(found[row], score) for row, score in rows if row in found] for rows in best]

    def _hits(self, questions: Sequence[str], queries: Vectors, k: int, allowed: Rows | None) -> list[list[Hit]]:
        """The hits of some queries, ordered by inner product, or by the score the encoder computes from the text."""
        encoder = self._encoder
        if not isinstance(encoder, RescoringEncoder):
            return self._nearest(queries, k, allowed)
        best = nearest_rows(self._database, self._vectors.index, queries, k + encoder.spare_candidates, allowed)
        found = self._database.passages_at({row for rows in best for row, _ in rows})
        hits = []
        for question, rows in zip(questions, best, strict=True):
            candidates = [found[row] for row, _ in sorted(rows) if row in found]
            scores = encoder.score(question, candidates, self._term_counts())
            # Sorting is stable: equal scores stay in order of addition.
            ranked = sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])
            hits.append([Hit(passage, score) for passage, score in ranked[:k]])
        return hits

    def _encode(self, questions: Sequence[str]) -> Vectors:
        if isinstance(self._encoder, StatisticalEncoder):
            return self._encoder.encode_queries_with(questions, self._term_counts())
        return self._encoder.encode_queries(questions)

    def _term_counts(self) -> TermCounts:
        return TermCounts(self._database, passages=len(self._vectors.index.rows))


def _check(k: int, where: Mapping[str, object] | None) -> None:
    if k < 1:
        raise InputError(f"k is {k}; ask for at least 1 passage")
    for name, value in (where or {}).items():
        if name == "document_id" and isinstance(value, str):
            storable("document id", value)
