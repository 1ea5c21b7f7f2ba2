"""Hostile ids, titles, texts and namespaces: they are data, and never become a path, a statement or a special token."""

from __future__ import annotations

from fresh import call
from hostile import NAMES


def test_there_are_enough_of_them():
    assert len(NAMES) >= 500


def test_documents(fast_path, record):
    counts = call("hostile:ingest_hostile", sandbox=str(fast_path / "box"))
    assert counts["seen"] == []
    assert counts["changed"] == []
    # The guard sees a file that is written outside, by its hook and on the disk.
    assert counts["control"] == [True, True]
    for what in ("ids", "texts"):
        # What UTF-8 cannot hold is refused by name; everything else comes back as it was.
        refused = sum(not _encodable(name) for name in NAMES)
        assert counts[f"{what} typed errors"] == refused
        assert counts[f"{what} round trips"] == len(NAMES) - refused
    record(
        "hostile document ids, titles and passages, in a directory behind a symbolic link",
        tried=2 * len(NAMES),
        unit="documents",
        result="0 bytes outside of the directory, nothing run, "
        f"{counts['ids round trips'] + counts['texts round trips']:,} round trips, "
        f"{counts['ids typed errors'] + counts['texts typed errors']} typed errors (lone surrogates); "
        "no special token in any block",
    )


def test_namespaces(fast_path, record):
    counts = call("hostile:use_namespaces", sandbox=str(fast_path / "box"))
    assert counts["seen"] == []
    assert counts["changed"] == []
    refused = sum(not _encodable(name) for name in NAMES)
    assert counts["namespaces round trips"] == len(NAMES) - refused
    assert counts["namespaces typed errors"] == refused
    assert counts["passes"] >= 8
    record(
        "hostile namespaces",
        tried=len(NAMES),
        unit="namespaces",
        result=f"0 bytes outside of the directory, nothing run, {counts['namespaces round trips']:,} round trips under "
        f"as many keys, {refused} typed errors (lone surrogates)",
    )


def _encodable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
