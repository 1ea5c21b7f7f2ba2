"""How much memory this process has, and has had: from /proc, on Linux.

Not `resource.getrusage`: a process begins with the peak of the one that started it, execve or not, so that under a
large parent nothing that it does itself is seen.
"""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["forget_peak", "resident"]


def resident(field: str) -> int:
    """VmRSS or VmHWM (the peak) of this process, in bytes."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def forget_peak() -> None:
    """Set VmHWM back to the present resident set."""
    Path("/proc/self/clear_refs").write_text("5")
