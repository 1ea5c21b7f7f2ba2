"""How the demo model is made: the recipe of this package on made-up countries, from random weights.

    python -m blockrag.finetune.demo --out DIR --seeds 0 1 2

For every seed, in DIR/seed-N: data files, an untrained model, and three runs of `finetune`:

    full      full attention, with a curriculum over the number of passages: it starts at two (one passage needs no
              matching of names, so none is learned), up to ten
    block     block fine-tuning of it: lines alternate between the block mask and full attention
    control   full attention alone on the same lines for as many steps: what more training does without blocks

Then all are measured on the same questions, in every mode, and DIR/results.json and DIR/table.md say what block
fine-tuning gains. A run that was stopped goes on where it was. What helps a model this small to learn at all: the
loss counts every token a little, since copying emerges early where text must be predicted; values differ in shape by
kind of fact (numbers, "Mount ...", ".xx"), so that the right kind is found first and the name is minded next.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import torch

from blockrag.demo.contexts import real_facts
from blockrag.demo.synthetic import Context, Split, World
from blockrag.demo.untrained import Shape, save_untrained
from blockrag.finetune.data.lines import Candidate, Question, RagLine, write_lines
from blockrag.finetune.run import finetune
from blockrag.finetune.saving import CHECKPOINTS
from blockrag.finetune.settings import FinetuneSettings
from blockrag.passage import Passage

__all__ = ["CURRICULUM", "DEMO_SETTINGS", "block_lines", "context_line", "curriculum_lines", "main", "make"]

logger = logging.getLogger(__name__)

FACTS: Final = (4, 8)
"""Facts of a passage: 60 to 120 tokens."""

QUESTIONS: Final = 14
"""Questions about facts in a line, beside two about the order of the documents (an eighth of all)."""

MAX_PASSAGES: Final = 10

_ROWS: Final = 2

CURRICULUM: Final[Sequence[tuple[int, int, int]]] = (
    (3000, 2, 2),
    (400, 3, 3),
    (400, 4, 4),
    (300, 5, 5),
    (300, 6, 6),
    (300, 2, 8),
    (1300, 2, MAX_PASSAGES),
)
"""Of the run in full attention: optimizer steps, fewest and most passages."""

BLOCK_STEPS: Final = 1500
"""Of block fine-tuning, and of its control."""

DEMO_SETTINGS: Final = FinetuneSettings(
    order="file",
    batch_rows=_ROWS,
    max_tokens=2048,
    max_gap=500,
    prompt_weight=0.06,
    learning_rate=2e-3,
    schedule="hold-then-linear",
    warmup=40,
    decay=0.25,
    weight_decay=0.01,
    betas=(0.9, 0.98),
    save_steps=500,
    save_limit=1,
    log_steps=50,
    eval_steps=500,
)
"""What the three runs have in common."""


def context_line(context: Context, line_id: str = "") -> RagLine:
    """A context of the generator as a line; the kinds of its questions are "fact" and "order"."""
    return RagLine(
        passages=tuple(
            Candidate(Passage(id=str(number), title=title, text=text))
            for number, (title, text) in enumerate(context.passages, start=1)
        ),
        questions=tuple(
            Question(row.question, (row.answer,), kind="order" if row.kind in ("first", "last") else "fact")
            for row in context.questions
        ),
        id=line_id,
    )


def curriculum_lines(seed: int, *, scale: float = 1.0) -> Iterator[RagLine]:
    """The lines of the run in full attention, in order.

    Args:
        seed: Draws them.
        scale: Share of the steps to make, for trying out.
    """
    world, rng = World(real_facts(), split="train", seed=seed), random.Random(f"curriculum-{seed}")
    for steps, fewest, most in CURRICULUM:
        yield from _drawn(world, rng, max(1, round(steps * scale)), fewest, most)


def block_lines(seed: int, *, scale: float = 1.0) -> Iterator[RagLine]:
    """The lines of block fine-tuning and of its control; other ones than those of the curriculum."""
    world, rng = World(real_facts(), split="train", seed=1_000_000 + seed), random.Random(f"block-{seed}")
    yield from _drawn(world, rng, max(1, round(BLOCK_STEPS * scale)), 2, MAX_PASSAGES)


def test_lines(split: Split, passages: int, count: int) -> list[RagLine]:
    """Lines about made-up countries, with two questions about the order and six about facts each."""
    world = World(real_facts(), split=split, seed=5)
    return [context_line(world.context(passages=passages, facts=FACTS, questions=6, order=1.0)) for _ in range(count)]


def make(out: Path, seed: int, *, shape: Shape | None = None, scale: float = 1.0, bf16: bool = False) -> None:
    """Make the three models of one seed; what is there already is kept, and a run that was stopped goes on.

    Args:
        out: The directory of this seed.
        seed: Draws weights, lines and gaps.
        shape: The model's numbers.
        scale: Share of the steps to make, for trying out.
        bf16: Compute in bfloat16: a quarter faster on processors that have it, many times slower on others.
    """
    data, start = out / "data", out / "untrained"
    if not (start / "block_attention.json").is_file():
        write_lines(data / "full.jsonl", curriculum_lines(seed, scale=scale))
        write_lines(data / "block.jsonl", block_lines(seed, scale=scale))
        write_lines(data / "eval.jsonl", test_lines("test", 5, 24))
        save_untrained(start, real_facts(), shape or Shape(), seed=seed)
    settings = replace(DEMO_SETTINGS, seed=seed, bf16=bf16)
    tuning = replace(settings, learning_rate=1e-3, decay=0.6)
    _stage(start, out / "full", data / "full.jsonl", replace(settings, variants="full"))
    _stage(out / "full", out / "block", data / "block.jsonl", replace(tuning, variants="alternate"))
    _stage(out / "full", out / "control", data / "block.jsonl", replace(tuning, variants="full"))


def _stage(start: Path, out: Path, data: Path, settings: FinetuneSettings) -> None:
    if (out / "config.json").is_file():
        return
    logger.info("%s ...", out)
    resume = any((out / CHECKPOINTS).glob("checkpoint-*/trainer_state.json"))
    finetune(start, [data], out, settings, eval_data=[data.with_name("eval.jsonl")], resume=resume, device="cpu")
    # Only for resuming, and three times the size of the model.
    shutil.rmtree(out / CHECKPOINTS)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the models of some seeds, and measure them; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m blockrag.finetune.demo", description="Make the demo model.")
    parser.add_argument("--out", type=Path, required=True, help="directory for the models and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one model each")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to make, for trying out")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--threads", type=int, default=1, help="threads of each computation")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(chosen.threads)
    for seed in chosen.seeds:
        make(chosen.out / f"seed-{seed}", seed, scale=chosen.scale, bf16=chosen.bf16)


def _drawn(world: World, rng: random.Random, steps: int, fewest: int, most: int) -> Iterator[RagLine]:
    """The lines of some steps; those of one step have equally many passages, so that nothing is padded."""
    for _ in range(steps):
        # One passage alone is seen now and then: users ask with one, too.
        passages = 1 if fewest < most and rng.random() < 0.03 else rng.randint(fewest, most)
        for _ in range(_ROWS):
            yield context_line(world.context(passages=passages, facts=FACTS, questions=QUESTIONS, order=1.0))


if __name__ == "__main__":
    main()
