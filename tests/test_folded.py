"""Folded grouped-query attention against attention written out, and what it refuses."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import LENGTHS, Make, assert_exact, oracle_greedy, prompt_of
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers import AttentionInterface, StaticCache
from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

from blockrag.errors import UnsupportedModelError
from blockrag.kernels import build
from blockrag.kernels.attention import usable
from blockrag.kernels.build import library, why_not
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.folded import FOLDED_ATTENTION, folded_attention, folded_mask
from blockrag.model.sampling import GenerationOptions

MODULE = torch.nn.Identity()


@pytest.fixture(params=["compiled", "torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """With the compiled kernels, and without."""
    monkeypatch.setenv("BLOCKRAG_CPU_KERNELS", "auto" if request.param == "compiled" else "off")
    build._outcome.cache_clear()
    if request.param == "compiled" and library() is None:
        pytest.skip(f"no compiled kernels here: {why_not()}")
    yield request.param
    build._outcome.cache_clear()


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


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize(("queries", "tokens"), [(1, 9), (5, 5), (5, 9), (40, 70)])
def test_without_a_mask_it_is_causal(heads: tuple[int, int], queries: int, tokens: int) -> None:
    """The last query sees everything in the cache."""
    query, key, value = tensors(*heads, queries, tokens)
    out, _ = folded_attention(MODULE, query, key, value, None)
    causal = torch.ones(queries, tokens).tril(tokens - queries).bool()[None, None]
    torch.testing.assert_close(out.double(), reference(query, key, value, causal, None), atol=1e-5, rtol=0)


def test_gradients_flow(kernels: str) -> None:
    """Training never meets the compiled kernel, which has no backward."""
    query, key, value = (t.requires_grad_() for t in tensors(4, 2, 5, 9))
    out, _ = folded_attention(MODULE, query, key, value, None)
    out.sum().backward()
    assert query.grad is not None
    assert key.grad is not None
    assert key.grad.abs().max() > 0


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


@settings(max_examples=150, deadline=None)
@given(
    batch=st.integers(1, 2),
    queries=st.integers(1, 9),
    before=st.integers(0, 9),
    dropped=st.integers(0, 3),
    window=st.sampled_from([None, 1, 4, 12, 40]),
    padding=st.sampled_from(["none", "ones", "left", "long"]),
    skip=st.booleans(),
)
def test_the_mask_is_transformers_mask(
    batch: int, queries: int, before: int, dropped: int, window: int | None, padding: str, skip: bool
) -> None:
    """The same mask, or none where the mask is that of causal attention over all tokens."""
    dropped = min(dropped, before)
    tokens = before + queries - dropped
    arguments: dict[str, Any] = {
        "batch_size": batch,
        "q_length": queries,
        "kv_length": tokens,
        "q_offset": before,
        "kv_offset": dropped,
        "allow_is_causal_skip": skip,
        "dtype": torch.float32,
        "device": torch.device("cpu"),
    }
    if window is not None:
        arguments |= {"local_size": window, "mask_function": sliding_window_causal_mask_function(window)}
    if padding != "none":
        arguments["attention_mask"] = torch.ones(batch, before + queries + (padding == "long"), dtype=torch.bool)
        arguments["attention_mask"][0, 0] = padding != "left"
    expected = sdpa_mask(**{**arguments, "allow_is_causal_skip": False})
    actual = folded_mask(**arguments)
    if actual is None:
        actual = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries).expand_as(expected)
        assert skip
    assert torch.equal(actual, expected)


def test_a_plain_mask_is_not_made_for_the_compiled_kernel(kernels: str) -> None:
    arguments: dict[str, Any] = {"batch_size": 1, "q_length": 5, "kv_length": 9, "q_offset": 4, "kv_offset": 0}
    mask = folded_mask(**arguments, dtype=torch.float32)
    assert (mask is None) == (kernels == "compiled" and usable())
    assert folded_mask(**arguments, dtype=torch.bfloat16) is not None
    other = folded_mask(**arguments, dtype=torch.float32, mask_function=lambda b, h, q, k: q >= k)
    assert other is not None, "a mask that it does not know is made"


def test_a_static_cache_sees_only_what_is_there(kernels: str) -> None:
    """Its keys are as long as the cache will ever be, and transformers would leave the mask out."""
    model = tiny_model(ModelCase("llama", "llama"))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        model.set_attn_implementation("eager")
        expected = model(ids).logits
        model.set_attn_implementation(FOLDED_ATTENTION)
        cache = StaticCache(config=model.config, max_cache_len=20)
        actual = model(ids, past_key_values=cache).logits
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("case", ["llama", "qwen3", "mistral", "gemma3", "deepseek-v3"])
def test_composed_is_exact_with_and_without_compiled_kernels(case: str, make_model: Make) -> None:
    """Grouped queries, windows, two kinds of layers, latent attention; blocks longer than a tile of tokens."""
    model = make_model(case)
    assert model.profile is not None
    assert model.profile.attention == FOLDED_ATTENTION
    for prompt in (prompt_of(LENGTHS, 6), prompt_of((70, 3, 100), 30), prompt_of((130,), 1)):
        assert_exact(model, prompt)
    options = GenerationOptions(max_new_tokens=6, ignore_eos=True)
    assert list(model.generate(prompt, options).token_ids) == oracle_greedy(model, prompt, 6)


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
