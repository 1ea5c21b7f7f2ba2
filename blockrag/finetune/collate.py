"""Rows to the tensors of one batch.

Positions are those of inference: shared blocks follow each other from 0 on, and every branch starts where they end.
The mask is not made here: a batch carries the few numbers per token that `blockrag.attention` makes it from, on the
device where it is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from blockrag.attention import TokenLayout
from blockrag.finetune.rows import Item, Row

__all__ = ["IGNORED", "Collator", "Positions", "Span", "collate", "layout_of", "spans_of"]

IGNORED = -100
"""Label of a token that is not trained, as in torch and transformers."""

Positions = Literal["global", "local"]

_LAYOUT = ("prompt", "block", "branch", "local", "position")


@dataclass(frozen=True, slots=True)
class Span:
    """Where an answer stands in a batch.

    Args:
        row: Its row.
        start: Its first token.
        end: Behind its last token.
        kind: The question's kind.
    """

    row: int
    start: int
    end: int
    kind: str


@dataclass(frozen=True, slots=True)
class Collator:
    """`collate` as the Trainer calls it.

    Args:
        pad_id: Token that fills rows up.
        prompt_weight: What a token of the prompt counts in the loss, beside 1 for a token of an answer.
        multiple: Rows are filled up to a multiple of so many tokens; FlexAttention wants 128.
    """

    pad_id: int
    prompt_weight: float = 0.0
    multiple: int = 1

    def __call__(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        """Tensors of one batch; see `collate`."""
        return collate(rows, pad_id=self.pad_id, prompt_weight=self.prompt_weight, multiple=self.multiple)


def collate(
    rows: Sequence[Row],
    *,
    pad_id: int,
    prompt_weight: float = 0.0,
    multiple: int = 1,
    positions: Positions = "global",
) -> dict[str, torch.Tensor]:
    """The tensors of some rows, each (rows, tokens) unless said otherwise.

    Args:
        rows: At least one, none of them empty.
        pad_id: Token that fills rows up.
        prompt_weight: What a token of the prompt counts in the loss. 0 trains answers only. The first token of a block
            or of a question never counts: what stands before it in the row does not precede it in its block.
        multiple: See `Collator`.
        positions: "local" gives every block the positions from 0 on, as a store without re-encoding would
            (arXiv 2409.15355, "w/o-pos"); for measuring, not for training. Windows stay where they are, as they do
            there.

    Returns:
        input_ids, position_ids, labels (int64); weights (float32), what each label counts; prompt, block, branch,
        local, position, the layout of the mask; and num_answers, int64 of shape (rows,).
    """
    placed = [_place(row, prompt_weight) for row in rows]
    longest = max(len(row.ids) for row in placed)
    tokens = -(-longest // multiple) * multiple
    size = (len(rows), tokens)
    batch = {
        "input_ids": torch.full(size, pad_id),
        "position_ids": torch.zeros(size, dtype=torch.long),
        "labels": torch.full(size, IGNORED),
        "weights": torch.zeros(size),
        "prompt": torch.full(size, -1),
        "block": torch.full(size, -1),
        "branch": torch.zeros(size, dtype=torch.long),
        "local": torch.zeros(size, dtype=torch.bool),
        "position": torch.zeros(size, dtype=torch.long),
        "num_answers": torch.tensor([len(row.spans) for row in placed]),
    }
    for number, row in enumerate(placed):
        count = len(row.ids)
        ids = torch.tensor(row.ids)
        weights = torch.tensor(row.weights)
        batch["input_ids"][number, :count] = ids
        batch["labels"][number, :count] = torch.where(weights > 0, ids, IGNORED)
        batch["weights"][number, :count] = weights
        for name, values in (
            ("position_ids", row.restarted if positions == "local" else row.positions),
            ("position", row.positions),
            ("prompt", row.prompts),
            ("block", row.blocks),
            ("branch", row.branches),
            ("local", row.local),
        ):
            batch[name][number, :count] = torch.tensor(values)
    return batch


def spans_of(rows: Sequence[Row]) -> list[Span]:
    """Where the answers of some rows stand, in the order of the questions."""
    return [
        Span(number, start, end, kind) for number, row in enumerate(rows) for start, end, kind in _place(row, 0.0).spans
    ]


def layout_of(batch: dict[str, torch.Tensor]) -> TokenLayout:
    """What the mask of a batch is made from; the tensors are taken out of it."""
    return TokenLayout(*(batch.pop(name) for name in _LAYOUT))


class _Placed:
    """One row, token by token."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.restarted: list[int] = []
        self.prompts: list[int] = []
        self.blocks: list[int] = []
        self.branches: list[int] = []
        self.local: list[bool] = []
        self.weights: list[float] = []
        self.spans: list[tuple[int, int, str]] = []
        self._next_block = 0

    def add(self, ids: Sequence[int], position: int, prompt: int, branch: int, *, local: bool, weight: float) -> None:
        """Append one block, which is not empty; branch 0 is what the branches share."""
        count, shared = len(ids), branch == 0
        self.ids.extend(ids)
        self.positions.extend(range(position, position + count))
        self.restarted.extend(range(count) if shared else range(position, position + count))
        self.prompts.extend([prompt] * count)
        self.blocks.extend([self._next_block] * count)
        self.branches.extend([branch] * count)
        self.local.extend([local] * count)
        self.weights.extend([0.0] + [weight] * (count - 1))
        self._next_block += 1


def _place(row: Row, prompt_weight: float) -> _Placed:
    placed = _Placed()
    for prompt, item in enumerate(row):
        _place_item(placed, item, prompt, prompt_weight)
    return placed


def _place_item(placed: _Placed, item: Item, prompt: int, prompt_weight: float) -> None:
    position = 0
    for number, block in enumerate(item.sample.blocks):
        placed.add(block, position, prompt, 0, local=item.attention == "block", weight=prompt_weight)
        position += len(block) + (item.gaps[number] if item.gaps else 0)
    for number, branch in enumerate(item.sample.branches, start=1):
        placed.add(branch.query + branch.answer, position, prompt, number, local=False, weight=prompt_weight)
        end = len(placed.ids)
        start = end - len(branch.answer)
        placed.weights[start:end] = [1.0] * (end - start)
        placed.spans.append((start, end, branch.kind))
