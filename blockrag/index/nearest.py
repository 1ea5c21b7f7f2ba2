"""Which rows are nearest to a query: candidates from the vectors, exact scores and order from the database."""

from __future__ import annotations

import numpy as np

from blockrag.encoders.protocol import Vectors
from blockrag.index.database import PassageDatabase
from blockrag.index.vectors import Rows, VectorIndex

__all__ = ["nearest_rows"]

# Candidates fetched beyond k, so that ties at the edge are seen; and how far to look when they go on.
_SPARE = 16
_MOST_TIED = 4096
# FAISS's float32 sums depend on how queries are batched; scores closer than this, relative to the best, may be ties.
_ROUNDING = 1e-5
# Filters that leave at most this many rows are answered from the database, for every kind of index.
_FEW_ROWS = 4096


def nearest_rows(
    database: PassageDatabase, index: VectorIndex, queries: Vectors, k: int, allowed: Rows | None
) -> list[list[tuple[int, float]]]:
    """Rows and scores of the best `k` of each query, ordered; scores are exact products of the stored vectors.

    Args:
        database: Holds the vectors.
        index: Finds them; its kind says whether it finds all that are near.
        queries: `[n, dimension]`; one of zeros is near to nothing.
        k: How many.
        allowed: Only these rows, ascending; None for all.
    """
    if allowed is not None and (index.kind != "flat" or len(allowed) <= _FEW_ROWS):
        return _scan(database, queries, k, allowed)
    candidates = _candidates(index, queries, k, allowed)
    rows, vectors = database.embeddings(np.unique(np.concatenate(candidates)))
    results = []
    for query, some in zip(queries, candidates, strict=True):
        chosen = np.searchsorted(rows, np.intersect1d(some, rows))
        results.append(_rank(query, rows[chosen], vectors[chosen], k))
    return results


def _scan(database: PassageDatabase, queries: Vectors, k: int, allowed: Rows) -> list[list[tuple[int, float]]]:
    """The best of `allowed` by comparing with every one of them."""
    best: list[list[tuple[int, float]]] = [[] for _ in queries]
    for rows, vectors in database.embedding_chunks(allowed):
        for i, query in enumerate(queries):
            best[i] = sorted(best[i] + _rank(query, rows, vectors, k), key=lambda hit: (-hit[1], hit[0]))[:k]
    return best


def _candidates(index: VectorIndex, queries: Vectors, k: int, allowed: Rows | None) -> list[Rows]:
    """For each query the rows that may be among its best `k`: those found, and all that tie with the last."""
    available = len(index.rows) if allowed is None else len(allowed)
    results: list[Rows] = [np.zeros(0, dtype=np.int64)] * len(queries)
    # A zero vector has nothing to find.
    pending = np.flatnonzero(queries.any(axis=1))
    fetch = min(k + _SPARE, available)
    while len(pending) and fetch:
        scores, rows = index.search(queries[pending], fetch, allowed)
        for i, found in zip(pending, rows, strict=True):
            results[i] = found[found >= 0]
        if fetch >= min(available, max(_MOST_TIED, k + _SPARE)):
            break
        margin = _ROUNDING * np.abs(scores[:, 0])
        tied = (rows[:, -1] >= 0) & (scores[:, k - 1] - scores[:, -1] <= margin)
        pending = pending[tied]
        fetch = min(4 * fetch, available)
    return results


def _rank(query: Vectors, rows: Rows, vectors: Vectors, k: int) -> list[tuple[int, float]]:
    """The best `k` of `rows` with their scores, equal scores by row.

    Sums are taken row by row in float64, so that equal vectors have equal scores however they were found.
    """
    if not query.any():
        return []
    scores = (vectors.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
    order = np.lexsort((rows, -scores))[:k]
    return [(int(rows[i]), float(scores[i])) for i in order]
