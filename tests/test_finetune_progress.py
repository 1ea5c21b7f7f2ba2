"""What a run says of its pace: tokens that were really seen, and the time that those to come will take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_tokenizers import plain_tokenizer
from tiny_training import rag_line, samples_from, save_tiny, write_data
from transformers import TrainerControl, TrainerState, TrainingArguments

from blockrag.finetune import progress
from blockrag.finetune.collate import collate
from blockrag.finetune.progress import SaysProgress
from blockrag.finetune.reading import rows_of
from blockrag.finetune.rows import Rows
from blockrag.finetune.run import finetune
from blockrag.finetune.samples import Branch, Ids, Sample
from blockrag.finetune.settings import FinetuneSettings
from blockrag.finetune.steps import steps_of, tokens_of
from blockrag.model.facts import load_facts

CURRICULUM = FinetuneSettings(variants="block", order="file", steps=3, batch_rows=2, log_steps=1, learning_rate=1e-4)


def sample(tokens: int) -> Sample:
    """A sample of so many tokens, one of them a block and one an answer."""
    branch = Branch(Ids("i", [5] * (tokens - 2)), Ids("i", [6]))
    return Sample(blocks=(Ids("i", [4]),), branches=(branch,), marker=(0, 0), where="here")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        # Rows of 10, 20, 30, 40 and 50 tokens, two to a step: three steps to a pass, the last of one row.
        ({"steps": 1}, 30),
        ({"steps": 2}, 100),
        ({"steps": 3}, 150),
        ({"steps": 7}, 330),
        ({"steps": 0, "epochs": 2.0}, 300),
        ({"steps": 1, "order": "shuffled"}, 60),
        ({"steps": 4, "order": "shuffled"}, 210),
    ],
)
def test_tokens_of_a_run_by_hand(changes: dict[str, object], expected: int) -> None:
    settings = replace(CURRICULUM, **changes)
    rows = rows_of([sample(tokens) for tokens in (10, 20, 30, 40, 50)], settings)
    assert tokens_of(rows, settings, steps_of(settings, len(rows))) == expected
    halves = replace(settings, batch_rows=1)
    assert tokens_of(rows, halves, steps_of(halves, len(rows), 2), 2) == expected


@pytest.mark.parametrize("rows", [1, 2])
def test_the_log_counts_the_tokens_that_were_seen(tmp_path: Path, rows: int) -> None:
    """Of a curriculum that was not finished: its first six lines of nine, padded or not."""
    save_tiny(tmp_path / "model")
    lines = [rag_line(number, passages=number) for number in range(9)]
    data = write_data(tmp_path / "train.jsonl", lines)
    settings = replace(CURRICULUM, batch_rows=rows, accumulate=2 // rows)
    done = finetune(tmp_path / "model", [data], tmp_path / "out", settings, device="cpu")
    template = load_facts(done.path / "block_attention.json").template
    samples = samples_from(tmp_path, lines, plain_tokenizer(), template)
    expected = sum(len(ids) for sample in samples[:6] for ids in (*sample.blocks, *sample.branches))
    assert json.loads((done.path / "train_log.json").read_text("utf-8"))["tokens_seen"] == expected


def test_time_left_is_that_of_the_tokens_to_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that get longer: half of them are done, a quarter of the tokens."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    said: list[str] = []
    arguments, control = TrainingArguments(output_dir=str(tmp_path), use_cpu=True), TrainerControl()
    # Going on from a checkpoint: what was seen before it is no part of the pace.
    state = TrainerState(global_step=2, max_steps=10, num_input_tokens_seen=1000)
    callback = SaysProgress(said.append, run_tokens=13_000.0)
    callback.on_train_begin(arguments, state, control)
    state.global_step, state.num_input_tokens_seen = 5, 3000
    now[0] += 10
    callback.on_log(arguments, state, control, logs={"loss": 0.5, "learning_rate": 1e-4})
    assert said == [
        "going on behind step 2 of 10",
        "step 5 of 10: loss 0.5000, learning rate 1.00e-04, 200 tokens/s, 50 s left",
    ]


def test_rows_know_their_lengths() -> None:
    rows = Rows([sample(10), sample(20)], variants="both", pack_tokens=30, order="file")
    batch = collate(list(rows), pad_id=0)
    assert rows.lengths() == (batch["prompt"] >= 0).sum(1).tolist()
