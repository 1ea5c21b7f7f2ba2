"""One forward of a query behind a cache, and transformers' own attention for as long as a comparison needs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache, DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["dynamic_cache", "query_logits", "stock_attention"]


@torch.no_grad()
def query_logits(model: PreTrainedModel, cache: Cache, token_ids: Sequence[int], start: int) -> torch.Tensor:
    """Logits (vocabulary,) of the last of some tokens that see a cache and, causally, each other.

    Args:
        model: The model, in evaluation mode.
        cache: Grows by the tokens.
        token_ids: The tokens.
        start: Position of the first: the tokens that the cache has seen.
    """
    ids = torch.tensor([list(token_ids)], device=model.device)
    positions = torch.arange(start, start + len(token_ids), device=model.device)[None]
    output = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
    logits: torch.Tensor = output.logits[0, -1]
    return logits


@contextmanager
def stock_attention(model: PreTrainedModel) -> Iterator[None]:
    """The "sdpa" attention of transformers instead of the one that blockrag chose."""
    chosen = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


def dynamic_cache(states: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """The growing cache of transformers over given states, without copying them.

    Args:
        states: Keys and values of every layer, shapes (1, heads, tokens, head_dim).
    """
    cache = DynamicCache()
    for index, (keys, values) in enumerate(states):
        # An update with no tokens creates the layer; the states then take their place.
        cache.update(keys[:, :, :0], values[:, :, :0], index)
        cache.layers[index].keys, cache.layers[index].values = keys, values
    return cache
