"""The share of requests that a byte budget catches, when some passages are asked for more often than others.

Requests for blocks are taken to be independent, the i-th most wanted block having a chance proportional to 1 / i^s
(Zipf's law; s = 0 asks for all alike, web proxies saw 0.64 to 0.83: Breslau et al., "Web caching and Zipf-like
distributions", INFOCOM 1999). The store drops the least recently used block, which for such
requests Che's approximation describes to about a percent: a block is in the store if it was asked for during the last
T requests, with T such that the blocks expected to be there fill the store (Che, Tung, Wang, "Hierarchical web caching
systems", JSAC 2002).
"""

from __future__ import annotations

import numpy as np

from blockrag.errors import InputError

__all__ = ["lru_hit_rate"]

# Ranks are taken one by one up to here, and in groups of nearly equal chance beyond.
_SINGLE_RANKS = 2000
_GROUPS = 2000
_STEPS = 100


def lru_hit_rate(blocks: int, capacity: float, *, exponent: float = 0.8) -> float:
    """The share of requests for blocks that a store of some of them answers, once it has filled up.

    Args:
        blocks: Distinct blocks that are asked for.
        capacity: How many of them the store holds.
        exponent: Zipf's exponent s.

    Returns:
        0 to 1.

    Raises:
        InputError: There are no blocks, or the capacity or the exponent is negative.
    """
    if blocks < 1 or capacity < 0 or exponent < 0:
        raise InputError(
            f"no hit rate for {blocks} blocks, a capacity of {capacity:g} and an exponent of {exponent:g}; pass at "
            "least one block, and nothing negative"
        )
    if capacity >= blocks:
        return 1.0
    if capacity < 1:
        return 0.0
    ranks, members = _ranks(blocks)
    chances = ranks**-exponent
    chances /= float(np.sum(chances * members))
    low, high = 0.0, 1.0
    while _held(chances, members, high) < capacity:
        low, high = high, high * 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if _held(chances, members, middle) < capacity else (low, middle)
    return float(np.sum(members * chances * -np.expm1(-chances * high)))


def _held(chances: np.ndarray, members: np.ndarray, requests: float) -> float:
    """Distinct blocks expected among so many requests."""
    return float(np.sum(members * -np.expm1(-chances * requests)))


def _ranks(blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """Ranks, each standing for a group of neighbours, and the sizes of the groups."""
    single = np.arange(1, min(blocks, _SINGLE_RANKS) + 1, dtype=np.float64)
    if blocks <= _SINGLE_RANKS:
        return single, np.ones_like(single)
    edges = np.unique(np.geomspace(_SINGLE_RANKS + 1, blocks + 1, _GROUPS).astype(np.int64)).astype(np.float64)
    members = np.diff(edges)
    return np.concatenate([single, edges[:-1] + (members - 1) / 2]), np.concatenate([np.ones_like(single), members])
