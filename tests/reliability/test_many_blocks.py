"""A store of very many tiny blocks: all there after it is opened again, in few handles and little more space."""

from __future__ import annotations

from fresh import call


def test_tiny_blocks(fast_path, scale, record):
    blocks = scale(ci=5_000, long=100_000)
    counts = call("many:fill_and_reopen", directory=str(fast_path / "s"), blocks=blocks)
    assert counts["verified"] == counts["right"] == blocks
    assert counts["faults"] == 0
    assert counts["handles"] <= 64
    # A file for each block would take 4 KiB each, nearly six times their bytes.
    overhead = counts["on disk"] / counts["stored"] - 1
    assert overhead <= 0.5
    record(
        "tiny blocks of 704 bytes: put, opened again, verified, read",
        tried=blocks,
        unit="blocks",
        result=f"all right, {counts['handles']} handles, {overhead:.0%} more space than the blocks themselves",
    )
