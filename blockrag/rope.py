"""Rotary position embedding, as arithmetic: which part of a vector turns, how fast, and turning it.

A `RopeSpec` says what a model does to one tensor of one layer; `rotate_` turns keys in place by the angles of
absolute positions, and `unrotate` takes the position out again. Both compute the angle as the model does, in
float32 as `float(position) * frequency`: rotating once from a position-free key by that angle is within 1.3e-7 of the
model's own key at any offset, while one delta angle per block is already 1e-3 off at position 32,000.

Some models multiply cosine and sine by an attention scale (YaRN, LongRope). That factor commutes with the rotation,
so it simply stays in the stored key: nothing here needs to know it, and nothing can invert it wrongly.

What model applies which spec is found by probing (`blockrag.model.profile`), never by a model's name.
Source: RoFormer, arXiv 2104.09864, section 3.2; Block-Attention, arXiv 2409.15355, section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch

__all__ = ["POSITIONS_AT_REST", "RopeKind", "RopeSpec", "angle_table", "rotate_", "unrotate"]

RopeKind = Literal["none", "half", "interleaved"]

POSITIONS_AT_REST = "unrotated"
"""Which positions stored keys are at: none. Part of every fingerprint; another convention needs another name."""

# Tokens rotated at a time: the temporaries stay in the processor's cache (256 and 8,192 both measured slower).
_CHUNK_TOKENS = 1024


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """How one tensor of one layer depends on position.

    Args:
        kind: "none" (position-free), "half" (dimension i turns with i + dim/2, Llama) or "interleaved"
            (2i with 2i + 1, Cohere).
        start: First rotated dimension of the head.
        dim: Number of rotated dimensions, even; 0 for "none".
        frequencies: dim/2 angular frequencies in radians per position, float32 values. A model that turns the other
            way has negative ones.
    """

    kind: RopeKind = "none"
    start: int = 0
    dim: int = 0
    frequencies: tuple[float, ...] = ()

    def describe(self) -> str:
        """A short human-readable form, such as "half[0:64]"."""
        return "none" if self.kind == "none" else f"{self.kind}[{self.start}:{self.start + self.dim}]"


def angle_table(spec: RopeSpec, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine of positions 0..length-1.

    Args:
        spec: A spec that rotates (kind is not "none").
        length: Number of positions.
        device: Where the tables are needed.

    Returns:
        Two float32 tensors of shape (length, spec.dim / 2), views of a cached table; do not write into them.
    """
    # Rounding up keeps the number of cached tables small while prompts grow.
    capacity = max(1024, 1 << (length - 1).bit_length())
    cos, sin = _cached_table(spec.frequencies, capacity, str(device))
    return cos[:length], sin[:length]


@lru_cache(maxsize=32)
def _cached_table(frequencies: tuple[float, ...], length: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = positions[:, None] * torch.tensor(frequencies, dtype=torch.float32, device=device)[None, :]
    return angles.cos(), angles.sin()


def rotate_(states: torch.Tensor, spec: RopeSpec, start: int) -> None:
    """Rotate position-free states to the positions start, start + 1, ..., in place.

    Args:
        states: Shape (..., tokens, head_dim), any floating dtype; the rotation is computed in float32.
        spec: What rotates; "none" leaves the tensor alone.
        start: Absolute position of the first token.
    """
    if spec.kind == "none":
        return
    tokens = states.shape[-2]
    cos, sin = angle_table(spec, start + tokens, states.device)
    for first in range(0, tokens, _CHUNK_TOKENS):
        last = min(tokens, first + _CHUNK_TOKENS)
        positions = slice(start + first, start + last)
        _rotate_chunk_(states[..., first:last, :], spec, cos[positions], sin[positions])


def unrotate(states: torch.Tensor, spec: RopeSpec, start: int = 0) -> torch.Tensor:
    """Take the position out of states computed at the positions start, start + 1, ...

    Args:
        states: Shape (..., tokens, head_dim); not modified.
        spec: What rotates.
        start: Absolute position of the first token.

    Returns:
        A new tensor of the same shape and dtype, computed in float32.
    """
    result = states.clone()
    if spec.kind != "none":
        tokens = states.shape[-2]
        cos, sin = angle_table(spec, start + tokens, states.device)
        _rotate_chunk_(result, spec, cos[start:], -sin[start:])
    return result


def _rotate_chunk_(states: torch.Tensor, spec: RopeSpec, cos: torch.Tensor, sin: torch.Tensor) -> None:
    rotated = states[..., spec.start : spec.start + spec.dim]
    if spec.kind == "half":
        first, second = rotated.chunk(2, dim=-1)
    else:
        first, second = rotated[..., 0::2], rotated[..., 1::2]
    if states.dtype == torch.float32:
        _turn_(first, second, cos, sin)
        return
    first32, second32 = first.float(), second.float()
    _turn_(first32, second32, cos, sin)
    first.copy_(first32)
    second.copy_(second32)


def _turn_(first: torch.Tensor, second: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """(first, second) <- (first cos - second sin, second cos + first sin), in place with one temporary."""
    cross = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(cross)
