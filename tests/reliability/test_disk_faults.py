"""Full disks, failing calls and exhausted handles: a typed error, readers undisturbed, and all well once it is over."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from blocks import IN_FILE, IN_ROW
from fresh import call

MEGABYTE = 1 << 20


@pytest.mark.parametrize("forever", [False, True], ids=["once", "forever"])
@pytest.mark.parametrize("error", ["ENOSPC", "EIO", "EMFILE"])
def test_the_nth_call_fails_for_every_n(fast_path, record, error, forever):
    counts = call("failing:inject", directory=str(fast_path), error=error, forever=forever)
    assert counts["calls"] > 100
    assert counts["typed"] > 0
    if error == "ENOSPC":
        assert counts["full"] == counts["typed"]
    if error == "EMFILE":
        assert counts["full"] == 0
    record(
        f"{error} at the n-th call of a store's life, {'and ever after' if forever else 'once'}, for every n",
        tried=counts["calls"],
        unit="places",
        result=f"{counts['typed']:,} typed errors and no other; another reader never disturbed; no handle, row or "
        "file left behind; usable afterwards",
    )


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of some megabytes."""
    mounts = []

    def mount(megabytes):
        path = tmp_path / str(len(mounts))
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        mounts.append(path)
        return path

    yield mount
    for path in mounts:
        subprocess.run(["umount", str(path)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
@pytest.mark.parametrize("block_bytes", [IN_ROW, IN_FILE, MEGABYTE], ids=["2 KiB", "40 KiB", "1 MiB"])
@pytest.mark.parametrize("megabytes", [2, 16, 64])
def test_a_full_file_system(small_disk, record, megabytes, block_bytes):
    if block_bytes == IN_ROW and megabytes == 64:
        pytest.skip("thirty thousand small blocks say no more than eight thousand")
    filler = 0 if block_bytes >= IN_FILE else megabytes * MEGABYTE // 4
    directory = str(small_disk(megabytes))
    counts = call("failing:fill", directory=directory, block_bytes=block_bytes, filler_bytes=filler)
    assert counts["refused"] == 10
    assert counts["after"] > 0
    assert counts["faults"] == 0
    assert counts["stored"] > 0
    record(
        f"file system of {megabytes} MB filled with blocks of {block_bytes:,} bytes",
        tried=counts["stored"] + counts["refused"],
        unit="writes",
        result=f"{counts['refused']} refused as full, {counts['stored']:,} readable; writable with room again; sound",
    )


@pytest.mark.parametrize(
    ("block_bytes", "limit"), [(2 * MEGABYTE, MEGABYTE), (20_480, MEGABYTE)], ids=["file", "index"]
)
def test_files_that_may_not_grow(tmp_path, record, block_bytes, limit):
    counts = call("failing:limit_file_size", directory=str(tmp_path), block_bytes=block_bytes, limit=limit)
    assert counts["refused"] == 10
    assert (counts["after"], counts["faults"]) == (2, 0)
    record(
        f"no file may grow beyond {limit:,} bytes (RLIMIT_FSIZE), blocks of {block_bytes:,}",
        tried=counts["stored"] + counts["refused"],
        unit="writes",
        result=f"{counts['refused']} refused as full, {counts['stored']:,} readable; writable when it is lifted; sound",
    )


def test_no_more_handles(tmp_path, record):
    counts = call("failing:limit_handles", directory=str(tmp_path))
    assert counts["typed"] >= 4
    assert counts.get("wrong", 0) == counts["faults"] == 0
    record(
        "no more handles (RLIMIT_NOFILE)",
        tried=8,
        unit="operations",
        result=f"{counts['typed']} typed errors, {counts.get('missing', 0)} misses; all well when it is lifted",
    )
