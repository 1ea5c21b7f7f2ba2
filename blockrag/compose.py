"""Compose: the KV states of independent blocks become one prompt's cache.

Placing copies a block into its slot of the prompt's buffer; when all blocks of a run are placed, each layer's keys
are turned to their absolute positions in one float32 pass, in place. That order (copy all, then rotate a layer at a
time) is the fastest in plain torch, and it never holds a second copy of the prompt: a block can be dropped as soon as
it is placed. A stored block is only read.

Source: Block-Attention, arXiv 2409.15355, section 2.3 (position re-encoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag.rope import RopeSpec, rotate_

if TYPE_CHECKING:
    import torch

    from blockrag.kv import BlockKV
    from blockrag.model.cache import PromptCache

__all__ = ["Composition", "LayerRopes"]


@dataclass(frozen=True, slots=True)
class LayerRopes:
    """What turns with position in one layer: its keys, its values (multi-head latent attention), or neither."""

    keys: RopeSpec
    values: RopeSpec


@dataclass(frozen=True, slots=True)
class _Slot:
    """The new rows of one layer, and the position of the first of them."""

    keys: torch.Tensor  # (key_heads, rows, key_dim)
    values: torch.Tensor  # (value_heads, rows, value_dim)
    start: int


class Composition:
    """A run of consecutive blocks being placed behind what a cache already holds.

    Args:
        cache: The prompt's cache; it counts the run's tokens as seen from here on.
        num_tokens: Tokens of the whole run.
        ropes: What turns with position, per layer that keeps KV states.
    """

    def __init__(self, cache: PromptCache, num_tokens: int, ropes: Sequence[LayerRopes]) -> None:
        self.start = cache.num_tokens
        self._ropes = ropes
        self._slots = [_open_slot(layer, num_tokens, self.start) for layer in cache.kv_layers]

    def place(self, kv: BlockKV, position: int) -> None:
        """Copy a block to the positions position, position + 1, ...; keys stay un-rotated until `rotate`.

        Different blocks may be placed from different threads.
        """
        for index, slot in enumerate(self._slots):
            # A windowed layer keeps only the run's tail: the block's first tokens may lie before it.
            first = max(position, slot.start)
            if first < position + kv.num_tokens:
                rows = slice(first - slot.start, position + kv.num_tokens - slot.start)
                slot.keys[:, rows].copy_(kv.keys(index)[:, first - position :])
                slot.values[:, rows].copy_(kv.values(index)[:, first - position :])

    def rotate(self) -> None:
        """Turn everything placed to its absolute position; once, after the last block."""
        for slot, ropes in zip(self._slots, self._ropes, strict=True):
            rotate_(slot.keys, ropes.keys, slot.start)
            rotate_(slot.values, ropes.values, slot.start)


def _open_slot(layer: object, num_tokens: int, start: int) -> _Slot:
    from blockrag.model.cache import GrowingSlidingLayer

    unseen = 0
    if isinstance(layer, GrowingSlidingLayer) and start == 0:
        unseen = max(0, num_tokens - (layer.sliding_window - 1))
        layer.skip(unseen)
    keys, values = layer.extend(num_tokens - unseen)  # type: ignore[attr-defined]
    return _Slot(keys[0], values[0], start + unseen)
