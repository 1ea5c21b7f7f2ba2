"""`BlockKV`: the key/value states of one block, and the arithmetic of their size.

A block's KV states are one contiguous one-dimensional tensor, layer after layer, keys before values:

    layer 0 keys  [key_heads, tokens, key_dim]
    layer 0 values [value_heads, tokens, value_dim]
    layer 1 keys  ...

For a model whose layers are alike this is exactly a contiguous `[layers, 2, kv_heads, tokens, head_dim]`. Models
whose layers differ (multi-head latent attention, mixed head sizes) need only the per-layer offsets `KVLayout` gives.

Keys are kept *without* position, so that one stored copy serves every place in every prompt. Nothing here knows how
a rotation is done, where bytes are kept, or what a model is.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from blockrag.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = ["BlockKV", "KVLayout", "LayerShape", "explain_unfit"]


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Heads and sizes of one layer's KV states; keys and values may differ (multi-head latent attention)."""

    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int

    @property
    def key_size(self) -> int:
        """Key elements per token."""
        return self.key_heads * self.key_dim

    @property
    def value_size(self) -> int:
        """Value elements per token."""
        return self.value_heads * self.value_dim

    @property
    def size(self) -> int:
        """Elements per token, keys and values."""
        return self.key_size + self.value_size


@dataclass(frozen=True)
class KVLayout:
    """The shapes of a model's KV states, layer by layer."""

    layers: tuple[LayerShape, ...]

    def __hash__(self) -> int:
        """Counted once: layouts are looked up for every block that is read."""
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(self.layers)

    @property
    def num_layers(self) -> int:
        """Number of layers that keep KV states (models that share them between layers keep fewer)."""
        return len(self.layers)

    @cached_property
    def elements_per_token(self) -> int:
        """Elements of one token over all layers, keys and values."""
        return sum(layer.size for layer in self.layers)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Elements per token before each layer; times the number of tokens, the layer's offset in the tensor."""
        offsets, total = [], 0
        for layer in self.layers:
            offsets.append(total)
            total += layer.size
        return tuple(offsets)

    def nbytes(self, num_tokens: int, itemsize: int) -> int:
        """Bytes of a block of `num_tokens` tokens at `itemsize` bytes per element."""
        return self.elements_per_token * num_tokens * itemsize


@dataclass(frozen=True, eq=False)
class BlockKV:
    """The KV states of one block, with keys un-rotated. Immutable by contract: nobody writes into `data`.

    Args:
        layout: The model's layer shapes.
        num_tokens: Tokens in the block, at least one.
        data: One-dimensional contiguous tensor of `layout.elements_per_token * num_tokens` elements.

    Raises:
        InputError: `data` has another shape than the layout and the number of tokens require.
    """

    layout: KVLayout
    num_tokens: int
    data: torch.Tensor

    def __post_init__(self) -> None:
        expected = self.layout.elements_per_token * self.num_tokens
        if self.num_tokens < 1 or self.data.ndim != 1 or self.data.numel() != expected:
            raise InputError(
                f"KV states of {self.num_tokens} tokens need a one-dimensional tensor of {expected} elements, "
                f"got shape {tuple(self.data.shape)}; build it with the same KVLayout"
            )

    def keys(self, layer: int) -> torch.Tensor:
        """Un-rotated keys of one layer, a view of shape (key_heads, tokens, key_dim)."""
        shape = self.layout.layers[layer]
        start = self.layout.offsets[layer] * self.num_tokens
        flat = self.data[start : start + shape.key_size * self.num_tokens]
        return flat.view(shape.key_heads, self.num_tokens, shape.key_dim)

    def values(self, layer: int) -> torch.Tensor:
        """Values of one layer, a view of shape (value_heads, tokens, value_dim)."""
        shape = self.layout.layers[layer]
        start = self.layout.offsets[layer] * self.num_tokens + shape.key_size * self.num_tokens
        flat = self.data[start : start + shape.value_size * self.num_tokens]
        return flat.view(shape.value_heads, self.num_tokens, shape.value_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the KV states."""
        return self.data.numel() * self.data.element_size()


def explain_unfit(kv: BlockKV, precision: str, dtype: torch.dtype, divisor: float = 1, *, wider: str) -> str:
    """Why a block cannot be kept: its first layer with a number that is not finite at rest, and what to do about it.

    Args:
        kv: The block.
        precision: The name of the precision at rest.
        dtype: What numbers, divided by `divisor`, are converted to.
        divisor: 1, or the largest integer of a quantisation.
        wider: Precisions that hold more.
    """
    import torch

    for layer in range(kv.layout.num_layers):
        for name, part in (("keys", kv.keys(layer)), ("values", kv.values(layer))):
            if part.numel() == 0 or bool((part / divisor).to(dtype).isfinite().all()):
                continue
            if not bool(part.isfinite().all()):
                return (
                    f"layer {layer}: the {name} hold NaN or infinity, the model's numbers broke down; "
                    "compute in float32 or bfloat16 and check the weights"
                )
            largest, limit = float(part.abs().max()), torch.finfo(dtype).max * divisor
            return f"layer {layer}: the {name} reach {largest:.6g}, {precision} holds {limit:.6g}; use {wider}"
    return "the KV states changed while they were encoded; encode from one thread"
