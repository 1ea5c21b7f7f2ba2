"""Standard errors against the textbook, and against resampling whole clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest

from blockrag.errors import InputError
from blockrag.evaluation.statistics import Estimate, mean, paired_difference


def test_one_question_per_line_is_the_usual_error() -> None:
    values = [0.0, 1.0, 1.0, 0.25, 0.5]
    estimate = mean(values, range(5))
    assert estimate.value == pytest.approx(np.mean(values))
    assert estimate.se == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    assert (estimate.n, estimate.clusters) == (5, 5)


def test_identical_answers_within_a_line_count_once() -> None:
    """Ten copies of each value say no more than one."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    copies = [value for value in values for _ in range(10)]
    clusters = [number for number in range(6) for _ in range(10)]
    assert mean(copies, clusters).se == pytest.approx(mean(values, range(6)).se)
    assert mean(copies, range(60)).se < mean(copies, clusters).se / 2


def test_worked_by_hand() -> None:
    # Mean 0.5; residual sums: line a 1.0, line b -0.5, line c -0.5; 3/2 * (1 + 0.25 + 0.25) / 16.
    estimate = mean([1.0, 1.0, 0.0, 0.0], ["a", "a", "b", "c"])
    assert estimate.value == 0.5
    assert estimate.se == pytest.approx(math.sqrt(1.5 * 1.5 / 16))


def test_agrees_with_resampling_whole_lines() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(1, 6, 120)
    ease = rng.normal(0, 1, 120)
    first = [(rng.random(size) < 1 / (1 + np.exp(-e))).astype(float) for size, e in zip(sizes, ease, strict=True)]
    second = [
        (rng.random(size) < 1 / (1 + np.exp(-e - 0.3))).astype(float) for size, e in zip(sizes, ease, strict=True)
    ]
    clusters = [number for number, size in enumerate(sizes) for _ in range(size)]
    values, reference = np.concatenate(first).tolist(), np.concatenate(second).tolist()
    for estimate, sums in (
        (mean(values, clusters), np.array([one.sum() for one in first])),
        (
            paired_difference(values, reference, clusters),
            np.array([(one - other).sum() for one, other in zip(first, second, strict=True)]),
        ),
    ):
        drawn = rng.integers(0, 120, (20000, 120))
        resampled = sums[drawn].sum(1) / sizes[drawn].sum(1)
        assert estimate.se == pytest.approx(resampled.std(), rel=0.05)


def test_pairing_takes_out_what_both_find_hard() -> None:
    rng = np.random.default_rng(1)
    ease = rng.random(400)
    one = [float(value > 0.5) for value in ease]
    other = [float(value > 0.48) for value in ease]
    paired = paired_difference(one, other, range(400))
    alone = mean(one, range(400)), mean(other, range(400))
    assert paired.value == pytest.approx(alone[0].value - alone[1].value)
    assert paired.se < math.hypot(alone[0].se, alone[1].se) / 3


def test_a_single_line_has_no_error() -> None:
    estimate = mean([1.0, 0.0], ["a", "a"])
    assert estimate.se is None
    assert not estimate.differs


@pytest.mark.parametrize(
    ("value", "se", "differs"), [(0.03, 0.01, True), (-0.03, 0.01, True), (0.02, 0.01, False), (0.0, 0.0, False)]
)
def test_a_difference_is_more_than_two_errors(value: float, se: float, differs: bool) -> None:
    assert Estimate(value, se, 100, 100).differs is differs


def test_what_does_not_pair_is_refused() -> None:
    with pytest.raises(InputError, match="got 1 and 2"):
        paired_difference([1.0], [1.0, 0.0], ["a", "b"])
    with pytest.raises(InputError, match="got 0 and 0"):
        mean([], [])
    with pytest.raises(InputError, match="got 2 and 1"):
        mean([1.0, 0.0], ["a"])
