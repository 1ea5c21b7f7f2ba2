"""What the guide, the README and the examples show is run."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from llama_index.core import Settings

PACKAGE = Path(__file__).parent.parent
ROOT = PACKAGE.parent.parent
PAGES = [PACKAGE / "README.md", ROOT / "docs" / "guide" / "llama-index.md"]
EXAMPLES = {
    "llama_index_query_engine": ["Thimphu", "Kenyan shillings", "Nairobi", "5 blocks reused, 1 computed"],
    "llama_index_chat_engine": ["Bhutan?  ->  Thimphu", "Kenya?  ->  Nairobi", "'found': 6"],
    "llama_index_ingestion": [
        "Bhutan?  ->  Thimphu",
        "'blocks_reused': 4, 'blocks_computed': 2",
        "240 blocks before, 240",
    ],
}


@pytest.fixture(autouse=True)
def _settings_of_a_page() -> Iterator[None]:
    kept = dict(vars(Settings))
    yield
    vars(Settings).update(kept)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_code_runs_and_prints_what_the_page_says(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    blocks = re.findall(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", page.read_text("utf-8"), re.DOTALL)
    assert blocks
    for code, expected in blocks:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        said = expected or "".join(re.findall(r"print\(.*  # (.*)\n", code))
        assert printed.getvalue().strip() == said.strip()


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text("utf-8").splitlines()) < 80
    run = subprocess.run([sys.executable, str(path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    for expected in EXAMPLES[name]:
        # How many tokens a block has is the demo model's affair.
        assert expected in re.sub(r" \([1-9]\d* tokens\)", "", run.stdout)
