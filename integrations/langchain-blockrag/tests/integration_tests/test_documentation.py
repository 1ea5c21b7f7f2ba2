"""The README, the guide and the example run, and print what they say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[2]
ROOT = HERE.parents[1]


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("page", [HERE / "README.md", ROOT / "docs" / "guide" / "langchain.md"], ids=lambda p: p.name)
def test_a_page(page: Path) -> None:
    blocks = re.findall(r"```(python|text)\n(.*?)```", page.read_text("utf-8"), re.DOTALL)
    code, printed = ("".join(text for kind, text in blocks if kind == wanted) for wanted in ("python", "text"))
    assert code
    assert run(code) == printed


def test_the_example() -> None:
    code = (ROOT / "examples" / "langchain_chain.py").read_text("utf-8")
    assert len(code.splitlines()) < 80
    printed = run(code)
    assert "What is the capital of Bhutan?  ->  Thimphu" in printed
    assert "What is the currency of Kenya?  ->  Kenyan shillings" in printed
    assert "full attention  ->  Thimphu" in printed
    for reused, of in re.findall(r"(\d+) of (\d+) prompt tokens", printed):
        assert int(reused) > int(of) * 0.8
