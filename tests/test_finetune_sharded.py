"""Weights shared out over two processes (FSDP2), by the file that ships, train to what one process trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_finetune_processes import ALONE, TOGETHER, logged
from tiny_training import rag_line, save_tiny, write_data

from blockrag.finetune.run import finetune
from blockrag.finetune.settings import FinetuneSettings
from blockrag.model.block_model import BlockModel
from blockrag.passage import Passage

TESTS = Path(__file__).parent
LAUNCH_FILE = TESTS.parent / "examples" / "finetune" / "fsdp2.yaml"
# A constant rate, so that a run that is made longer is the one that was longer from the start.
CHANGED: dict[str, Any] = {"steps": 3, "schedule": "constant", "warmup": 0}
ADAPTERS: dict[str, Any] = {"lora_rank": 4}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sharded")
    save_tiny(directory / "model")
    # As many answers to a row as its number, and an odd number of samples to score: processes have different ones.
    write_data(directory / "train.jsonl", [rag_line(number, questions=1 + number % 4) for number in range(8)])
    write_data(directory / "eval.jsonl", [rag_line(number, questions=1 + number % 2) for number in range(20, 25)])
    return directory


@pytest.fixture(scope="module")
def alone(base: Path) -> None:
    """The runs as one process does them."""
    usual: dict[str, Any] = {**ALONE, **CHANGED}
    data, scored = [base / "train.jsonl"], [base / "eval.jsonl"]
    for name, settings in (("alone", usual), ("alone adapters", usual | ADAPTERS)):
        finetune(base / "model", data, base / name, FinetuneSettings(**settings), eval_data=scored, device="cpu")


@pytest.fixture(scope="module")
def shared_out(base: Path) -> list[list[dict[str, int]]]:
    """The runs as two processes do them, in one launch; what each process held, in each run."""
    paths = {"model": "model", "data": "train.jsonl", "eval_data": "eval.jsonl"}

    def plan(out: str, *, resume: bool = False, **changes: Any) -> dict[str, Any]:
        found = {name: str(base / path) for name, path in {**paths, "out": out}.items()}
        return {**found, "resume": resume, "settings": {**TOGETHER, **CHANGED, **changes}}

    plans = [
        plan("shared out"),
        plan("shared out adapters", **ADAPTERS),
        plan("resumed", steps=2, save_steps=2),
        plan("resumed", save_steps=2, resume=True),
    ]
    (base / "plan.json").write_text(json.dumps(plans))
    (base / "held").mkdir()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    command += ["--config_file", str(LAUNCH_FILE), "--num_processes", "2", "--main_process_port", "0"]
    command += [str(TESTS / "finetune_sharded.py"), str(base / "plan.json"), str(base / "held")]
    # Where there is a GPU, torch would share out over that.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with (base / "log.txt").open("wb") as log:
        launched = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        try:
            launched.wait(timeout=240)
        finally:
            # Its processes are in sessions of their own, and a launcher that is asked to end takes them along.
            launched.terminate()
            launched.wait()
    assert launched.returncode == 0, (base / "log.txt").read_text(errors="replace")[-4000:]
    return [json.loads((base / "held" / f"{rank}.json").read_text()) for rank in (0, 1)]


def apart(one: Path, other: Path) -> float:
    """The largest difference between the saved weights of two directories."""
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_each_process_held_a_half(shared_out: list[list[dict[str, int]]]) -> None:
    """Otherwise nothing was shared out, and the rest would say nothing about it."""
    assert [[run["step"] for run in runs] for runs in shared_out] == [[0, 0, 0, 2]] * 2
    for first, second in zip(*shared_out, strict=True):
        assert first["all"] == second["all"] == 2 * first["own"] == 2 * second["own"]


def test_no_process_leaves_before_the_directory_is_written(shared_out: list[list[dict[str, int]]]) -> None:
    """A launcher that sees one fail as it leaves stops the others."""
    assert [[run["written"] for run in runs] for runs in shared_out] == [[True] * 4] * 2


@pytest.mark.usefixtures("alone", "shared_out")
@pytest.mark.parametrize("kind", ["", " adapters"])
def test_the_weights_are_those_of_one_process(base: Path, kind: str) -> None:
    """Of equal global batches; no further apart than float32 is when the two halves of a gradient are added.

    AdamW moves a weight by about the learning rate of 1e-4 in a step, whatever the size of its gradient, so that one
    that got none, or another's, would be a hundred times as far apart. A gradient of another size would be hidden: its
    norm, in the log, is not.
    """
    one, two = base / f"alone{kind}", base / f"shared out{kind}"
    assert apart(base / "model", one) > 1e-4
    assert apart(one, two) <= 1e-6
    before, after = logged(one), logged(two)
    assert [entry.keys() for entry in before] == [entry.keys() for entry in after]
    for first, second in zip(before, after, strict=True):
        assert second == pytest.approx(first, rel=1e-5)
    assert "eval_block_exact_match" in after[-1]
    assert json.loads((two / "train_log.json").read_text())["processes"] == 2
    assert (two / "adapter" / "adapter_model.safetensors").exists() is (kind == " adapters")


@pytest.mark.usefixtures("alone", "shared_out")
@pytest.mark.parametrize("kind", ["", " adapters"])
def test_the_directory_is_a_block_model(base: Path, kind: str) -> None:
    """That says the same of itself as one process' and computes the same."""
    one, two = (BlockModel.from_pretrained(base / f"{name}{kind}", device="cpu") for name in ("alone", "shared out"))
    assert two.facts == one.facts
    assert two.facts.block_fine_tuned
    prompt = two.template.segment(two.tokenizer, passages=[Passage(id="1", text="The sea.")], question="Which?")
    logits = two.reference_logits(prompt.blocks)
    assert torch.allclose(logits, one.reference_logits(prompt.blocks), atol=1e-4)
    # What was gathered to be saved is not left beside it.
    assert not (base / f"shared out{kind}" / "checkpoints" / "gathered").exists()


@pytest.mark.usefixtures("shared_out")
def test_a_run_goes_on_from_its_checkpoint(base: Path) -> None:
    """With the very weights and the log of the run that was not interrupted; the checkpoint is a model as it is."""
    assert (base / "resumed/model.safetensors").read_bytes() == (base / "shared out/model.safetensors").read_bytes()
    assert logged(base / "resumed") == logged(base / "shared out")
    checkpoint = BlockModel.from_pretrained(base / "resumed" / "checkpoints" / "checkpoint-2", device="cpu")
    assert checkpoint.facts == BlockModel.from_pretrained(base / "resumed", device="cpu").facts
