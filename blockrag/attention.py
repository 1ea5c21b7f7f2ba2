"""The block mask: which token may attend to which. The one definition everything is compared with.

A prompt is a sequence of segments. A *local* segment (a passage) attends only to itself, causally; a *global* segment
(the question, an answer) attends causally to itself and to everything before it. With the last segment global and all
others local this is the mask of Block-Attention (arXiv 2409.15355, section 2.1); with several global segments it is a
conversation in which passages arrive between the turns.

A row of a training batch holds more than one prompt: questions about the same passages are *branches*, each of which
sees the passages and itself and no other branch, and unrelated prompts may follow each other. `TokenLayout` says of
each token where it belongs; `layout_mask` and `flex_mask` are the same rule as a tensor and for FlexAttention.

Tests compare every path with one forward under this mask; fine-tuning trains with it. Inference never builds it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from blockrag.errors import InputError

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

__all__ = ["TokenLayout", "additive_mask", "block_mask", "flex_mask", "layout_mask"]


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Where each token of some rows belongs.

    All tensors have the shape (rows, tokens); padding has -1 in `prompt` and `block`.

    Args:
        prompt: int; which prompt of the row. Prompts do not see each other.
        block: int; which block of the row, counted over its prompts and branches.
        branch: int; 0 for what the branches of a prompt share, and the number of the branch from 1 on.
        local: bool; whether the token's block attends only to itself.
        position: int; the token's position, which windows are measured in.
    """

    prompt: torch.Tensor
    block: torch.Tensor
    branch: torch.Tensor
    local: torch.Tensor
    position: torch.Tensor

    @classmethod
    def of_segments(
        cls, lengths: Sequence[int], local: Sequence[bool] | None = None, *, device: torch.device | None = None
    ) -> TokenLayout:
        """One row with one prompt.

        Args:
            lengths: Tokens of each segment, in order.
            local: Whether each segment attends only to itself; by default all but the last.
            device: Where to put the tensors.

        Raises:
            InputError: The two sequences differ in length, a length is negative, or there is no segment.
        """
        if local is None:
            local = [True] * (len(lengths) - 1) + [False]
        if not lengths or len(lengths) != len(local) or min(lengths) < 0:
            raise InputError(
                f"need one non-negative length per segment, got lengths {list(lengths)}, local {list(local)}"
            )
        block = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(list(lengths)))[None]
        zeros = torch.zeros_like(block)
        is_local = torch.tensor(list(local), dtype=torch.bool)[block]
        return cls(zeros, block, zeros, is_local, torch.arange(block.shape[1])[None]).to(device)

    def to(self, device: torch.device | None) -> TokenLayout:
        """The same on another device; None for where it is."""
        return TokenLayout(*(getattr(self, name).to(device) for name in self.__slots__))


class _Token(NamedTuple):
    """What the rule needs of the two tokens it compares; tensors of any shapes that broadcast."""

    place: torch.Tensor
    prompt: torch.Tensor
    block: torch.Tensor
    branch: torch.Tensor
    local: torch.Tensor
    position: torch.Tensor


def _sees(query: _Token, key: _Token, window: int | None) -> torch.Tensor:
    """The rule. Padding sees the padding before it, so that no row of a softmax is empty."""
    before = (query.prompt == key.prompt) & ((key.branch == 0) | (key.branch == query.branch))
    seen = (query.place >= key.place) & ((query.block == key.block) | (before & ~query.local))
    return seen if window is None else seen & (query.position - key.position < window)


def layout_mask(layout: TokenLayout, *, window: int | None = None) -> torch.Tensor:
    """The mask of some rows as a tensor.

    Args:
        layout: Where the tokens belong.
        window: Sliding window in positions, where the layer has one: a token sees itself and `window - 1` before it.

    Returns:
        A bool tensor of shape (rows, tokens, tokens); True where the token of the second axis attends to that of the
        third.
    """
    place = torch.arange(layout.block.shape[1], device=layout.block.device)[None]
    token = _Token(place, layout.prompt, layout.block, layout.branch, layout.local, layout.position)
    query = _Token(*(values[:, :, None] for values in token))
    key = _Token(*(values[:, None, :] for values in token))
    return _sees(query, key, window)


def flex_mask(layout: TokenLayout, *, window: int | None = None) -> BlockMask:
    """The mask of some rows for `torch.nn.attention.flex_attention`: no tensor of tokens by tokens is kept.

    Args:
        layout: Where the tokens belong, on the device of the forward.
        window: See `layout_mask`.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    def token(row: torch.Tensor, place: torch.Tensor) -> _Token:
        at = (row, place)
        return _Token(
            place, layout.prompt[at], layout.block[at], layout.branch[at], layout.local[at], layout.position[at]
        )

    def sees(row: torch.Tensor, _head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return _sees(token(row, query), token(row, key), window)

    rows, tokens = layout.block.shape
    device = layout.block.device
    # Compiled, it never makes the dense mask; on a CPU, where it is for tests, compiling takes longer than it saves.
    return create_block_mask(
        sees, B=rows, H=None, Q_LEN=tokens, KV_LEN=tokens, device=str(device), _compile=device.type == "cuda"
    )


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
        InputError: See `TokenLayout.of_segments`.

    Example:
        >>> block_mask([1, 2, 1]).int().tolist()
        [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    """
    return layout_mask(TokenLayout.of_segments(lengths, local), window=window)[0]


def additive_mask(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same mask as numbers to add to attention scores: 0 where True, the dtype's minimum where False."""
    return torch.where(mask, torch.zeros((), dtype=dtype), torch.finfo(dtype).min)
