"""The loss: which tokens count, and what their sum is divided by.

Both reductions divide by a number of the whole batch of an optimizer step, over all its micro-batches and all
processes, so that how the batch is cut changes nothing. The published recipe sums within a sequence and averages over
the sequences of each micro-batch, which makes the learning rate depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, TypeAlias

import torch
from torch.nn import functional

from blockrag.finetune.collate import IGNORED

__all__ = ["Reduction", "denominator", "labelled_columns", "summed_loss"]

Reduction: TypeAlias = Literal["mean", "sum"]
"""What the sum over tokens is divided by: "mean": the weights of all tokens that count, so that every token counts the
same; "sum": the number of answers, so that an answer counts by its length, as in the published recipe."""


def denominator(batches: Iterable[Mapping[str, torch.Tensor]], reduction: Reduction) -> torch.Tensor:
    """What the loss of some micro-batches is divided by; float64, no dimensions."""
    name = "weights" if reduction == "mean" else "num_answers"
    return torch.stack([batch[name].sum(dtype=torch.float64) for batch in batches]).sum()


def labelled_columns(labels: torch.Tensor) -> torch.Tensor:
    """Columns of a batch whose prediction some row is trained on, in order.

    Args:
        labels: (rows, tokens) int64; `IGNORED` where nothing is trained.

    Returns:
        int64; each is one less than that of the label.
    """
    return (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()


def summed_loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """The weighted sum of the tokens' cross entropies, in float32.

    Args:
        logits: (rows, columns, vocabulary), at the columns that predict.
        labels: (rows, tokens) int64.
        weights: (rows, tokens) float32.
        columns: Where the logits are from, as `labelled_columns` gives them.
    """
    targets, counts = labels[:, columns + 1].flatten(), weights[:, columns + 1].flatten()
    losses = functional.cross_entropy(logits.flatten(0, 1).float(), targets, ignore_index=IGNORED, reduction="none")
    return (losses * counts).sum()
