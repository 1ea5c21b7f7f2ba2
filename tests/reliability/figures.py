"""The table of what the reliability suite found: one row per figure, as JSON and as Markdown.

A row carries its own commit and date, so that the rows of one table may come from several runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["FigureTable"]


class FigureTable:
    """Rows by what they are about; a later run replaces the rows it has figures for.

    Args:
        scale: "ci" or "long".
    """

    def __init__(self, scale: str) -> None:
        self._scale = scale
        self._started = time.time()

    def write(self, directory: Path, figures: Sequence[dict[str, Any]]) -> None:
        """Add rows to the table in `directory`, or begin it: reliability.json and reliability.md."""
        from blockrag.evaluation.speed.machine import commit, describe_machine, versions

        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "reliability.json"
        rows = {row["what"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
        made = {**commit(), "date": time.strftime("%Y-%m-%d", time.gmtime(self._started))}
        rows |= {figure["what"]: {**figure, **made} for figure in figures}
        result = {
            "command": f"pytest tests/reliability --reliability={self._scale}",
            "machine": describe_machine("cpu"),
            "versions": versions(),
            "rows": sorted(rows.values(), key=lambda row: (row["test"], row["what"])),
        }
        path.write_text(json.dumps(result, indent=1) + "\n")
        (directory / "reliability.md").write_text(_markdown(result))


def _markdown(result: dict[str, Any]) -> str:
    machine = result["machine"]
    lines = [
        f"# Reliability on {machine['cpu']}, {machine['cores']} cores",
        "",
        "| what was done | how often | what came of it | seconds | scale | commit |",
        "| --- | ---: | --- | ---: | --- | --- |",
    ]
    for row in result["rows"]:
        tried, commit = f"{row['tried']:,} {row['unit']}", (row["commit"] or "installed")[:12]
        lines.append(
            f"| {row['what']} | {tried} | {row['result']} | {row['seconds']:,} | {row['scale']} | "
            f"{commit}{'*' if row['modified'] else ''} |"
        )
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    lines += [
        "",
        f"`{result['command']}`, one row per figure; every figure comes from a test that passed, and other work ran on "
        "the machine meanwhile. A star: the package differed from its commit.",
        "",
        f"{versions}; {machine['system']}, {machine['memory_bytes'] / 2**30:.0f} GiB.",
    ]
    return "\n".join(lines) + "\n"
