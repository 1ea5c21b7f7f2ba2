"""Files that end early, cut before a store is opened and while it is open: misses and typed errors, never a crash."""

from __future__ import annotations

from blocks import IN_FILE, block, judge
from fresh import call


def test_a_blocks_file_at_every_length(fast_path, record):
    counts = call("truncating:cut_values", directory=str(fast_path / "s"))
    between = -(-IN_FILE // 64)
    assert counts == {"right": 1, "missing": IN_FILE, "while reading: missing": between}
    record(
        "a block's file cut at every length, in an open store; and between opening and reading it",
        tried=IN_FILE + between,
        unit="lengths",
        result="100 % misses",
    )


def test_a_block_at_every_length():
    """What a store hands out that does not know lengths: the codec refuses every beginning of a block."""
    data = block(0, IN_FILE)
    assert {judge(0, data[:length], data) for length in range(len(data))} == {"refused"}


def test_the_index_at_many_lengths(fast_path, scale, record):
    step = scale(ci=53, long=1)
    counts = call("truncating:cut_index", directory=str(fast_path / "s"), step=step)
    assert counts.get("wrong", 0) == counts.get("written: wrong", 0) == 0
    # A shorter index does lose blocks; a shorter log may lose what was written last, and then the rest is whole.
    assert counts["missing"] > 0
    assert counts["right"] > 0
    record(
        f"index and log of a small store cut at every {'' if step == 1 else f'{step}-th '}length, then opened",
        tried=counts["lengths"],
        unit="lengths",
        result=f"0 wrong blocks in {counts['reads']:,} reads, 0 crashes; {counts['right']:,} right, "
        f"{counts['missing']:,} missed; {counts.get('refused to open', 0):,} stores refused",
    )


def test_the_index_of_an_open_store(fast_path, scale, record):
    lengths = scale(ci=60, long=1000)
    counts = call(
        "truncating:cut_index_of_an_open_store",
        directory=str(fast_path / "s"),
        lengths=lengths,
        seed=11,
        names=["cache.db", "cache.db-wal"],
    )
    assert counts.get("wrong", 0) == counts.get("written: wrong", 0) == 0
    assert counts["refused to open"] + counts["refused to read"] > 0
    record(
        "index and write-ahead log cut at random lengths under an open store",
        tried=2 * lengths,
        unit="lengths",
        result=f"0 wrong blocks in {counts['reads']:,} reads, 0 crashes; {counts.get('right', 0):,} right, "
        f"{counts.get('missing', 0):,} missed, {counts['refused to open'] + counts['refused to read']:,} typed errors",
    )


def test_blocks_of_a_large_open_store(tmp_path, record):
    counts = call("truncating:cut_large_store", directory=str(tmp_path / "s"), lengths=1000, seed=12)
    assert counts == {"missing": 1000, "mended: right": 1000}
    record(
        "blocks of an open store of 65 MB cut at random lengths",
        tried=1000,
        unit="lengths",
        result="100 % misses",
    )
