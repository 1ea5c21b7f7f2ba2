"""What the demo model is trained on: contexts of made-up countries as data lines, in the order of a curriculum.

A model this small must find three things one after the other: to copy, to find the right kind of fact, and to mind
whose fact it is. It begins with two passages (one needs no matching of names, so none is learned) whose names and
values are all single words of two syllables; with the names of the demo corpus' kind from the beginning, copying took
more than five times as long to appear. Then names become what they are, and passages more.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from blockrag.demo.contexts import real_facts
from blockrag.demo.synthetic import Context, Split, World
from blockrag.finetune.data.lines import Candidate, Question, RagLine
from blockrag.passage import Passage

__all__ = [
    "BATCH_ROWS",
    "BLOCK_STAGE",
    "CURRICULUM",
    "FACTS",
    "MAX_PASSAGES",
    "Stage",
    "block_lines",
    "context_line",
    "curriculum_lines",
    "unseen_lines",
]

FACTS: Final = (4, 8)
"""Facts of a passage: 60 to 120 tokens."""

MAX_PASSAGES: Final = 10

BATCH_ROWS: Final = 3
"""Lines of one step; they have equally many passages, so that nothing is padded."""


@dataclass(frozen=True, slots=True)
class Stage:
    """A part of a run.

    Args:
        steps: Optimizer steps.
        fewest: Fewest passages of a line.
        most: Most passages of a line.
        facts: Fewest and most facts of a passage.
        questions: Most questions about facts in a line, beside two about the order of the documents.
        simple: Names and values are single words of two syllables.
    """

    steps: int
    fewest: int
    most: int
    facts: tuple[int, int] = FACTS
    questions: int = 14
    simple: bool = False


CURRICULUM: Final[Sequence[Stage]] = (
    Stage(1000, 2, 2, facts=(3, 4), questions=8, simple=True),
    Stage(400, 2, 2, facts=(3, 5), questions=8),
    Stage(150, 3, 3),
    Stage(150, 4, 4),
    Stage(200, 2, 6),
    Stage(600, 2, MAX_PASSAGES),
)
"""Of the run in full attention."""

BLOCK_STAGE: Final = Stage(500, 2, MAX_PASSAGES)
"""Of block fine-tuning, and of its control."""


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
    rng, facts = random.Random(f"curriculum-{seed}"), real_facts()
    worlds = {simple: World(facts, split="train", seed=seed, simple=simple) for simple in (True, False)}
    for stage in CURRICULUM:
        yield from _drawn(worlds[stage.simple], rng, stage, scale)


def block_lines(seed: int, *, scale: float = 1.0) -> Iterator[RagLine]:
    """The lines of block fine-tuning and of its control; other ones than those of the curriculum."""
    world, rng = World(real_facts(), split="train", seed=1_000_000 + seed), random.Random(f"block-{seed}")
    yield from _drawn(world, rng, BLOCK_STAGE, scale)


def unseen_lines(split: Split, passages: int, count: int, *, seed: int) -> list[RagLine]:
    """Lines with two questions about the order and six about facts each."""
    world = World(real_facts(), split=split, seed=seed)
    return [context_line(world.context(passages=passages, facts=FACTS, questions=6, order=1.0)) for _ in range(count)]


def _drawn(world: World, rng: random.Random, stage: Stage, scale: float) -> Iterator[RagLine]:
    for _ in range(max(1, round(stage.steps * scale))):
        # One passage alone is seen now and then: users ask with one, too.
        alone = stage.fewest < stage.most and rng.random() < 0.03
        passages = 1 if alone else rng.randint(stage.fewest, stage.most)
        for _ in range(BATCH_ROWS):
            context = world.context(passages=passages, facts=stage.facts, questions=stage.questions, order=1.0)
            yield context_line(context)
