"""Prefill: the KV states of blocks, many blocks to a forward.

Blocks of similar length are padded on the right and run together up to a token budget. Causal attention means padding
behind a block cannot reach it, so no mask is needed and the fast causal kernel stays in use. The language-model head is
not run: KV states do not need it, and on a small model it doubles the cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from blockrag.kv import BlockKV
from blockrag.model.capture import capture
from blockrag.rope import unrotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.model.profile import ModelProfile, Regime

__all__ = ["plan_batches", "prefill_blocks"]


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Group blocks of similar length into batches of at most `batch_tokens` padded tokens, longest first.

    Args:
        lengths: Tokens of each block.
        batch_tokens: Padded tokens per forward; a longer block gets a forward of its own.

    Returns:
        Indices into `lengths`, each exactly once.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        # The first block of a batch is its longest and sets the padded length.
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


@torch.no_grad()
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
        in the order of the batches; what was yielded may be dropped before the next is taken.
    """
    for batch in plan_batches([len(block) for block in blocks], batch_tokens):
        longest = len(blocks[batch[0]])
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        for row, index in enumerate(batch):
            ids[row, : len(blocks[index])] = torch.tensor(blocks[index], dtype=torch.long)
        layers = capture(model, profile.structure, ids, regime.offset, early=profile.captures_early)
        states = []
        for layer, ropes in zip(layers, regime.ropes, strict=True):
            states.append(
                (unrotate(layer.keys, ropes.keys, regime.offset), _position_free(layer.values, ropes, regime))
            )
            layer.keys = layer.values = None
        for row, index in enumerate(batch):
            yield index, _cut(profile, states, row, len(blocks[index]))


def _position_free(values: torch.Tensor, ropes: object, regime: Regime) -> torch.Tensor:
    spec = ropes.values  # type: ignore[attr-defined]
    return values if spec.kind == "none" else unrotate(values, spec, regime.offset)


def _cut(
    profile: ModelProfile, states: Sequence[tuple[torch.Tensor, torch.Tensor]], row: int, num_tokens: int
) -> BlockKV:
    """One block out of a padded batch, as one contiguous tensor."""
    pieces = [state[row, :, :num_tokens].reshape(-1) for pair in states for state in pair]
    return BlockKV(profile.layout, num_tokens, torch.cat(pieces))
