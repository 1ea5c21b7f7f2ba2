"""What block fine-tuning gives the demo models: one table over seeds, question sets, models and modes.

Every cell is exact match (see `scoring`) over the same questions. Standard errors are over lines, whose questions share
passages; a line's results under all seeds are one cluster. What differs from seed to seed stands beside it as lowest
and highest. Knows how the models are measured, not how they are made.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from blockrag.demo.contexts import real_contexts
from blockrag.evaluation.statistics import Estimate, mean, paired_difference
from blockrag.finetune.data.lines import RagLine
from blockrag.finetune.demo.lines import context_line, unseen_lines
from blockrag.finetune.samples import samples_of
from blockrag.finetune.scoring import Mode, score
from blockrag.model.loading import load_pretrained
from blockrag.model.profile import structure_of
from blockrag.prompt import template_for

__all__ = ["QUESTION_SETS", "ROWS", "Cell", "measure", "table", "tabulated"]

ROWS: Final[Sequence[tuple[str, str, Mode]]] = (
    ("full attention, not block-fine-tuned", "full", "full"),
    ("block, not block-fine-tuned", "full", "block"),
    ("control: full attention for as many steps more", "control", "full"),
    ("control in block mode", "control", "block"),
    ("full attention, block-fine-tuned", "block", "full"),
    ("block, block-fine-tuned", "block", "block"),
    ("block, block-fine-tuned, without re-encoding", "block", "block-no-reencode"),
)
"""Rows of the table: what they are called, the model, and the mode."""

REFERENCE: Final = 4
"""The row the others are compared with: what the shipped model does in full attention."""


def _held_out(passages: int, *, similar: bool = False) -> list[RagLine]:
    contexts = real_contexts(held_out=True, passages=passages, similar=similar, order=True)
    return [context_line(context) for context in contexts]


QUESTION_SETS: Final[Mapping[str, Callable[[], list[RagLine]]]] = {
    "made-up countries, 5 passages": lambda: unseen_lines("test", 5, 150, seed=11),
    "made-up countries, 10 passages": lambda: unseen_lines("test", 10, 100, seed=11),
    "held-out countries, 5 passages": lambda: _held_out(5),
    "held-out countries, 5 similar passages": lambda: _held_out(5, similar=True),
    "held-out countries, 10 passages": lambda: _held_out(10),
}
"""What is asked: made-up countries of words that training never had, and countries of the demo corpus it never had."""


def measure(model: Path, mode: Mode, lines: Sequence[RagLine]) -> list[list[tuple[str, bool]]]:
    """Whether a model answers exactly: line by line, the kind and the result of each question.

    Args:
        model: A directory.
        mode: How passages are attended to.
        lines: The questions.
    """
    loaded, tokenizer, facts = load_pretrained(model, device=torch.device("cpu"), dtype=torch.float32, revision=None)
    template = facts.template or template_for(tokenizer)
    samples = [sample for line in lines for sample in samples_of(line, template, tokenizer, "the question set")]
    scored = score(loaded, structure_of(loaded), samples, mode, pad_id=int(tokenizer.pad_token_id or 0))
    return [[(one.kind, one.right) for one in scores] for scores in scored]


@dataclass(frozen=True, slots=True)
class Cell:
    """One number of the table, in percent.

    Args:
        value: Exact match over all seeds.
        difference: Minus that of the reference row, question by question.
        per_seed: Of each seed alone.
    """

    value: Estimate
    difference: Estimate
    per_seed: tuple[float, ...]


def tabulated(results: Mapping[str, Sequence[Sequence[Sequence[Sequence[Any]]]]], kind: str) -> list[Cell]:
    """The cells of one question set, for questions of one kind.

    Args:
        results: From "model mode" to what `measure` returned, seed by seed.
        kind: "fact" or "order".
    """

    def values(row: int) -> tuple[list[float], list[int], list[int]]:
        _, model, mode = ROWS[row]
        found = [
            (100.0 * right, line, seed)
            for seed, lines in enumerate(results[f"{model} {mode}"])
            for line, questions in enumerate(lines)
            for of_kind, right in questions
            if of_kind == kind
        ]
        return [v for v, _, _ in found], [line for _, line, _ in found], [seed for _, _, seed in found]

    reference, _, _ = values(REFERENCE)
    cells = []
    for row in range(len(ROWS)):
        found, clusters, seeds = values(row)
        of_seed = [[v for v, seed in zip(found, seeds, strict=True) if seed == one] for one in sorted(set(seeds))]
        cells.append(
            Cell(
                value=mean(found, clusters),
                difference=paired_difference(found, reference, clusters),
                per_seed=tuple(sum(part) / len(part) for part in of_seed),
            )
        )
    return cells


def table(out: Path, seeds: Sequence[int], sets: Mapping[str, Callable[[], list[RagLine]]] = QUESTION_SETS) -> str:
    """Measure the models of some seeds, write every result to `results.json`, and return the table as Markdown.

    Args:
        out: Where `recipe.make` made them, in a directory for each seed; what it has measured already is kept.
        seeds: Which.
        sets: The questions, by what they are called.
    """
    path = out / "results.json"
    done: dict[str, Any] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    lines = {name: make() for name, make in sets.items()}
    for name, asked in lines.items():
        for _, model, mode in ROWS:
            for seed in seeds:
                key = f"{name} | {model} {mode} | {seed}"
                if key not in done:
                    done[key] = measure(out / f"seed-{seed}" / model, mode, asked)
                    path.write_text(json.dumps(done), "utf-8")
    return "\n".join(_set_table(name, done, seeds) for name in lines)


def _set_table(name: str, done: Mapping[str, Any], seeds: Sequence[int]) -> str:
    results = {
        f"{model} {mode}": [done[f"{name} | {model} {mode} | {seed}"] for seed in seeds] for _, model, mode in ROWS
    }
    columns = {kind: tabulated(results, kind) for kind in ("fact", "order")}
    counts = {kind: cells[0].value.n // len(seeds) for kind, cells in columns.items()}
    head = f"| {name}: exact match, % | facts ({counts['fact']} questions) | difference | order ({counts['order']}) |"
    lines = [f"{head} difference |", "|---|---|---|---|---|"]
    for row, (label, _, _) in enumerate(ROWS):
        cells = " | ".join(_shown(columns[kind][row], is_reference=row == REFERENCE) for kind in ("fact", "order"))
        lines.append(f"| {label} | {cells} |")
    return "\n".join(lines) + "\n"


def _shown(cell: Cell, *, is_reference: bool) -> str:
    spread = f" ({min(cell.per_seed):.1f} to {max(cell.per_seed):.1f})" if len(cell.per_seed) > 1 else ""
    value = f"{cell.value.value:.1f} ± {cell.value.se or 0:.1f}{spread}"
    return f"{value} | {'' if is_reference else f'{cell.difference.value:+.1f} ± {cell.difference.se or 0:.1f}'}"
