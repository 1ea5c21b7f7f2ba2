"""Going on with a run: as what it was begun with, or not at all, and then it says what differs."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tiny_training import rag_lines, save_tiny, write_data

from blockrag.errors import InputError
from blockrag.finetune.resuming import last_checkpoint
from blockrag.finetune.run import Finetuned, finetune
from blockrag.finetune.settings import PRESETS, FinetuneSettings
from blockrag.prompt import TEMPLATES

BEGUN = FinetuneSettings(
    steps=2, batch_rows=2, accumulate=2, learning_rate=1e-3, schedule="constant", save_steps=2, log_steps=1
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, and what others would need."""
    directory = tmp_path_factory.mktemp("resuming")
    save_tiny(directory / "model")
    save_tiny(directory / "another", seed=1)
    write_data(directory / "train.jsonl", rag_lines(6))
    write_data(directory / "longer.jsonl", rag_lines(7))
    write_data(directory / "eval.jsonl", rag_lines(2))
    run(directory, directory / "begun")
    return directory


def run(base: Path, out: Path, settings: FinetuneSettings = BEGUN, **changed: Any) -> Finetuned:
    arguments = {"model": base / "model", "data": [base / "train.jsonl"], "eval_data": [base / "eval.jsonl"]} | changed
    return finetune(out=out, settings=settings, device="cpu", **arguments)


@pytest.fixture
def begun(base: Path, tmp_path: Path) -> Path:
    """A copy of the run, as a stopped one: with its checkpoint alone."""
    shutil.copytree(base / "begun" / "checkpoints", tmp_path / "run" / "checkpoints")
    return tmp_path / "run"


DIFFERENT: dict[str, tuple[str, Callable[[Path], dict[str, Any]]]] = {
    "rate": (
        r"other learning_rate \(was 0.001, is 0.01\)",
        lambda _: {"settings": replace(BEGUN, learning_rate=0.01)},
    ),
    "several": (
        r"other reduction \(was 'mean', is 'sum'\), seed \(was 42, is 1\);",
        lambda _: {"settings": replace(BEGUN, seed=1, reduction="sum")},
    ),
    "batch": (r"rows per step \(was 4, is 8\)", lambda _: {"settings": replace(BEGUN, accumulate=4)}),
    "adapters": (r"lora_rank \(was 0, is 2\)", lambda _: {"settings": replace(BEGUN, lora_rank=2)}),
    "data": (
        r"other data \(was train.jsonl [0-9a-f]{8}, is longer.jsonl [0-9a-f]{8}\)",
        lambda base: {"data": [base / "longer.jsonl"]},
    ),
    "evaluation": (r"other eval-data \(was eval.jsonl [0-9a-f]{8}, is none\)", lambda _: {"eval_data": []}),
    "limit": (r"eval-limit \(was 200, is 1\)", lambda _: {"eval_limit": 1}),
    "prefix": (
        r"other template \(block_attention_prefix\)",
        lambda _: {"settings": replace(BEGUN, block_prefix="[B]")},
    ),
    "template": (r"other template \(.*query.*\)", lambda _: {"template": TEMPLATES["tulu"]}),
    "model": ("other weights of the model;", lambda base: {"model": base / "another"}),
    "dtype": (r"other dtype \(was 'float32', is 'bfloat16'\);", lambda _: {"dtype": "bfloat16"}),
    "shorter": (
        "was begun for 2 steps, and these options give 1; pass the --steps",
        lambda _: {"settings": replace(BEGUN, steps=1)},
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_another_run_is_refused_by_what_differs(base: Path, begun: Path, case: str) -> None:
    message, changed = DIFFERENT[case]
    before = {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=message):
        run(base, begun, resume=True, **changed(base))
    assert {path: path.read_bytes() for path in begun.rglob("*") if path.is_file()} == before


def test_what_changes_no_number_may_change(base: Path, begun: Path, tmp_path: Path) -> None:
    """The cut of a step, the cadence, recomputation, a file's name, a prefix that is said; and more steps."""
    moved = shutil.copy(base / "train.jsonl", tmp_path / "moved.jsonl")
    changed = replace(BEGUN, steps=4, batch_rows=4, accumulate=1, save_steps=3, eval_steps=1, log_steps=2)
    said: list[str] = []
    longer = run(
        base,
        begun,
        replace(changed, gradient_checkpointing=True, block_prefix="[Block-Attention]"),
        data=[moved],
        resume=True,
        progress=said.append,
    )
    assert said[0] == "the run gets longer: 4 steps instead of 2"
    whole = run(base, tmp_path / "whole", replace(BEGUN, steps=4))
    first, second = (load_file(done.path / "model.safetensors") for done in (longer, whole))
    assert max(float((first[name] - second[name]).abs().max()) for name in first) <= 1e-6
    logs = [json.loads((done.path / "train_log.json").read_text("utf-8")) for done in (longer, whole)]
    assert logs[0]["tokens_seen"] == logs[1]["tokens_seen"]
    # From now on it is a run of four steps.
    with pytest.raises(InputError, match="was begun for 4 steps"):
        run(base, begun, resume=True)


@pytest.mark.parametrize("content", [None, "", "[1]", '{"format": 2}', '{"format": 1, "steps": 2}'])
def test_without_a_record_nothing_is_gone_on_with(base: Path, begun: Path, content: str | None) -> None:
    record = begun / "checkpoints" / "run.json"
    record.unlink()
    if content is not None:
        record.write_text(content, "utf-8")
    with pytest.raises(InputError, match=r"run.json' does not say what the run was begun with .*pass another --output"):
        run(base, begun, resume=True)


def test_a_copy_of_a_checkpoint_is_none(begun: Path) -> None:
    found = last_checkpoint(begun)
    assert found is not None
    shutil.copytree(found, found.with_name("checkpoint-9-copy"))
    assert last_checkpoint(begun) == found


def test_a_directory_of_something_else_is_left_alone(base: Path, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine", "utf-8")
    (tmp_path / "adapter").mkdir()
    with pytest.raises(InputError, match=rf"'{re.escape(str(tmp_path))}' holds other files \(README.md, adapter\)"):
        run(base, tmp_path)
    assert (tmp_path / "README.md").read_text("utf-8") == "mine"
    (tmp_path / "empty").mkdir()
    assert run(base, tmp_path / "empty", replace(BEGUN, steps=1)).steps == 1


def test_presets_keep_what_a_stopped_run_has_done() -> None:
    assert all(settings.save_steps > 0 and settings.eval_steps > 0 for _, settings in PRESETS.values())
