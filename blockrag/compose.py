"""Compose: the KV states of independent blocks become one prompt's cache.

Each block is copied to its slot of the prompt's buffer, converted from its precision at rest, and its keys are turned
to their absolute positions. A stored block is only read, and can be dropped as soon as it is placed; the prompt's KV
states are never held twice.

Three ways lead there. On a GPU one kernel does all of it, and layers are written while the model already runs
(`blockrag.model.device_place`). On a CPU compiled code (`blockrag.kernels.place`) does all of it in one pass over a
block's bytes, for different blocks in different threads. Plain torch, which always works, copies all blocks first and
then turns a layer at a time, in chunks that stay in the processor's cache; that order is its fastest.

Source: Block-Attention, arXiv 2409.15355, section 2.3 (position re-encoding).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

from blockrag.kernels.place import CompiledPlacement, Rows
from blockrag.model.device_place import DevicePlacement
from blockrag.rope import RopeSpec, rotate_

if TYPE_CHECKING:
    import torch

    from blockrag.kernels.at_rest import AtRest
    from blockrag.model.cache import PromptCache
    from blockrag.model.device_pool import DevicePool
    from blockrag.quantize import StoredKV

__all__ = ["Composition", "LayerRopes"]


@dataclass(frozen=True, slots=True)
class LayerRopes:
    """What turns with position in one layer: its keys, its values (multi-head latent attention), or neither."""

    keys: RopeSpec
    values: RopeSpec


class Composition:
    """A run of consecutive blocks being placed behind what a cache already holds.

    Args:
        cache: The prompt's cache; it counts the run's tokens as seen from here on.
        num_tokens: Tokens of the whole run.
        ropes: What turns with position, per layer that keeps KV states.
        pool: Hot blocks on the cache's device.
        restarts: Positions in the run, ascending from its first, at which keys are turned as if the prompt began there:
            position 0, 1, ... anew. None turns them to their absolute positions, the method; the other is the paper's
            ablation, and takes a second pass over the keys.
    """

    def __init__(
        self,
        cache: PromptCache,
        num_tokens: int,
        ropes: Sequence[LayerRopes],
        pool: DevicePool[AtRest] | None = None,
        restarts: Sequence[int] | None = None,
    ) -> None:
        self._cache = cache
        self.start = cache.num_tokens
        self.num_layers = len(ropes)
        self._restarts, self._end = restarts, self.start + num_tokens
        # Keys and values of each layer in turn.
        self._rows: list[Rows] = []
        for layer, rope in zip(cache.kv_layers, ropes, strict=True):
            keys, values, start = _open_rows(layer, num_tokens, self.start)
            self._rows += (Rows(keys, start, rope.keys), Rows(values, start, rope.values))
        end, turned = self._end, self._rows
        if restarts is not None:
            self._rows = [replace(rows, rope=RopeSpec()) for rows in turned]
        self._turned = turned
        self._device = DevicePlacement.of(self._rows, end, pool)
        self._compiled = CompiledPlacement.of(self._rows, end) if self._device is None else None

    @property
    def in_threads(self) -> bool:
        """Whether placing different blocks from different threads is faster; torch brings its own threads."""
        return self._device is not None or self._compiled is not None

    def place(self, kv: StoredKV, position: int, layers: range | None = None) -> None:
        """Write a block to the positions position, position + 1, ...

        Different blocks, and different layers of one, may be placed from different threads.

        Args:
            kv: The block; only read.
            position: Absolute position of its first token, within the run.
            layers: A contiguous range of layers; all of them by default.
        """
        if self._device is not None:
            self._device.place(kv, [position], layers)
            return
        chosen = range(self.num_layers) if layers is None else layers
        if self._compiled is not None:
            self._compiled.place(kv, position, chosen)
            return
        for layer in chosen:
            _copy(kv.keys(layer), self._rows[2 * layer], position)
            _copy(kv.values(layer), self._rows[2 * layer + 1], position)

    def place_at(
        self,
        positions: Sequence[int],
        places: Sequence[int],
        kv: StoredKV,
        layers: range | None = None,
        *,
        key: str | None = None,
    ) -> None:
        """`place` a block that the run holds several times: at `positions[p]` for each p of `places`.

        With its key it stays in the pool.
        """
        if self._device is not None:
            self._device.place(kv, [positions[place] for place in places], layers, key)
            return
        for place in places:
            self.place(kv, positions[place], layers)

    def place_pooled(self, positions: Sequence[int], places: Sequence[int], key: str) -> bool:
        """`place_at` for a block that the pool has; False where it has not."""
        return self._device is not None and self._device.place_pooled(key, [positions[place] for place in places])

    def finish(self) -> None:
        """Make the run ready to attend to; once, after the last block has been placed."""
        if self._device is not None:
            may_defer = self._cache.may_defer and self._restarts is None
            self._device.finish([layer.defer for layer in self._cache.kv_layers] if may_defer else None)
        if self._restarts is not None:
            for first, end in pairwise([*self._restarts, self._end]):
                for rows in self._turned:
                    # A windowed layer may lack a block's first tokens.
                    kept = max(first, rows.start)
                    if kept < end:
                        rotate_(rows.states[:, kept - rows.start : end - rows.start], rows.rope, kept - first)
        elif self._device is None and self._compiled is None:
            for rows in self._rows:
                rotate_(rows.states, rows.rope, rows.start)


def _copy(states: torch.Tensor, rows: Rows, position: int) -> None:
    # A windowed layer keeps only the run's tail: the block's first tokens may lie before it.
    first, end = max(position, rows.start), position + states.shape[1]
    if first < end:
        rows.states[:, first - rows.start : end - rows.start].copy_(states[:, first - position :])


def _open_rows(layer: object, num_tokens: int, start: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """New rows of one layer's keys and values, each (heads, rows, dim), and the position of the first."""
    from blockrag.model.cache import GrowingSlidingLayer

    unseen = 0
    if isinstance(layer, GrowingSlidingLayer) and start == 0:
        unseen = max(0, num_tokens - (layer.sliding_window - 1))
        layer.skip(unseen)
    keys, values = layer.extend(num_tokens - unseen)  # type: ignore[attr-defined]
    return keys[0], values[0], start + unseen
