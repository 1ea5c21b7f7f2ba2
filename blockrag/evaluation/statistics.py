"""Means and paired differences with their standard errors, for questions that come in groups.

Questions of one line share their passages, and with them much of what makes them easy or hard, so that ten of them say
less than ten of different lines. The errors here are therefore robust to clusters (Liang and Zeger 1986): the residuals
of a line are summed before they are squared. With one question per line that is the usual s / sqrt(n).

Differences are taken question by question: what is hard for both sides cancels, and the error of the difference is much
smaller than that of either mean (Miller 2024, arXiv 2411.00640).
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from blockrag.errors import InputError

__all__ = ["Estimate", "mean", "paired_difference"]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and how far it may be off.

    Args:
        value: The mean.
        se: Its standard error; None where a single cluster says nothing about it.
        n: Values.
        clusters: Groups of them.
    """

    value: float
    se: float | None
    n: int
    clusters: int

    @property
    def differs(self) -> bool:
        """Whether the value is more than two standard errors from zero."""
        return self.se is not None and abs(self.value) > 2 * self.se


def mean(values: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of values in clusters.

    Args:
        values: One per question.
        clusters: What each belongs to; values of different clusters are independent.

    Raises:
        InputError: There are no values, or not as many clusters.
    """
    if not values or len(values) != len(clusters):
        raise InputError(f"a mean needs values with a cluster each, got {len(values)} and {len(clusters)}")
    n, value = len(values), math.fsum(values) / len(values)
    sums: dict[Hashable, float] = {}
    for one, cluster in zip(values, clusters, strict=True):
        sums[cluster] = sums.get(cluster, 0.0) + one - value
    groups = len(sums)
    if groups < 2:
        return Estimate(value, None, n, groups)
    variance = groups / (groups - 1) * math.fsum(residual**2 for residual in sums.values()) / n**2
    return Estimate(value, math.sqrt(variance), n, groups)


def paired_difference(values: Sequence[float], reference: Sequence[float], clusters: Sequence[Hashable]) -> Estimate:
    """The mean of `values - reference`, question by question.

    Args:
        values: One per question.
        reference: The other side's, of the same questions.
        clusters: See `mean`.

    Raises:
        InputError: The three differ in length, or are empty.
    """
    if len(values) != len(reference):
        raise InputError(
            f"pairs need two values each, got {len(values)} and {len(reference)}; compare the same questions"
        )
    return mean([one - other for one, other in zip(values, reference, strict=True)], clusters)
