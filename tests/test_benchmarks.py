"""The benchmark scripts run end to end on a model of a few thousand weights; no times are asserted."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MODES = ["full", "cold", "disk", "memory"]
TINY = ["--shape", "smoke", "--block-tokens", "8", "16", "--query-tokens", "5", "--repeats", "2"]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("ttft")
    points = ["--lengths", "96", "32", "--modes", *reversed(MODES), "--note", "a test", "--output", str(output)]
    done = subprocess.run(
        [sys.executable, "-W", "error", str(BENCHMARKS / "ttft.py"), *TINY, *points],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (output / "ttft-smoke-cpu" / "ttft.md").read_text("utf-8").strip()
    return output / "ttft-smoke-cpu"


def test_json_says_what_was_measured_and_where(report: Path) -> None:
    text = (report / "ttft.json").read_text("utf-8")
    result = json.loads(text)
    assert result["schema"] == 1
    assert result["note"] == "a test"
    assert result["versions"].keys() == {"python", "torch", "transformers"}
    assert {"cpu", "cores", "torch_threads", "omp_num_threads"} <= result["machine"].keys()
    assert min(result["rates"]["copy_bytes_per_s"], result["rates"]["matrix_flops_per_s"]) > 0
    assert result["model"]["parameters"] > 0
    assert result["command"].startswith("python benchmarks/ttft.py --shape smoke --device cpu --lengths 32 96")
    # Neither this machine's paths nor its name.
    assert str(report.parent) not in text
    assert str(BENCHMARKS.parent) not in text


def test_json_has_every_sample_of_every_mode(report: Path) -> None:
    result = json.loads((report / "ttft.json").read_text("utf-8"))
    assert [point["prompt_tokens"] for point in result["points"]] == [32, 96]
    for point in result["points"]:
        assert list(point["modes"]) == MODES
        assert point["full_over"].keys() == {"ttft_s", "processor_s"}
        assert point["full_over"]["ttft_s"].keys() == {"cold", "disk", "memory"}
        for mode in point["modes"].values():
            for spread in (mode["ttft_s"], mode["processor_s"]):
                assert spread["n"] == len(spread["samples"]) == 2
                assert 0 < spread["min"] <= spread["median"] <= spread["max"]
            assert mode["bound_s"] > 0
            assert mode["parts_s"].keys() == {"load_s", "compose_s", "block_prefill_s", "query_prefill_s", "other_s"}
        # float16 at rest, float32 in the cache; headers come on top.
        assert point["bytes_at_rest"] > point["cache_bytes"] / 2 > 0


def test_table_and_plot_are_written(report: Path) -> None:
    table = (report / "ttft.md").read_text("utf-8")
    assert "full / memory" in table
    assert "python benchmarks/ttft.py" in table
    png = (report / "ttft.png").read_bytes()
    assert png.startswith(b"\x89PNG\r\n")
    assert len(png) > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths", "5"], "leaves no passage"),
        (["--block-tokens", "8", "15"], "at least twice"),
        (["--repeats", "0"], "at least 1"),
        (["--device", "cuda", "--clock", "processor"], "--device cpu"),
    ],
)
def test_impossible_arguments_are_refused(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from ttft import main

    with pytest.raises(SystemExit) as refused:
        main([*TINY, *arguments])
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_passages_fill_the_prompt_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from shapes import cut

    generator = random.Random(0)
    for total in range(1, 400):
        lengths = cut(total, 8, 16, generator)
        assert sum(lengths) == total
        assert max(lengths) <= 16
        assert min(lengths) >= min(8, total)
    with pytest.raises(ValueError, match="cannot cut"):
        cut(100, 8, 15, generator)
