"""`kill -9` during ingestion: nothing corrupt, and every resume ends with the same bytes and the same answers."""

from __future__ import annotations

import contextlib
import os

from blocks import IN_FILE, block, key
from fresh import call

from blockrag.stores import DiskStore


def test_killed_at_random_moments(fast_path, scale, record):
    kills = scale(ci=100, long=4_700)
    counts = call("dying:kill_at_random", directory=str(fast_path), kills=kills, seed=7)
    assert counts["kills"] >= kills
    record(
        "kill -9 at random moments of ingestion; each pass first verifies the whole store",
        tried=counts["kills"],
        unit="kills",
        result=f"0 corrupt blocks; all {counts['resumed']:,} resumed passes ended with the same set of (key, payload) "
        "hashes and the same answers",
    )


def test_killed_before_every_call_of_the_store(fast_path, scale, record):
    """CI takes some of the calls, the long run all of them."""
    counts = call(
        "dying:kill_at_calls",
        directory=str(fast_path),
        kills=scale(ci=100, long=10**6),
    )
    assert counts["resumed"] == counts["kills"] >= min(75, counts["calls"])
    record(
        f"kill -9 before a chosen one of the {counts['calls']:,} calls that the store makes in an ingestion",
        tried=counts["kills"],
        unit="kills",
        result=f"0 corrupt blocks; all {counts['resumed']:,} resumed passes ended with the same set of (key, payload) "
        "hashes and the same answers",
    )


def test_a_torn_block_would_be_seen(fast_path):
    """The check that every pass begins with: it sees a block of which a part never reached the disk."""
    with contextlib.closing(DiskStore(fast_path / "s")) as store:
        for number in range(2):
            store.put(key(number), block(number, IN_FILE))
        assert store.verify().ok
        torn, lost = sorted((fast_path / "s").rglob("*.val"))
        with torn.open("r+b") as file:
            file.seek(IN_FILE // 2)
            file.write(bytes(4096))
        os.truncate(lost, IN_FILE // 2)
        assert {fault.kind for fault in store.verify().faults} == {"damaged", "missing"}
