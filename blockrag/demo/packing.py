"""Contexts to tensors: many questions share the passages of one sequence.

The prefix and the passages come first; every question with its answer is an independent last block that attends to
all of them and not to the other questions. One sequence therefore trains (or scores) a dozen prompts for little more
than the price of one, and each question sees exactly what it would see alone. Owns the batch and exact match; knows
nothing about how contexts are made or models are trained.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from blockrag.demo import forms
from blockrag.demo.synthetic import Context
from blockrag.errors import InputError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel

__all__ = ["BOS", "EOS", "PAD", "Attention", "Batch", "collate", "exact_match", "forward"]

Attention = Literal["full", "block"]
PAD, BOS, EOS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sequences, padded to one length.

    Args:
        ids: [batch, tokens] int64.
        positions: [batch, tokens] int64; every question starts where the passages end.
        mask: [batch, 1, tokens, tokens] bool, True where the row's token may attend to the column's.
        answers: [batch, tokens] bool, True on the answers' tokens and their EOS.
        spans: (row, start, stop, kind) of every answer.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor
    answers: torch.Tensor
    spans: tuple[tuple[int, int, int, str], ...]


@dataclass(frozen=True, slots=True)
class _Row:
    ids: list[int]
    positions: list[int]
    blocks: list[int]
    shared: int
    spans: list[tuple[int, int, str]]


def collate(
    contexts: Sequence[Context],
    tokenizer: Tokenizer,
    attention: Attention,
    *,
    gaps: random.Random | None = None,
    max_gap: int = 0,
) -> Batch:
    """Pack contexts, one per row.

    Args:
        contexts: At least one.
        tokenizer: A `tokenizers.Tokenizer`; every block is tokenized on its own.
        attention: "block": a passage attends to itself only; "full": also to all before it.
        gaps: Draws, for half of the rows, positions left out at the block borders; None leaves none out.
        max_gap: Most positions left out in one row.

    Raises:
        InputError: There is no context, or `attention` is neither.
    """
    if not contexts or attention not in ("full", "block"):
        raise InputError(f"need contexts and attention 'full' or 'block', got {len(contexts)} and {attention!r}")
    rows = [_pack(context, tokenizer, gaps, max_gap) for context in contexts]
    size = (len(rows), max(len(row.ids) for row in rows))
    ids, positions = torch.full(size, PAD), torch.zeros(size, dtype=torch.long)
    blocks, is_query = torch.full(size, -1), torch.zeros(size, dtype=torch.bool)
    answers = torch.zeros(size, dtype=torch.bool)
    for number, row in enumerate(rows):
        count = len(row.ids)
        ids[number, :count] = torch.tensor(row.ids)
        positions[number, :count] = torch.tensor(row.positions)
        blocks[number, :count] = torch.tensor(row.blocks)
        is_query[number, row.shared : count] = True
        for start, stop, _ in row.spans:
            answers[number, start:stop] = True
    spans = tuple((number, *span) for number, row in enumerate(rows) for span in row.spans)
    mask = _mask(blocks, is_query, attention)
    return Batch(ids=ids, positions=positions, mask=mask, answers=answers, spans=spans)


def forward(model: PreTrainedModel, batch: Batch) -> torch.Tensor:
    """Return the model's logits, [batch, tokens, vocabulary]."""
    output = model(input_ids=batch.ids, position_ids=batch.positions, attention_mask=batch.mask, use_cache=False)
    logits: torch.Tensor = output.logits
    return logits


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: Tokenizer, contexts: Sequence[Context], attention: Attention
) -> dict[str, tuple[int, int]]:
    """Count the questions answered exactly: (right, asked) for "all", "fact", "order" and every kind.

    An answer is right when each of its tokens, and its EOS, is the most likely one given those before it, which is
    the same as greedy decoding writing exactly this answer.
    """
    counts: dict[str, tuple[int, int]] = {}
    for start in range(0, len(contexts), 4):
        batch = collate(contexts[start : start + 4], tokenizer, attention)
        best = forward(model, batch).argmax(-1)
        for row, begin, stop, kind in batch.spans:
            hit = bool((best[row, begin - 1 : stop - 1] == batch.ids[row, begin:stop]).all())
            for group in ("all", "order" if kind in forms.ORDER_QUESTIONS else "fact", kind):
                right, asked = counts.get(group, (0, 0))
                counts[group] = (right + hit, asked + 1)
    return counts


def _mask(blocks: torch.Tensor, is_query: torch.Tensor, attention: Attention) -> torch.Tensor:
    """Return [batch, 1, tokens, tokens]; padding (block -1) attends to padding only, so that no row is empty."""
    length = blocks.shape[1]
    same = blocks[:, :, None] == blocks[:, None, :]
    is_shared = (blocks >= 0) & ~is_query
    sees_shared = blocks >= 0 if attention == "full" else is_query
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return ((same | (sees_shared[:, :, None] & is_shared[:, None, :])) & causal)[:, None]


def _pack(context: Context, tokenizer: Tokenizer, gaps: random.Random | None, max_gap: int) -> _Row:
    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    shared = [[BOS, *encode(forms.PREFIX)]] + [encode(forms.passage_block(*passage)) for passage in context.passages]
    left_out = [0] * len(shared)
    if gaps is not None and gaps.random() < 0.5:
        share = gaps.randint(0, max_gap) // len(shared)
        left_out = [gaps.randint(0, share) for _ in shared]
    row = _Row(ids=[], positions=[], blocks=[], shared=sum(map(len, shared)), spans=[])
    position = 0
    for number, (tokens, gap) in enumerate(zip(shared, left_out, strict=True)):
        _append(row, tokens, position, number)
        position += len(tokens) + gap
    for number, asked in enumerate(context.questions, start=len(shared)):
        query, answer = encode(forms.query_block(asked.question)), [*encode(forms.answer_text(asked.answer)), EOS]
        begin = len(row.ids) + len(query)
        row.spans.append((begin, begin + len(answer), asked.kind))
        _append(row, query + answer, position, number)
    return row


def _append(row: _Row, tokens: Sequence[int], position: int, block: int) -> None:
    row.ids.extend(tokens)
    row.positions.extend(range(position, position + len(tokens)))
    row.blocks.extend([block] * len(tokens))
