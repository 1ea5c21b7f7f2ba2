"""Four writers and four readers share a store, and are killed at random."""

from __future__ import annotations

from fresh import call


def test_writers_and_readers_that_are_killed_at_random(tmp_path, scale, record):
    seconds = scale(ci=60, long=600)
    counts = call("crowd:run", directory=str(tmp_path / "s"), seconds=seconds, seed=5)
    assert {name: counts[name] for name in ("wrong", "refused", "errors", "over budget", "faults", "strays left")} == {
        "wrong": 0, "refused": 0, "errors": 0, "over budget": 0, "faults": 0, "strays left": 0,
    }  # fmt: skip
    assert counts["bytes"] <= counts["budget"]
    # They did read what others wrote, they did evict, and they did die at work.
    assert counts["reads"] > counts["hits"] > 1000
    assert counts["puts"] > 1000
    assert counts["kills"] > seconds / 2
    record(
        "4 writers and 4 readers in processes, killed at random, with a byte budget",
        tried=seconds,
        unit="seconds",
        result=f"{counts['kills']:,} kills, {counts['reads']:,} reads, {counts['puts']:,} writes: 0 wrong, "
        "0 lock errors, never beyond the budget; sound afterwards",
    )
