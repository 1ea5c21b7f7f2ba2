"""Prefill: the KV states of blocks, many blocks to a forward.

Blocks of similar length are padded on the right and run together. Causal attention means padding behind a block cannot
reach it, so no mask is needed and the fast causal kernel stays in use. Neither the language-model head nor what comes
behind the last layer's KV states is run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from blockrag.kv import BlockKV
from blockrag.model.capture import capture
from blockrag.rope import unrotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.model.profile import ModelProfile, Regime

__all__ = ["plan_batches", "prefill_batch", "prefill_blocks"]

# What a forward costs besides its tokens, as a part of the largest batch (measured: 2 to 3 ms, the time of 20 to 40
# tokens, for a model of 15 million parameters on two cores; less of a larger one).
_FORWARD_PART = 32


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group blocks of similar length into batches of at most `batch_tokens` padded tokens, longest first.

    Padding is computed and thrown away, and so is the time to start a forward. Of all ways to cut the sorted blocks
    into batches, the one with the least of both together is taken.

    Args:
        lengths: Tokens of each block.
        batch_tokens: Padded tokens per forward; a longer block gets a forward of its own.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    # From the shortest block on: what the blocks behind each cut cost, and where the batch that starts there ends.
    cost, ends = np.zeros(len(order) + 1), [0] * len(order)
    sizes = np.arange(1, len(order) + 1)
    for start in reversed(range(len(order))):
        # The first block of a batch is its longest and sets the padded length.
        longest = lengths[order[start]]
        most = max(1, min(batch_tokens // longest, len(order) - start))
        costs = cost[start + 1 : start + 1 + most] + sizes[:most] * longest
        best = int(costs.argmin())
        cost[start] = costs[best] + batch_tokens / _FORWARD_PART
        ends[start] = start + 1 + best
    batches, start = [], 0
    while start < len(order):
        batches.append(order[start : ends[start]])
        start = ends[start]
    return batches


def prefill_blocks(
    model: PreTrainedModel,
    profile: ModelProfile,
    regime: Regime,
    blocks: Sequence[Sequence[int]],
    *,
    batch_tokens: int,
) -> Iterator[tuple[int, BlockKV]]:
    """Compute the KV states of blocks, each on its own.

    Args:
        model: The model, in evaluation mode.
        profile: Its profile.
        regime: How it computes positions in the prompts the blocks are for.
        blocks: Token ids of each block, none of them empty.
        batch_tokens: Padded tokens per forward.

    Yields:
        The index of a block and its KV states with un-rotated keys, in the model's dtype on its device. Blocks come
        in the order of the batches.
    """
    for batch in plan_batches([len(block) for block in blocks], batch_tokens):
        yield from zip(batch, prefill_batch(model, profile, regime, [blocks[i] for i in batch]), strict=True)


@torch.no_grad()
def prefill_batch(
    model: PreTrainedModel, profile: ModelProfile, regime: Regime, blocks: Sequence[Sequence[int]]
) -> list[BlockKV]:
    """The KV states of blocks, as `prefill_blocks` gives them, from one forward."""
    ids = torch.zeros((len(blocks), max(map(len, blocks))), dtype=torch.long)
    for row, block in enumerate(blocks):
        ids[row, : len(block)] = torch.tensor(block, dtype=torch.long)
    size = profile.layout.elements_per_token
    cut = [
        BlockKV(profile.layout, len(block), torch.empty(size * len(block), dtype=model.dtype, device=model.device))
        for block in blocks
    ]

    def take(place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        ropes = regime.ropes[place]
        keys = unrotate(keys, ropes.keys, regime.offset)
        if ropes.values.kind != "none":
            values = unrotate(values, ropes.values, regime.offset)
        for row, kv in enumerate(cut):
            kv.keys(place).copy_(keys[row, :, : kv.num_tokens])
            kv.values(place).copy_(values[row, :, : kv.num_tokens])

    capture(model, profile.structure, ids, regime.offset, take, early=profile.captures_early)
    return cut
