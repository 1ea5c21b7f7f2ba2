"""The C kernels are built once, loaded only from a place that is ours, and never needed."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from blockrag.kernels import build
from blockrag.kernels.build import library, why_not


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory of the library, still to be made; what this process loaded before is forgotten for the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("BLOCKRAG_CPU_KERNELS", "auto")
    monkeypatch.delenv("CC", raising=False)
    build._outcome.cache_clear()
    yield tmp_path / "blockrag"
    build._outcome.cache_clear()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kernel that compiles in a moment."""
    directory = tmp_path / "sources"
    directory.mkdir()
    (directory / "answer.h").write_text("enum { ANSWER = 1 };\n")
    (directory / "answer.c").write_text('#include "answer.h"\nint blockrag_answer(void) { return ANSWER; }\n')
    monkeypatch.setattr(build, "_SOURCES", directory)
    return directory


@pytest.fixture
def compiler(cache: Path, sources: Path) -> None:
    """Skips where nothing can be built; otherwise the small kernel is built and forgotten again."""
    if library() is None:
        pytest.skip(f"no compiled kernels here: {why_not()}")
    build._outcome.cache_clear()


def again() -> str | None:
    """Load once more; the reason for failing."""
    build._outcome.cache_clear()
    return why_not()


def built(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.so"))


@pytest.mark.usefixtures("compiler")
def test_it_is_built_once_and_found_again(cache: Path) -> None:
    (path,) = built(cache)
    before = path.stat()
    assert again() is None
    assert library() is library()
    assert [path] == built(cache) == list(cache.iterdir())
    assert path.stat().st_mtime_ns == before.st_mtime_ns
    assert cache.stat().st_mode & 0o777 == 0o700


@pytest.mark.usefixtures("compiler")
def test_a_change_of_flags_or_sources_is_another_library(
    cache: Path, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(build, "_FLAGS", (*build._FLAGS, "-DANOTHER"))
        assert again() is None
    assert len(built(cache)) == 2
    (sources / "answer.h").write_text("enum { ANSWER = 2 };\n")
    assert again() is None
    compiled = library()
    assert compiled is not None
    assert compiled.blockrag_answer() == 2
    assert len(built(cache)) == 3


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], lambda content: b"", bytes.upper])
def test_a_damaged_library_is_built_anew(cache: Path, damage: object) -> None:
    (path,) = built(cache)
    sound = path.read_bytes()
    damaged = cache / "damaged"
    damaged.write_bytes(damage(sound))  # type: ignore[operator]
    # A new file, because this process may still have the old one mapped.
    damaged.rename(path)
    assert again() is None
    assert [file.read_bytes() for file in built(cache)] == [sound]


@pytest.mark.usefixtures("compiler")
def test_code_that_others_could_have_written_is_not_loaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = built(cache)
    for target in (cache, path):
        target.chmod(0o770)
        assert f"others may write to {target}; run: chmod go-w" in (again() or "")
        target.chmod(0o700)
        assert again() is None
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
        assert "belongs to user" in (again() or "")
    elsewhere = cache.rename(cache.with_name("elsewhere"))
    cache.symlink_to(elsewhere)
    assert "is a link" in (again() or "")


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("BLOCKRAG_CPU_KERNELS", "off", "BLOCKRAG_CPU_KERNELS is off"),
        ("BLOCKRAG_CPU_KERNELS", "yes", 'set it to "auto" or "off"'),
        ("CC", "/bin/false", "/bin/false failed with status 1"),
        ("CC", "no-such-compiler -m64", "CC is 'no-such-compiler', which is not there"),
        ("CC", "'", "No closing quotation"),
        ("XDG_CACHE_HOME", "/dev/null", "Not a directory"),
    ],
)
def test_without_a_library_there_is_a_reason(
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    variable: str,
    value: str,
    reason: str,
) -> None:
    monkeypatch.setenv(variable, value)
    with caplog.at_level(logging.INFO, logger="blockrag"):
        assert library() is None
        assert library() is None
    assert reason in (why_not() or "")
    assert [record.levelname for record in caplog.records] == ["INFO"], "said once"
    assert reason in caplog.text


@pytest.mark.usefixtures("cache")
def test_other_systems_go_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Windows")
    assert why_not() == "they are not built on Windows"


@pytest.mark.usefixtures("compiler")
def test_clang_brings_a_runtime_of_its_own_so_it_goes_without_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "cc -D__clang__")
    assert build._tools().openmp is None
    assert "-fopenmp" not in build._tools().compile
    assert again() is None


@pytest.mark.usefixtures("compiler")
def test_sources_that_do_not_compile(sources: Path) -> None:
    (sources / "wrong.c").write_text("int wrong(void) { return nothing; }\n")
    assert "nothing" in (again() or "")


_LOAD = """
import torch
from blockrag.kernels.build import library, why_not
assert library() is not None, why_not()
torch.set_num_threads(2)
torch.randn(1 << 18).exp().sum()
with open("/proc/self/maps") as maps:
    print(len({line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line or "libomp" in line}))
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc/self/maps")
def test_processes_build_at_once_and_share_torchs_threads(cache: Path) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", _LOAD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=200) for process in processes]
    if library() is None:
        pytest.skip(f"no compiled kernels here: {why_not()}")
    for process, (output, error) in zip(processes, said, strict=True):
        assert process.returncode == 0, error
        assert int(output) <= 1, "one OpenMP runtime, or none"
    assert [path.suffix for path in cache.iterdir()] == [".so"]
