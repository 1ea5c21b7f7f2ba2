"""Real processes: runs that are killed and resumed end with the very same weights; two processes do what one does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from test_finetune_rows import drawn
from tiny_training import rag_line, rag_lines, save_tiny, write_data

KILLED = -signal.SIGKILL
# 6 samples in both attentions, 2 rows to a forward, 2 forwards to a step: 3 steps to an epoch, 8 steps in all.
SHUFFLED = {
    "steps": 8,
    "batch_rows": 2,
    "accumulate": 2,
    "max_gap": 20,
    "learning_rate": 1e-3,
    "prompt_weight": 0.1,
    "save_steps": 3,
    "log_steps": 2,
    "eval_steps": 4,
    "block_prefix": "",
}
IN_ORDER = {
    **SHUFFLED,
    "order": "file",
    "lora_rank": 4,
    "lora_dropout": 0.3,
    "schedule": "hold-then-linear",
    "pack": True,
}
# The same global batch of four rows: of one process in two forwards, or of two in one.
ALONE = {
    "steps": 2,
    "batch_rows": 2,
    "accumulate": 2,
    "learning_rate": 1e-4,
    "prompt_weight": 0.1,
    "log_steps": 1,
    "variants": "block",
}
TOGETHER = {**ALONE, "accumulate": 1}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def ended(base: Path) -> dict[str, Any]:
    """All runs, in one process that forks; what each ended with, by name."""
    save_tiny(base / "model")
    write_data(base / "train.jsonl", rag_lines(6))
    # As many answers to a row as its number, so that the processes have different numbers of them.
    write_data(base / "uneven.jsonl", [rag_line(number, questions=1 + number % 4) for number in range(8)])
    write_data(base / "eval.jsonl", [rag_line(number, questions=1 + number % 2) for number in range(20, 25)])
    plans: list[dict[str, Any]] = []

    def plan(name: str, settings: dict[str, Any], out: str = "", data: str = "train", **more: Any) -> None:
        paths = {"model": "model", "data": f"{data}.jsonl", "eval_data": "eval.jsonl", "out": out or name}
        plans.append({"name": name, "settings": settings, **{k: str(base / v) for k, v in paths.items()}, **more})

    for kind, settings in (("shuffled", SHUFFLED), ("ordered", IN_ORDER)):
        plan(kind, settings)
        plan(f"{kind} killed", settings, out=f"{kind}-2", die=5)
        plan(f"{kind} resumed", settings, out=f"{kind}-2", resume=True, die="saving")
        plan(f"{kind} resumed again", settings, out=f"{kind}-2", resume=True)
    for reduction in ("mean", "sum"):
        plan(f"alone {reduction}", {**ALONE, "reduction": reduction}, data="uneven")
        plan(f"together {reduction}", {**TOGETHER, "reduction": reduction}, data="uneven", processes=2)
    (base / "plan.json").write_text(json.dumps(plans))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("finetune_in_forks.py")), str(base / "plan.json")],
        env={**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (base / "stderr.txt").write_text(done.stderr)
    return dict(json.loads(line) for line in done.stdout.splitlines())


def logged(directory: Path) -> list[dict[str, Any]]:
    """The history of a run, without what depends on the clock."""
    history = json.loads((directory / "train_log.json").read_text())["history"]
    return [
        {name: value for name, value in entry.items() if not name.startswith(("train_", "total_"))} for entry in history
    ]


@pytest.mark.parametrize("kind", ["shuffled", "ordered"])
def test_a_run_that_was_killed_ends_with_the_same_weights(ended: dict[str, Any], base: Path, kind: str) -> None:
    """Killed between two checkpoints, and again while the finished directory was written."""
    assert ended[kind] == [0], (base / "stderr.txt").read_text()[-3000:]
    assert ended[f"{kind} killed"] == [KILLED]
    assert ended[f"{kind} resumed"] == [KILLED]
    assert ended[f"{kind} resumed again"] == [0]
    whole, resumed = base / kind, base / f"{kind}-2"
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert logged(resumed) == logged(whole)
    assert [entry["step"] for entry in logged(whole) if "loss" in entry] == [1, 2, 3, 4, 6, 8]
    assert [entry["step"] for entry in logged(whole) if "eval_block_loss" in entry] == [4, 8]
    logs = [json.loads((one / "train_log.json").read_text()) for one in (whole, resumed)]
    assert logs[0]["steps"] == logs[1]["steps"] == 8
    assert logs[0]["tokens_seen"] == logs[1]["tokens_seen"] > 0
    if kind == "ordered":
        adapters = [one / "adapter" / "adapter_model.safetensors" for one in (whole, resumed)]
        assert adapters[0].read_bytes() == adapters[1].read_bytes()


def test_training_changed_the_weights(ended: dict[str, Any], base: Path) -> None:
    before, after = load_file(base / "model/model.safetensors"), load_file(base / "shuffled/model.safetensors")
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() > 1e-4 for name in before)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_two_processes_do_what_one_does(ended: dict[str, Any], base: Path, reduction: str) -> None:
    """Same global batch, same weights, losses and gradients; with unequal numbers of answers on both sides."""
    assert ended[f"alone {reduction}"] == [0]
    assert ended[f"together {reduction}"] == [0, 0], (base / "stderr.txt").read_text()[-3000:]
    alone, together = base / f"alone {reduction}", base / f"together {reduction}"
    one, other = load_file(alone / "model.safetensors"), load_file(together / "model.safetensors")
    assert max((one[name] - other[name]).abs().max() for name in one) <= 1e-6
    log = json.loads((together / "train_log.json").read_text())
    assert log["processes"] == 2
    assert log["tokens_seen"] == json.loads((alone / "train_log.json").read_text())["tokens_seen"]
    first, second = logged(alone), logged(together)
    assert [entry.keys() for entry in first] == [entry.keys() for entry in second]
    for before, after in zip(first, second, strict=True):
        assert after == pytest.approx(before, rel=1e-5)
    assert "eval_full_loss" in first[-1], "an odd number of samples, shared out to two processes"
    assert {"eval_block_exact_match_k0", "eval_block_exact_match_k1"} <= first[-1].keys()


def test_rows_do_not_depend_on_the_process(ended: dict[str, Any]) -> None:
    assert ended["drawn"] == json.loads(json.dumps(drawn()))
