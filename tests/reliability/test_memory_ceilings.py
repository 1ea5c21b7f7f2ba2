"""The most memory that ingesting and composing take; measured as tests/test_memory.py does."""

from __future__ import annotations

import pytest
from test_memory import LINUX, in_a_fresh_process

MEBIBYTE = 1 << 20


@LINUX
def test_ingesting_holds_two_batches_at_most(fast_path, record):
    """One is computed while the one before is written, however many documents there are."""
    measured = in_a_fresh_process("ingest", fast_path)
    allowed = 2 * measured["batch"] + 64 * MEBIBYTE
    assert measured["all"] > 2 * allowed, "holding everything would be seen"
    assert measured["peak"] >= 0.5 * measured["batch"], "the measurement sees a batch"
    assert measured["peak"] <= allowed, f"{measured['peak'] / MEBIBYTE:.0f} MiB of {allowed / MEBIBYTE:.0f}"
    record(
        "peak memory of ingesting, beside the model",
        tried=round(measured["all"] / MEBIBYTE),
        unit="MiB of KV states",
        result=f"{measured['peak'] / MEBIBYTE:.0f} MiB; allowed are two batches and 64 MiB, "
        f"{allowed / MEBIBYTE:.0f} MiB together",
    )


@LINUX
def test_composing_takes_little_more_than_the_cache(fast_path, scale, record):
    if scale(ci=True, long=False):
        pytest.skip("tests/test_memory.py does this")
    ratios = {name: one["peak"] / one["cache"] for name, one in in_a_fresh_process("compose", fast_path).items()}
    assert max(ratios.values()) <= 1.1
    record(
        "peak memory of composing a prompt, over its final cache",
        tried=len(ratios),
        unit="stores and precisions",
        result=f"at most {max(ratios.values()):.3f} times the cache",
    )
