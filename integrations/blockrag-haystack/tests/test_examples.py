"""The example and the code of the README run, and say what they promise."""

import re
import subprocess
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parents[1]
_EXAMPLE = _HERE.parents[1] / "examples" / "haystack_pipeline.py"
_GUIDE = _HERE.parents[1] / "docs" / "guide" / "haystack.md"


def _run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def test_the_example():
    printed = _run(_EXAMPLE.read_text())
    assert "What is the capital of Bhutan?  ->  Thimphu" in printed
    assert "What is the currency of Kenya?  ->  Kenyan shillings" in printed
    (reused, of) = map(int, re.findall(r"(\d+) of (\d+) prompt tokens", printed)[1])
    assert reused > of / 2


def _python_of(page):
    """The page's blocks of Python, one after the other, as a reader types them."""
    return "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))


def test_the_readme():
    code = _python_of(_HERE / "README.md")
    assert _run(code).splitlines() == re.findall(r"^# (.*)$", code, re.MULTILINE)


def test_the_guide():
    printed = _run(_python_of(_GUIDE)).splitlines()
    assert printed[0] == "Thimphu"
    assert printed[2] == "{'written': 1, 'failed': 0}"
    assert printed[3].startswith("The capital of Bhutan is Thimphu.")
