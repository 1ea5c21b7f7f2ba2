"""The block mask: which token may attend to which. The one definition everything is compared with.

A prompt is a sequence of segments. A *local* segment (a passage) attends only to itself, causally; a *global* segment
(the question, an answer) attends causally to itself and to everything before it. With the last segment global and all
others local this is the mask of Block-Attention (arXiv 2409.15355, section 2.1); with several global segments it is a
conversation in which passages arrive between the turns.

Tests compare every path with one forward under this mask; fine-tuning trains with it. Inference never builds it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from blockrag.errors import InputError

__all__ = ["additive_mask", "block_mask"]


def block_mask(
    lengths: Sequence[int],
    local: Sequence[bool] | None = None,
    *,
    window: int | None = None,
) -> torch.Tensor:
    """The mask of one prompt.

    Args:
        lengths: Tokens of each segment, in order.
        local: Whether each segment attends only to itself; by default all but the last.
        window: Sliding window in tokens, where the layer has one: a token sees itself and `window - 1` before it.

    Returns:
        A bool tensor of shape (tokens, tokens); True where the row's token attends to the column's.

    Raises:
        InputError: The two sequences differ in length, a length is negative, or there is no segment.

    Example:
        >>> block_mask([1, 2, 1]).int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    """
    if local is None:
        local = [True] * (len(lengths) - 1) + [False]
    if not lengths or len(lengths) != len(local) or min(lengths) < 0:
        raise InputError(f"need one non-negative length per segment, got lengths {list(lengths)}, local {list(local)}")
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths)))
    is_global = ~torch.tensor(list(local), dtype=torch.bool)[segment]
    position = torch.arange(len(segment))
    causal = position[:, None] >= position[None, :]
    mask = causal & ((segment[:, None] == segment[None, :]) | is_global[:, None])
    if window is not None:
        mask &= position[:, None] - position[None, :] < window
    return mask


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask as numbers to add to attention scores: 0 where True, the dtype's minimum where False."""
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
