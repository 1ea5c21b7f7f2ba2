"""Composing as the method's published code does it: the baseline that a composed prompt is compared with.

Block-Attention (arXiv 2409.15355, section 2.3) re-encodes positions when blocks come together. Its released inference
server does it per request and per layer: the un-rotated keys and the values of all blocks are concatenated, the keys
are turned to their absolute positions in float32 with the usual transformers formula (`rotate_half`), and the result
is handed to `generate` as a dynamic cache, so that the query runs under transformers' own sdpa attention with a dense
mask, for which every key and value head is repeated once per query head of its group.

Written from that description. Left out, because they only cost time and are not the method: the server computes every
block anew for every request (here the blocks lie in memory, in the model's dtype, as the paper's table assumes), and
it rotates keys forth and back. The cache takes the concatenated tensors as they are, as that code did with the
transformers of its time; today's `DynamicCache.update` would copy them once more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from blockrag.errors import InputError
from blockrag.evaluation.speed.forward import dynamic_cache, query_logits
from blockrag.rope import angle_table

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from blockrag.model.profile import ModelProfile
    from blockrag.quantize import StoredKV
    from blockrag.rope import RopeSpec

__all__ = ["SeedBlocks"]


class SeedBlocks:
    """The KV states of one prompt's passages as separate tensors, and the published way from there to a token.

    Args:
        model: The model, in evaluation mode; set to transformers' own attention while `first_logits` runs.
        profile: Its profile.
        blocks: The passages' KV states, in prompt order; copied into the model's dtype.

    Raises:
        InputError: The model rotates something else than whole-head halves of its keys, or has windowed layers, which
            the published code does not handle.
    """

    def __init__(self, model: PreTrainedModel, profile: ModelProfile, blocks: Sequence[StoredKV]) -> None:
        self._model = model
        self._ropes = [rope.keys for rope in profile.regimes[0].ropes]
        if not seed_can_compose(profile):
            raise InputError(
                "the published way of composing handles keys that turn in halves and layers without windows; "
                "leave the mode 'seed' out for this model"
            )
        self._num_tokens = sum(block.num_tokens for block in blocks)
        self._keys = [self._placed(block.keys(layer) for block in blocks) for layer in range(len(self._ropes))]
        self._values = [self._placed(block.values(layer) for block in blocks) for layer in range(len(self._ropes))]
        if self._num_tokens:
            # Computed with the first prompt in any implementation, and kept.
            for spec in self._ropes:
                angle_table(spec, self._num_tokens, model.device)

    @torch.no_grad()
    def compose(self) -> DynamicCache:
        """The prompt's cache, from scratch."""
        if not self._num_tokens:
            return dynamic_cache([])
        states = []
        for spec, keys, values in zip(self._ropes, self._keys, self._values, strict=True):
            merged = torch.cat(keys, dim=-2)
            states.append((_rotated(merged, spec), torch.cat(values, dim=-2)))
        return dynamic_cache(states)

    def first_logits(self, query: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Logits (vocabulary,) behind the query; run it under `stock_attention`."""
        return query_logits(self._model, cache, query, self._num_tokens)

    def _placed(self, states: object) -> list[torch.Tensor]:
        return [
            one.to(device=self._model.device, dtype=self._model.dtype, copy=True)[None]
            for one in states  # type: ignore[attr-defined]
        ]


def seed_can_compose(profile: ModelProfile) -> bool:
    """Whether the published code's assumptions hold: rotated halves from the first dimension, no windows."""
    ropes = [rope for regime in profile.regimes for rope in regime.ropes]
    halves = all(r.keys.kind == "half" and r.keys.start == 0 and r.values.kind == "none" for r in ropes)
    whole = len(profile.regimes) == 1 and all(window is None for window in profile.structure.windows)
    return halves and whole and profile.structure.num_layers == len(profile.structure.indices)


def _rotated(keys: torch.Tensor, spec: RopeSpec) -> torch.Tensor:
    """Keys (1, heads, tokens, head_dim) turned to the positions 0, 1, ... in float32, as transformers writes it."""
    cos, sin = (torch.cat((table, table), dim=-1) for table in angle_table(spec, keys.shape[-2], keys.device))
    turning, still = keys[..., : spec.dim].float(), keys[..., spec.dim :]
    turned = (turning * cos + _rotate_half(turning) * sin).to(keys.dtype)
    return torch.cat((turned, still), dim=-1) if still.shape[-1] else turned


def _rotate_half(states: torch.Tensor) -> torch.Tensor:
    first, second = states.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)
