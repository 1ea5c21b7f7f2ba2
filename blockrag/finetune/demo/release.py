"""The demo model as it ships: bfloat16 weights, what it was trained on, the table, and a card that claims no more."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockrag.finetune.demo.lines import CURRICULUM, FACTS, MAX_PASSAGES
from blockrag.finetune.saving import LOG_FILE
from blockrag.model.facts import FACTS_FILE

__all__ = ["release"]

_RUNS: Final = ("full", "block")


def release(made: Path, seed: int, target: Path, command: str, table: str) -> None:
    """Write the directory that ships.

    Args:
        made: Where `recipe.make` made the models, in a directory for each seed.
        seed: Whose model to ship.
        target: The directory; replaced.
        command: What made it all.
        table: What was measured, as Markdown.
    """
    source = made / f"seed-{seed}"
    logs = {run: json.loads((source / run / LOG_FILE).read_text("utf-8")) for run in _RUNS}
    shutil.rmtree(target, ignore_errors=True)
    model = AutoModelForCausalLM.from_pretrained(source / "block", dtype=torch.bfloat16)
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source / "block").save_pretrained(target)
    shutil.copy(source / "block" / FACTS_FILE, target / FACTS_FILE)
    (target / LOG_FILE).write_text(json.dumps(logs, indent=1) + "\n", "utf-8")
    (target / "README.md").write_text(_card(logs, seed, command, table), "utf-8")


def _card(logs: Mapping[str, Any], seed: int, command: str, table: str) -> str:
    full, block = logs["full"], logs["block"]
    tokens = sum(log["tokens_seen"] for log in logs.values())
    minutes = sum(log["seconds"] for log in logs.values()) / 60
    stages = "\n".join(
        f"- {stage.steps} steps with {_passages(stage.fewest, stage.most)}"
        + (", all names and values single words of two syllables" if stage.simple else "")
        for stage in CURRICULUM
    )
    return _CARD.format(
        parameters=full["parameters"],
        facts=FACTS,
        most=MAX_PASSAGES,
        command=command,
        seed=seed,
        stages=stages,
        block_steps=block["steps"],
        tokens=tokens,
        minutes=round(minutes),
        table=table,
    )


def _passages(fewest: int, most: int) -> str:
    return f"{fewest} passages" if fewest == most else f"1 or {fewest} to {most} passages"


_CARD: Final = """\
---
license: apache-2.0
language: en
pipeline_tag: text-generation
tags: [block-attention, rag, demo]
---
# blockrag demo checkpoint

A Llama with {parameters:,} parameters (bfloat16, byte-level BPE), trained from random weights to answer questions about
short passages and fine-tuned for Block-Attention (arXiv 2409.15355). It exists so that blockrag's first command, its
examples and its tests run a complete pipeline offline. It is no general language model.

## What it can do
Answer the question forms in `blockrag/demo/forms.py` (capital, region, population, area, language, currency, highest
point, internet code, a neighbor; which document comes first or last), in that exact wording, from passages written in
the sentence forms of the same file. Anything else gives nonsense, and it never says that it does not know. At most
{most} passages were seen in training; ask it about no more. Decode greedily.

## Data
Only generated text (`blockrag/demo/synthetic.py`): made-up countries with made-up values, {facts[0]} to {facts[1]}
facts a passage. Names and values of real countries that are not held out were mixed in at random, so the statements are
false on purpose. 60 real countries are held out: neither their names, nor values that only they have, occur in the
training data. The words of the generator's test split are disjoint from those of its train split. Mistakes on held-out
countries were looked at while an earlier version was developed (they led to the short form of numbers); this version's
recipe was chosen on the training loss alone.

## Recipe
`{command}`, of which this is seed {seed}. Full attention first:

{stages}

then {block_steps} steps of block fine-tuning, whose lines alternate between the block mask and full attention. Together
{tokens:,} tokens, {minutes} minutes on one core of a shared machine. `train_log.json` holds every number.

## Measured
Greedy exact match of the whole answer with float32 weights, mean over the seeds ± standard error over lines (lowest to
highest seed in parentheses); differences are from "full attention, block-fine-tuned", question by question. "order"
questions ask which place the first or the last document describes. "control" had as many steps and the same lines as
block fine-tuning, in full attention alone. "similar passages" are those of the corpus that share most words with the
one asked about.

{table}
What this shows: the mechanism, on a made-up task, with one and a half million parameters. What it does not show: that
any of these numbers carries over to other models or to free text (the paper's own are in its table 1).
"""
