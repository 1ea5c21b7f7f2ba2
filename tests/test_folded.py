"""Folded grouped-query attention against attention written out, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import prompt_of
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers import AttentionInterface

from blockrag.errors import UnsupportedModelError
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.folded import FOLDED_ATTENTION, folded_attention

MODULE = torch.nn.Identity()


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float | None
) -> torch.Tensor:
    """Softmax attention in float64, a query head at a time: (batch, queries, heads, value_dim)."""
    batch, heads, queries, dim = query.shape
    groups = heads // key.shape[1]
    out = torch.empty(batch, queries, heads, value.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for head in range(heads):
            scores = query[b, head].double() @ key[b, head // groups].double().T
            scores = scores * (1 / math.sqrt(dim) if scaling is None else scaling)
            if mask is not None:
                allowed = mask[b % mask.shape[0], head % mask.shape[1]]
                scores = scores.masked_fill(~allowed, -math.inf)
            out[b, :, head] = scores.softmax(-1) @ value[b, head // groups].double()
    return out


def tensors(
    heads: int, kv_heads: int, queries: int, tokens: int, *, batch: int = 1, dim: int = 8, value_dim: int = 8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(heads * 1000 + queries * 10 + tokens)
    return (
        torch.randn(batch, heads, queries, dim, generator=generator),
        torch.randn(batch, kv_heads, tokens, dim, generator=generator),
        torch.randn(batch, kv_heads, tokens, value_dim, generator=generator),
    )


def random_mask(batch: int, mask_heads: int, queries: int, tokens: int, seed: int = 0) -> torch.Tensor:
    mask = torch.rand(batch, mask_heads, queries, tokens, generator=torch.Generator().manual_seed(seed)) < 0.5
    mask[..., 0] = True  # every row sees something
    return mask


HEADS = [(4, 4), (4, 2), (4, 1), (6, 2), (1, 1)]


@settings(max_examples=120, deadline=None)
@given(
    heads=st.sampled_from(HEADS),
    queries=st.integers(1, 6),
    more=st.integers(0, 6),
    batch=st.integers(1, 3),
    kind=st.sampled_from(["shared", "per-head", "broadcast-batch"]),
    value_dim=st.sampled_from([8, 5]),
    scaling=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 20),
)
def test_masked_attention_is_the_reference(
    heads: tuple[int, int],
    queries: int,
    more: int,
    batch: int,
    kind: str,
    value_dim: int,
    scaling: float | None,
    seed: int,
) -> None:
    query, key, value = tensors(*heads, queries, queries + more, batch=batch, value_dim=value_dim)
    mask_heads = heads[0] if kind == "per-head" else 1
    mask = random_mask(1 if kind == "broadcast-batch" else batch, mask_heads, queries, queries + more, seed)
    out, weights = folded_attention(MODULE, query, key, value, mask, scaling=scaling)
    assert weights is None
    assert out.shape == (batch, queries, heads[0], value_dim)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(query, key, value, mask, scaling), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("queries", [1, 5])
def test_without_a_mask_it_is_causal(heads: tuple[int, int], queries: int) -> None:
    """One query sees everything in the cache; several without a mask are a whole prompt."""
    query, key, value = tensors(*heads, queries, 9 if queries == 1 else queries)
    out, _ = folded_attention(MODULE, query, key, value, None)
    causal = torch.ones(queries, key.shape[2]).tril(key.shape[2] - queries).bool()[None, None]
    torch.testing.assert_close(out.double(), reference(query, key, value, causal, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("heads", HEADS)
def test_not_causal_without_a_mask(heads: tuple[int, int]) -> None:
    query, key, value = tensors(*heads, 4, 6)
    expected = reference(query, key, value, None, None)
    out, _ = folded_attention(MODULE, query, key, value, None, is_causal=False)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)
    module = torch.nn.Identity()
    module.is_causal = False  # type: ignore[assignment]
    out, _ = folded_attention(module, query, key, value, None)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_a_mask_outranks_causality() -> None:
    query, key, value = tensors(4, 2, 4, 4)
    everything = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    out, _ = folded_attention(MODULE, query, key, value, everything, is_causal=True)
    torch.testing.assert_close(out.double(), reference(query, key, value, everything, None), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias", "cache"])
def test_what_it_does_not_compute_is_refused(name: str) -> None:
    query, key, value = tensors(4, 2, 2, 2)
    with pytest.raises(ValueError, match=f"does not implement {name}"):
        folded_attention(MODULE, query, key, value, None, **{name: 1.0})
    out, _ = folded_attention(MODULE, query, key, value, None, **{name: None}, sliding_window=4)
    assert out.shape == (1, 2, 4, 8)


def test_it_is_registered_with_transformers() -> None:
    assert AttentionInterface()[FOLDED_ATTENTION] is folded_attention


@pytest.mark.parametrize(
    ("case", "attention"),
    [
        (ModelCase("llama", "llama"), FOLDED_ATTENTION),
        (ModelCase("gemma2", "gemma2"), "eager"),
        (ModelCase("gpt-oss", "gpt_oss"), "eager"),
    ],
    ids=["llama", "gemma2-softcap", "gpt-oss-sinks"],
)
def test_each_model_gets_the_fastest_exact_attention(case: ModelCase, attention: str) -> None:
    model = BlockModel(tiny_model(case), plain_tokenizer(), facts=BlockAttentionFacts(block_fine_tuned=True))
    assert model.profile is not None
    assert model.profile.attention == attention
    assert model.model.config._attn_implementation == attention


def test_a_model_that_no_attention_runs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing left to fall back to: the message carries the last reason and the way out."""
    model = tiny_model(ModelCase("llama", "llama"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no kernel for this shape")

    monkeypatch.setattr(model.base_model, "forward", refuse)
    with pytest.raises(UnsupportedModelError, match=r'no kernel for this shape.*attention="full"'):
        BlockModel(model, plain_tokenizer())


def test_a_model_that_mixes_tokens_elsewhere_is_refused() -> None:
    """Keys and values pass the shift probe, but the last layer's output leaks between tokens: composing is inexact."""
    model = tiny_model(ModelCase("llama", "llama"))
    norm = model.base_model.norm
    norm.register_forward_hook(lambda module, inputs, output: output + output.roll(1, dims=1))
    with pytest.raises(UnsupportedModelError, match=r"differs from one forward under the block mask by .* with eager"):
        BlockModel(model, plain_tokenizer())
    full = BlockModel(model, plain_tokenizer(), attention="full")
    assert full.profile is None
    with pytest.raises(UnsupportedModelError, match='was loaded with attention="full"'):
        full.stream(prompt_of((3,), 2), attention="block")
