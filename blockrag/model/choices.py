"""What a caller may choose of a `BlockModel`, checked where it comes in."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from blockrag.codec import Precision
from blockrag.errors import InputError
from blockrag.model.running import OnMiss

__all__ = [
    "Attention",
    "checked_attention",
    "checked_bytes",
    "checked_on_miss",
    "checked_precision",
    "default_precision",
]

Attention = Literal["block", "full"]
"""block: prompts are composed from stored blocks. full: they are prefilled whole."""


def checked_attention(attention: Attention) -> Attention:
    """It.

    Raises:
        InputError: There is no such attention.
    """
    if attention not in get_args(Attention):
        raise InputError(f'attention={attention!r} is neither "block" nor "full"')
    return attention


def checked_on_miss(on_miss: OnMiss) -> OnMiss:
    """It.

    Raises:
        InputError: There is no such choice.
    """
    if on_miss not in get_args(OnMiss):
        raise InputError(f"on_miss={on_miss!r} is not one of {', '.join(map(repr, get_args(OnMiss)))}")
    return on_miss


def checked_bytes(kept_bytes: int | None) -> int | None:
    """It.

    Raises:
        InputError: It is negative.
    """
    if kept_bytes is not None and kept_bytes < 0:
        raise InputError(f"kept_bytes={kept_bytes!r} is negative; pass 0 to keep no prompts")
    return kept_bytes


def checked_precision(precision: Precision) -> Precision:
    """It.

    Raises:
        InputError: There is no such precision.
    """
    if precision not in get_args(Precision):
        raise InputError(f"precision={precision!r} is not one of {', '.join(map(repr, get_args(Precision)))}")
    return precision


def default_precision(dtype: torch.dtype) -> Precision:
    """Precision at rest of a model that computes in `dtype`, unless another is asked for."""
    # float16 keeps three bits more than bfloat16; a block beyond its range is stored as float32 instead.
    return "bfloat16" if dtype == torch.bfloat16 else "float16"
