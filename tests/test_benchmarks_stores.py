"""The benchmark of the disk store runs end to end on few blocks; what it compares with is a store. No time asserted."""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
from benchmark_scripts import benchmark_script

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    return benchmark_script("stores")


def test_both_files_are_written(benchmark, tmp_path, monkeypatch, capsys):
    arguments = ["--out", str(tmp_path), "--tiny", "40", "--large", "8", "--portions", "4", "--rounds", "2"]
    monkeypatch.setattr(sys, "argv", ["stores.py", *arguments, "--note", "a test"])
    assert benchmark.main() == 0
    result = json.loads((tmp_path / "stores.json").read_text("utf-8"))
    assert (result["tiny"]["blocks"], result["large"]["blocks"]) == (40, 8)
    assert result["tiny"]["bytes"] == 40 * 704
    for kind in ("tiny", "large"):
        one = result[kind]
        assert set(one["operations"]) == set(benchmark.OPERATIONS)
        for name, measured in one["operations"].items():
            assert measured["ratio"]["n"] == (2 if name == "keys" else 4)
        assert all(space >= one["bytes"] for space in one["space"].values())
    text = (tmp_path / "stores.md").read_text("utf-8")
    assert text == capsys.readouterr().out.removesuffix("\n")
    assert "a test" in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stores.json", "stores.md"]
    assert str(tmp_path) not in text + json.dumps(result)


def test_the_plain_directory_is_a_store(benchmark, tmp_path):
    blocks = benchmark.Blocks(3, benchmark.TINY, benchmark.TINY_TOKENS, random.Random(0))
    directory = benchmark.PlainDirectory(tmp_path)
    first, second, third = blocks.keys
    for key in (first, second):
        directory.put(key, blocks.encoded(key))
    assert bytes(directory.get(first)) == bytes(blocks.encoded(first)) == bytes(directory.mapped(first))
    assert [data is None for _, data in directory.get_many([third, second])] == [True, False]
    assert set(directory.keys()) == directory.contains_many(blocks.keys) == {first, second}
    os.truncate(directory.path(second), 700)
    assert directory.get(second) is None
    assert directory.delete_many([first, second]) == 2
    assert list(directory.keys()) == []
