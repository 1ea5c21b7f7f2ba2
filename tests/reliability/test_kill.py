"""`kill -9` during ingestion: nothing corrupt, and every resume ends with the same bytes and the same answers."""

from __future__ import annotations

from fresh import call


def test_killed_at_random_moments(fast_path, scale, record):
    kills = scale(ci=100, long=4_700)
    counts = call(
        "dying:kill_at_random", directory=str(fast_path), kills=kills, seed=7, timeout_s=scale(ci=280, long=14_400)
    )
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
        timeout_s=scale(ci=280, long=14_400),
    )
    assert counts["resumed"] == counts["kills"] >= min(75, counts["calls"])
    record(
        f"kill -9 before a chosen one of the {counts['calls']:,} calls that the store makes in an ingestion",
        tried=counts["kills"],
        unit="kills",
        result=f"0 corrupt blocks; all {counts['resumed']:,} resumed passes ended with the same set of (key, payload) "
        "hashes and the same answers",
    )
