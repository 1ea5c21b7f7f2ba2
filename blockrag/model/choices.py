"""What a caller may choose of a `BlockModel`, checked where it comes in."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

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

T = TypeVar("T")

Attention = Literal["block", "full"]
"""block: prompts are composed from stored blocks. full: they are prefilled whole."""


def checked_attention(attention: Attention) -> Attention:
    """`attention`, if there is such a one; InputError otherwise."""
    return _one_of("attention", attention, get_args(Attention))


def checked_on_miss(on_miss: OnMiss) -> OnMiss:
    """`on_miss`, if there is such a choice; InputError otherwise."""
    return _one_of("on_miss", on_miss, get_args(OnMiss))


def checked_precision(precision: Precision) -> Precision:
    """`precision`, if blocks can be kept in it; InputError otherwise."""
    return _one_of("precision", precision, get_args(Precision))


def checked_bytes(kept_bytes: int | None) -> int | None:
    """`kept_bytes`, if it is not negative; InputError otherwise."""
    if kept_bytes is not None and kept_bytes < 0:
        raise InputError(f"kept_bytes={kept_bytes!r} is negative; pass 0 to keep no prompts")
    return kept_bytes


def default_precision(dtype: torch.dtype) -> Precision:
    """Precision at rest of a model that computes in `dtype`, unless another is asked for."""
    # float16 keeps three bits more than bfloat16; a block beyond its range is stored as float32 instead.
    return "bfloat16" if dtype == torch.bfloat16 else "float16"


def _one_of(name: str, value: T, choices: tuple[T, ...]) -> T:
    if value not in choices:
        raise InputError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
    return value
