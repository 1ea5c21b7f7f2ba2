"""The runs that make the demo model of one seed, in its directory.

    untrained  random weights and the tokenizer
    full       full attention, with the curriculum
    block      block fine-tuning of it: lines alternate between the block mask and full attention
    control    full attention alone on the same lines for as many steps: what more training does without blocks

A run that was stopped goes on where it was. The loss counts every token a little: copying emerges early where text
must be predicted.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Final

from blockrag.demo.contexts import real_facts
from blockrag.demo.untrained import Shape, save_untrained
from blockrag.finetune.data.lines import write_lines
from blockrag.finetune.demo.lines import BATCH_ROWS, block_lines, curriculum_lines, unseen_lines
from blockrag.finetune.resuming import last_checkpoint
from blockrag.finetune.run import finetune
from blockrag.finetune.saving import CHECKPOINTS
from blockrag.finetune.settings import FinetuneSettings

__all__ = ["BLOCK_SETTINGS", "FULL_SETTINGS", "make"]

logger = logging.getLogger(__name__)

FULL_SETTINGS: Final = FinetuneSettings(
    variants="full",
    order="file",
    batch_rows=BATCH_ROWS,
    max_tokens=2048,
    max_gap=500,
    prompt_weight=0.06,
    optimizer="muon",
    learning_rate=1.5e-3,
    schedule="hold-then-linear",
    warmup=40,
    decay=0.25,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    eval_steps=250,
    save_steps=250,
    save_limit=1,
    log_steps=50,
)
"""Of the run in full attention."""

BLOCK_SETTINGS: Final = replace(FULL_SETTINGS, variants="alternate", learning_rate=1e-3, decay=0.7)
"""Of block fine-tuning; its control differs in `variants` alone."""


def make(out: Path, seed: int, *, shape: Shape | None = None, scale: float = 1.0, bf16: bool = False) -> None:
    """Make the models of one seed; what is there already is kept, and a run that was stopped goes on.

    Args:
        out: The directory of this seed.
        seed: Draws weights, lines and gaps.
        shape: The model's numbers.
        scale: Share of the steps to make, for trying out.
        bf16: Compute in bfloat16: faster on processors that have it, many times slower on others.
    """
    data, start = out / "data", out / "untrained"
    if not (start / "block_attention.json").is_file():
        write_lines(data / "full.jsonl", curriculum_lines(seed, scale=scale))
        write_lines(data / "block.jsonl", block_lines(seed, scale=scale))
        write_lines(data / "eval.jsonl", unseen_lines("test", 5, 24, seed=5))
        save_untrained(start, real_facts(), shape or Shape(), seed=seed)
    full, block = (replace(settings, seed=seed, bf16=bf16) for settings in (FULL_SETTINGS, BLOCK_SETTINGS))
    _run(start, out / "full", data / "full.jsonl", full)
    _run(out / "full", out / "block", data / "block.jsonl", block)
    _run(out / "full", out / "control", data / "block.jsonl", replace(block, variants="full"))


def _run(start: Path, out: Path, data: Path, settings: FinetuneSettings) -> None:
    if (out / "config.json").is_file():
        return
    logger.info("%s ...", out)
    resume = last_checkpoint(out) is not None
    finetune(start, [data], out, settings, eval_data=[data.with_name("eval.jsonl")], resume=resume, device="cpu")
    # Only for resuming, and three times the size of the model.
    shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
