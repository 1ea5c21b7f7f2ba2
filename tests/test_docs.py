"""What the documentation shows is run: README code and its printed output, examples, links, names, commands."""

from __future__ import annotations

import contextlib
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest

import blockrag

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
# Run by the tests of the integration they show, with the oldest and the newest release of its framework.
FRAMEWORKS = ("llama_index", "langchain", "haystack")


def of_a_framework(path: Path) -> bool:
    return path.stem.replace("-", "_").startswith(FRAMEWORKS)


def python_blocks(text: str) -> list[tuple[str, str]]:
    """Each Python block, with the text block that directly follows it (its printed output) or an empty string."""
    pattern = re.compile(r"```python\n(.*?)```(?:\s*```text\n(.*?)```)?", re.DOTALL)
    return [(code, output or "") for code, output in pattern.findall(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if not of_a_framework(page)], ids=lambda page: page.name)
def test_python_blocks_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for code, expected in python_blocks(page.read_text("utf-8")):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, str(page), "exec"), namespace)
        if expected:
            # Durations and rates differ from run to run; everything else must not.
            assert _without_times(printed.getvalue()) == _without_times(expected)


def _without_times(text: str) -> str:
    return re.sub(r"\d[\d.,]*(?= ?(ms|s|seconds)\b)", "N", text).strip()


def test_the_readme_shows_code_early_and_briefly() -> None:
    lines = README.splitlines()
    start = lines.index("```python")
    end = lines.index("```", start)
    assert end < 40
    assert end - start - 1 <= 9


def test_the_two_commands_of_the_readme_exist() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"^make (\w[\w-]*)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"the README promises `make {target}`"
    assert "make test" in (ROOT / ".ci" / "run").read_text("utf-8")


def test_examples_are_short() -> None:
    for example in EXAMPLES:
        assert len(example.read_text("utf-8").splitlines()) < 80, example.name


def test_what_shows_a_framework_is_run_by_its_integration() -> None:
    tests = "".join(path.read_text("utf-8") for path in (ROOT / "integrations").glob("*/tests/**/*.py"))
    for path in filter(of_a_framework, [*EXAMPLES, *PAGES]):
        assert path.stem in tests, f"no test of an integration runs {path.name}"


@pytest.mark.parametrize("example", [one for one in EXAMPLES if not of_a_framework(one)], ids=lambda one: one.name)
def test_examples_run(example: Path) -> None:
    result = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout


def test_every_public_name_has_a_place_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text("utf-8")
    for name in blockrag.__all__:
        if name != "BlockRAGError":  # documented with its tree
            assert re.search(rf"::: blockrag\.[\w.]*\b{name}$", reference, re.MULTILINE), f"{name} is not documented"


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_is_documented() -> None:
    from typer.main import get_command

    from blockrag.cli import app

    page = (ROOT / "docs" / "command-line.md").read_text("utf-8")
    for name in get_command(app).commands:  # type: ignore[attr-defined]
        assert f"blockrag {name}" in page, f"docs/command-line.md says nothing about `blockrag {name}`"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert str(page.relative_to(ROOT / "docs")) in navigation
