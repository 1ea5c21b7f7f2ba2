"""Fuzzing of the block reader and of store directories. Of the index and its vectors: tests/test_index_fuzz.py."""

from __future__ import annotations

import contextlib
import importlib.util
import sqlite3
import struct

import pytest
from blocks import block, key
from fresh import call

from blockrag.errors import StoreError
from blockrag.stores import DiskStore

# Beside twice the files: what SQLite keeps of an index, and its own start.
SPARE_KIB = 64 << 10


def test_mutated_blocks(scale, record):
    cases = scale(ci=2_000, long=100_000)
    counts = call("fuzzing:fuzz_blocks", cases=cases)
    assert counts["blocks"] >= cases
    # Mutations reach the checks behind the first, and forged ones those behind the checksum.
    assert {"length", "magic", "checksum", "shape"} <= counts.keys()
    record(
        "fuzzed blocks (hypothesis), half with a forged checksum",
        tried=counts["blocks"],
        unit="blocks",
        result="0 crashes, hangs or executions; every damaged block refused; memory within twice the block and 256 KiB",
    )


def test_mutated_blocks_led_by_coverage(fast_path, scale, record):
    if scale(ci=True, long=False):
        pytest.skip("part of the long run")
    if importlib.util.find_spec("atheris") is None:
        pytest.skip("atheris is not installed; pip install atheris")
    seconds = 600
    counts = call("fuzzing:fuzz_blocks_by_coverage", seconds=seconds, corpus=str(fast_path / "corpus"))
    assert counts["blocks"] > 10_000
    record(
        "fuzzed blocks, led by coverage (atheris)",
        tried=counts["blocks"],
        unit="inputs",
        result="0 crashes, hangs or executions; every damaged block refused; memory within twice the block and 256 KiB",
    )


def test_mutated_stores(fast_path, scale, record):
    cases = scale(ci=500, long=10_000)
    counts = call("fuzzing:fuzz_store", directory=str(fast_path), cases=cases, seed=8)
    assert counts["stores"] == cases
    assert counts.get("wrong", 0) == counts.get("written: wrong", 0) == 0
    assert counts["right"] > counts["missing"] > 0
    assert counts["refused to open"] > 0
    assert counts["grown KiB"] <= 2 * counts["size KiB"] + SPARE_KIB
    record(
        "fuzzed store directories",
        tried=counts["stores"],
        unit="stores",
        result=f"0 crashes, hangs or executions; 0 wrong blocks in {counts['reads']:,} reads; {counts['right']:,} "
        f"right, {counts['missing']:,} missed, {counts.get('refused', 0):,} refused by the codec; "
        f"{counts['refused to open']:,} stores refused; memory grew by {counts['grown KiB']:,} KiB",
    )


def test_an_index_whose_rows_are_out_of_order_is_left(fast_path):
    """Found by fuzzing: SQLite takes the order of a damaged page as it is; who followed it went round in circles."""
    with contextlib.closing(DiskStore(fast_path / "s")) as store:
        for number in range(4):
            store.put(key(number), block(number, 256))
    index = fast_path / "s" / "cache.db"
    with contextlib.closing(sqlite3.connect(index)) as connection:
        ((root,),) = connection.execute("SELECT rootpage FROM sqlite_master WHERE name = 'Cache'")
        ((page_size,),) = connection.execute("PRAGMA page_size")
    data = bytearray(index.read_bytes())
    # A leaf page (type 13) has 8 bytes of header and then the place of each row.
    page = (root - 1) * page_size
    kind, _, rows = struct.unpack_from(">BHH", data, page)
    assert (kind, rows) == (13, 4)
    first, last = page + 8, page + 8 + 2 * (rows - 1)
    data[first : first + 2], data[last : last + 2] = data[last : last + 2], data[first : first + 2]
    index.write_bytes(data)
    with contextlib.closing(DiskStore(fast_path / "s")) as store:
        for call_it in (lambda: list(store.keys()), store.verify):
            with pytest.raises(StoreError, match="out of order"):
                call_it()
        assert store.verify(fix=True).ok
        store.put(key(1), block(1, 256))
        assert list(store.keys()) == [key(1)]
