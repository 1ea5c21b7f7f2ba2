"""Grouped-query attention without repeating keys, registered with transformers as "blockrag_folded".

Under a mask, transformers copies every key and value head once per query head before it calls the attention kernel
(`repeat_kv`): 3.5 times the cost of the attention itself at 32 query and 8 key heads. Folding the query heads of a
group into the query axis computes the same products over the keys as they lie in the cache.

On a CPU the compiled kernel does the work where there is one, and needs no mask for what is plainly causal.

What it does not implement (soft-capping, attention sinks, position biases) it refuses, so that the probe at load time
falls back to the model's own attention instead of computing something else.
API: https://huggingface.co/docs/transformers/attention_interface
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function, sdpa_mask

from blockrag.kernels.attention import attend, takes, usable

__all__ = ["FOLDED_ATTENTION", "folded_attention", "folded_mask"]

FOLDED_ATTENTION = "blockrag_folded"

# Passed by some models to every attention function; those that change the result must not be ignored.
_UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache")


def folded_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """Attention with transformers' calling convention.

    Args:
        module: The attention layer; its `is_causal` is used when the argument is None.
        query: Shape (batch, heads, queries, head_dim).
        key: Shape (batch, kv_heads, tokens, head_dim); `heads` is a multiple of `kv_heads`.
        value: Shape (batch, kv_heads, tokens, value_dim).
        attention_mask: Bool, shape (batch, 1 or heads, queries, tokens), or None for plain causal attention: the
            last query sees every token.
        dropout: Dropout probability.
        scaling: Factor on the scores; None for 1/sqrt(head_dim).
        is_causal: Whether a missing mask means causal.
        **kwargs: Whatever else the model passes; see Raises.

    Returns:
        Shape (batch, queries, heads, value_dim), and None for the attention weights.

    Raises:
        ValueError: The model asks for something this function does not compute.
    """
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"{FOLDED_ATTENTION} does not implement {name}; use the model's own attention")
    batch, heads, queries, dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
    causal = causal and attention_mask is None and queries > 1
    scale = dim**-0.5 if scaling is None else scaling
    if dropout == 0 and scale > 0 and takes(query, key, value, attention_mask):
        return attend(query, key, value, attention_mask, scale=scale, causal=causal), None
    if causal and queries != key.shape[2]:
        # Torch's own causal attention lines up the first query with the first token, not the last with the last.
        attention_mask, causal = _causal_mask(queries, key.shape[2], query.device), False
    if groups == 1 or causal:
        output = scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=attention_mask,
            dropout_p=dropout,
            scale=scale,
            is_causal=causal,
            enable_gqa=groups > 1,
        )
    else:
        folded = query.reshape(batch, kv_heads, groups * queries, dim)
        mask = _fold_mask(attention_mask, kv_heads, groups)
        output = scaled_dot_product_attention(folded, key, value, attn_mask=mask, dropout_p=dropout, scale=scale)
        output = output.reshape(batch, heads, queries, value.shape[-1])
    return output.transpose(1, 2).contiguous(), None


def _fold_mask(mask: torch.Tensor | None, kv_heads: int, groups: int) -> torch.Tensor | None:
    """(batch, 1 or heads, queries, tokens) -> (batch, 1 or kv_heads, groups * queries, tokens)."""
    if mask is None or mask.shape[-2] == 1 == mask.shape[1]:
        return mask
    batch, mask_heads, queries, tokens = mask.shape
    if mask_heads == 1:
        return mask.repeat(1, 1, groups, 1)
    return mask.reshape(batch, kv_heads, groups * queries, tokens)


def _causal_mask(queries: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.ones(queries, tokens, dtype=torch.bool, device=device).tril(tokens - queries)[None, None]


def folded_mask(**arguments: Any) -> torch.Tensor | None:
    """What transformers asks for once per forward: a mask for `folded_attention`.

    Args:
        **arguments: Those of transformers' `sdpa_mask`, which makes every mask but one: where the compiled kernel will
            run and the mask is plainly causal, there is none to be made. At 50 queries over 32K tokens reading it is
            a tenth of the attention.

    Returns:
        Bool, shape (batch, 1, queries, tokens), or None where `folded_attention` needs none.
    """
    if _plainly_causal(arguments):
        return None
    mask: torch.Tensor | None = sdpa_mask(**arguments)
    queries, tokens = arguments.get("q_length"), arguments.get("kv_length")
    if mask is None and queries != 1 and queries != tokens:
        # A static cache: its last tokens are not there yet, and the first query is the first token.
        mask = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    return mask


def _plainly_causal(arguments: dict[str, Any]) -> bool:
    """Whether the last query sees every token, the one before it all but the last, and so on; False when unsure."""
    if not usable() or torch.device(arguments.get("device", "cpu")).type != "cpu":
        return False
    if arguments.get("dtype") is not torch.float32 or not arguments.get("allow_is_causal_skip", True):
        return False
    try:
        queries, tokens = arguments["q_length"], arguments["kv_length"]
        before, dropped = arguments["q_offset"], arguments["kv_offset"]
    except KeyError:
        return False
    if not isinstance(before, int) or before + queries != dropped + tokens:
        return False
    window, padding = arguments.get("local_size"), arguments.get("attention_mask")
    if window is None and arguments.get("mask_function", causal_mask_function) is not causal_mask_function:
        return False
    if window is not None and tokens >= window:
        return False
    return padding is None or (padding.shape[-1] == before + queries and bool(padding.all()))


AttentionInterface.register(FOLDED_ATTENTION, folded_attention)
AttentionMaskInterface.register(FOLDED_ATTENTION, folded_mask)
