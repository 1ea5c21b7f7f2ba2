"""The frame of every result, and the arithmetic on samples that all of them share.

A result is one JSON-ready dictionary: what ran, where, on which commit and versions, with which settings, and the
numbers with all their samples. The machine's rates are measured before and after, and the higher ones count.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import torch

from blockrag.evaluation.speed.machine import (
    Rates,
    busy_share,
    busy_warning,
    commit,
    describe_machine,
    load_average,
    measure_rates,
    versions,
)

if TYPE_CHECKING:
    from blockrag.evaluation.speed.shapes import Subject

__all__ = ["SCHEMA_VERSION", "Frame", "Progress", "command_line", "crossing", "slope", "spread", "take_turns"]

SCHEMA_VERSION = 2
"""Raised whenever a key changes its meaning or goes away; 1 was the first release's time to first token alone."""

Progress = Callable[[str], None]
"""Told one line about what is going on."""

# A single run above this is worth a line of its own.
_LONG_S = 5.0


@dataclass(slots=True)
class Frame:
    """One benchmark being run.

    Args:
        benchmark: Its name, such as "ttft".
        subject: What is measured.
        settings: A dataclass; its fields are the command's options of the same names.
        note: Kept with the result, such as "shared machine".
        progress: Told what is going on.
    """

    benchmark: str
    subject: Subject
    settings: Any
    note: str
    progress: Progress
    warnings: list[str] = field(default_factory=list)
    _before: Rates | None = None
    _load: float | None = None
    _busy: float | None = None
    _started: float = 0.0

    def open(self) -> None:
        """Measure what the machine reaches before the benchmark, and say when it looks busy."""
        self._load, self._busy, self._started = load_average(), busy_share(), time.perf_counter()
        if warning := busy_warning(self._busy):
            self.warn(warning)
        self._before = self._rates()

    def warn(self, message: str) -> None:
        """Say it now, and keep it with the result."""
        self.progress(f"warning: {message}")
        self.warnings.append(message)

    def close(self) -> Rates:
        """Measure again, after the benchmark.

        Returns:
            The higher of the rates before and after.
        """
        if self._before is None:
            raise AssertionError("open() comes before close()")
        self._before = self._before.best(self._rates())
        return self._before

    def result(self, rates: Rates, **numbers: Any) -> dict[str, Any]:
        """The whole result.

        Args:
            rates: What `close` returned.
            **numbers: What this benchmark found; its own keys.
        """
        return {
            "schema": SCHEMA_VERSION,
            "benchmark": self.benchmark,
            "command": command_line(self.benchmark, self.subject, self.settings),
            **commit(),
            "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
            "note": self.note,
            "warnings": self.warnings,
            "versions": versions(),
            "machine": describe_machine(self.subject.device),
            "load_average": {"before": self._load, "after": load_average()},
            "busy_before": self._busy,
            "duration_s": time.perf_counter() - self._started,
            "rates": asdict(rates),
            "model": self.subject.describe(),
            "settings": asdict(self.settings),
            **numbers,
        }

    def _rates(self) -> Rates:
        return measure_rates(self.subject.device, self.subject.model.model.dtype)


def command_line(benchmark: str, subject: Subject, settings: Any) -> str:
    """The command that repeats a measurement.

    Args:
        benchmark: The benchmark's name.
        subject: What is measured; of a checkpoint in a directory, only the last part of the path is given.
        settings: A dataclass of ints, strings, and tuples of these.
    """
    dtype = str(subject.model.model.dtype).removeprefix("torch.")
    words = [f"blockrag bench {benchmark} {subject.option()} --device {subject.device} --dtype {dtype}"]
    if not hasattr(settings, "precisions"):
        words.append(f"--precision {subject.model.precision}")
    words.append(f"--threads {torch.get_num_threads()}")
    for entry in fields(settings):
        value = getattr(settings, entry.name)
        if value in ("", (), None):
            continue
        text = ",".join(str(one) for one in value) if isinstance(value, tuple) else str(value)
        words.append(f"--{entry.name.replace('_', '-')} {text}")
    return " ".join(words)


def take_turns(
    ways: Sequence[str],
    run: Callable[[str, bool], float],
    *,
    repeats: int,
    once: Sequence[str] = (),
    progress: Progress = lambda line: None,
) -> None:
    """Run several ways again and again, in an order that rotates, so that no slow minute falls on one of them.

    A round before the counted ones warms buffers and caches up.

    Args:
        ways: Names.
        run: Runs one way and returns the seconds it took; the flag says whether the run counts.
        repeats: Counted rounds.
        once: Ways that run a single time, in the first counted round, without warming up.
        progress: Told about runs that take long.
    """
    order = list(ways)
    for number in range(repeats + 1):
        for way in order:
            if way in once and number != 1:
                continue
            seconds = run(way, number > 0)
            if seconds > _LONG_S:
                progress(f"  {way}: {seconds:.1f} s (round {number} of {repeats}, 0 warms up)")
        order = [*order[1:], order[0]]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median, extremes, interquartile range and every sample.

    Args:
        values: At least one sample.
    """
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "iqr": upper - lower,
        "samples": list(values),
    }


def slope(xs: Sequence[float], ys: Sequence[float]) -> float | None:
    """Slope of the least-squares line; None with fewer than two different `xs`."""
    if len(set(xs)) < 2:
        return None
    fitted: float = statistics.linear_regression(xs, ys).slope
    return fitted


def crossing(xs: Sequence[float], first: Sequence[float], second: Sequence[float]) -> float | None:
    """Where `second` becomes the smaller one and stays so, between two measured places, on a logarithmic scale.

    Args:
        xs: Ascending, positive.
        first: Positive values at each place.
        second: Positive values at each place.

    Returns:
        The first of `xs` when `second` is smaller everywhere; None when it is not smaller at the last one.
    """
    gaps = [math.log(one / two) for one, two in zip(first, second, strict=True)]
    if not gaps or gaps[-1] <= 0:
        return None
    last_behind = max((index for index, gap in enumerate(gaps) if gap <= 0), default=None)
    if last_behind is None:
        return xs[0]
    left, right = gaps[last_behind], gaps[last_behind + 1]
    share = -left / (right - left)
    place: float = xs[last_behind] * (xs[last_behind + 1] / xs[last_behind]) ** share
    return place
