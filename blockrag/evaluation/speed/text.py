"""Numbers and tables as text, the same in every report."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["count", "duration", "milliseconds", "place", "rate", "size", "spread_cell", "table"]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Seconds as milliseconds, with three significant digits at least."""
    value = seconds * 1000
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def spread_cell(spread: dict[str, Any]) -> str:
    """Median in bold, and in brackets from least to most; a single sample as it is."""
    median = f"**{milliseconds(spread['median'])}**"
    if spread["n"] == 1:
        return f"{median} (n = 1)"
    return f"{median} ({milliseconds(spread['min'])} to {milliseconds(spread['max'])})"


def duration(seconds: float) -> str:
    """A round number of seconds or milliseconds, for axes."""
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"


def count(number: float) -> str:
    """A number of parameters."""
    return f"{number / 1e9:.1f} B" if number >= 1e9 else f"{number / 1e6:.{0 if number >= 1e7 else 1}f} M"


def rate(flops_per_s: float) -> str:
    """Floating-point operations per second."""
    return f"{flops_per_s / 1e12:.1f} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.0f} GFLOP/s"


def size(nbytes: float) -> str:
    """Bytes, in powers of 1000."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}" if nbytes < 100 * scale else f"{nbytes / scale:,.0f} {unit}"
    return f"{nbytes:,.0f} B"


def place(result: dict[str, Any]) -> str:
    """The processor and its threads, or the GPU."""
    machine = result["machine"]
    if "gpu" in machine:
        return str(machine["gpu"])
    threads = machine["torch_threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"
