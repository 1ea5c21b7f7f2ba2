"""Very many tiny blocks in one store; run by `fresh`."""

from __future__ import annotations

import contextlib
from pathlib import Path

from blocks import block, judge, key

from blockrag.stores import DiskStore

__all__ = ["fill_and_reopen"]

_BYTES = 704
_AT_ONCE = 1000


def fill_and_reopen(directory: str, blocks: int) -> dict[str, int]:
    """Put them, close, open, check, and read all of them.

    Returns:
        "verified" and "faults" of the check, "right" reads, "handles" while reading, "stored" bytes, and the bytes "on
        disk" once the store is closed.
    """
    root, numbers = Path(directory), range(blocks)
    with contextlib.closing(DiskStore(root)) as store:
        for number in numbers:
            store.put(key(number), block(number, _BYTES))
    on_disk = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    right = handles = 0
    with contextlib.closing(DiskStore(root)) as store:
        report = store.verify()
        assert store.stats().blocks == blocks
        assert store.contains_many([key(number) for number in numbers]) == {key(number) for number in numbers}
        for start in range(0, blocks, _AT_ONCE):
            names = {key(number): number for number in numbers[start : start + _AT_ONCE]}
            for name, data in store.get_many(list(names)):
                right += judge(names[name], data, block(names[name], _BYTES)) == "right"
            handles = max(handles, len(list(Path("/proc/self/fd").iterdir())))
    return {
        "verified": report.blocks,
        "faults": len(report.faults),
        "right": right,
        "handles": handles,
        "stored": blocks * _BYTES,
        "on disk": on_disk,
    }
