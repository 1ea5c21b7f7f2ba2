"""A disk store from outside: its index, its files, and other processes that use it."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

from test_stores import IN_FILE, key, value

from blockrag.stores import DiskStore

__all__ = ["execute", "run_python", "two_blocks", "value_files"]


def two_blocks(path: Path) -> Path:
    """The directory of a store with one small and one large block, both closed properly."""
    with contextlib.closing(DiskStore(path)) as store:
        store.put(key(1), value(1))
        store.put(key(2), value(2, IN_FILE))
    return path


def execute(root: Path, statement: str, *parameters: object) -> list[tuple[object, ...]]:
    """What an attacker with a file, not a process, can do: change the index behind the store's back."""
    with contextlib.closing(sqlite3.connect(root / "cache.db")) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def value_files(root: Path) -> list[Path]:
    return sorted(root.glob("??/*.val"))


def run_python(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=240, **options)
