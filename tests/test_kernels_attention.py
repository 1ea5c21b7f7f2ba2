"""Compiled attention against attention written out in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from blockrag.kernels.attention import attend, takes, usable
from blockrag.kernels.build import library, why_not

pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled kernels here: {why_not()}")


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """In float64: (batch, queries, heads, value_dim); zeros for a query that sees nothing."""
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.double().repeat_interleave(groups, 1) for t in (key, value))
    scores = query.double() @ keys.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ values).transpose(1, 2)


def causal_mask(queries: int, tokens: int) -> torch.Tensor:
    return torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)[None, None]


def cache_view(generator: torch.Generator, batch: int, heads: int, tokens: int, dim: int) -> torch.Tensor:
    """The first tokens of a larger buffer; what lies behind them is not a number and must not be read."""
    buffer = torch.full((batch, heads, tokens + 9, dim), math.nan)
    buffer[:, :, :tokens] = torch.randn(batch, heads, tokens, dim, generator=generator)
    return buffer[:, :, :tokens]


def rows(generator: torch.Generator, batch: int, heads: int, queries: int, dim: int) -> torch.Tensor:
    """As a projection leaves them: the heads of a token beside each other."""
    return torch.randn(batch, queries, heads, dim, generator=generator).transpose(1, 2)


@settings(max_examples=100, deadline=None)
@given(
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    groups=st.sampled_from([1, 2, 4, 7]),
    queries=st.one_of(st.integers(1, 12), st.sampled_from([16, 25, 48, 50, 61])),
    more=st.one_of(st.integers(0, 70), st.sampled_from([128, 200, 1100])),
    dim=st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 96, 128])),
    value_dim=st.one_of(st.integers(1, 40), st.sampled_from([48, 64, 80, 128])),
    kind=st.sampled_from(["none", "causal", "mask", "causal and mask"]),
    mask_shape=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    seen=st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 1 << 16),
)
def test_it_is_the_reference(
    batch: int,
    kv_heads: int,
    groups: int,
    queries: int,
    more: int,
    dim: int,
    value_dim: int,
    kind: str,
    mask_shape: tuple[bool, bool, bool],
    seen: float,
    threads: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, tokens, scale = kv_heads * groups, queries + more, dim**-0.5
    query = rows(generator, batch, heads, queries, dim)
    key = cache_view(generator, batch, kv_heads, tokens, dim)
    value = cache_view(generator, batch, kv_heads, tokens, value_dim)
    mask = None
    if "mask" in kind:
        whole = [size if full else 1 for size, full in zip((batch, heads, queries), mask_shape, strict=True)]
        mask = torch.rand(*whole, tokens, generator=generator) < seen
    causal = "causal" in kind
    allowed = mask if not causal else causal_mask(queries, tokens) & (True if mask is None else mask)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert takes(query, key, value, mask) == usable()
        out = attend(query, key, value, mask, scale=scale, causal=causal)
        again = attend(query, key, value, mask, scale=scale, causal=causal)
    finally:
        torch.set_num_threads(before)
    assert out.shape == (batch, queries, heads, value_dim)
    assert out.is_contiguous()
    torch.testing.assert_close(out.double(), reference(query, key, value, allowed, scale), atol=3e-6, rtol=3e-6)
    assert torch.equal(out, again), "timing must not change the result"


@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "tokens", "dim", "value_dim"),
    [
        (6, 6, 50, 3000, 48, 48),
        (8, 2, 50, 2500, 64, 64),
        (2, 1, 50, 4000, 128, 128),
        (8, 2, 1, 5000, 64, 64),
        (1, 1, 1, 9000, 64, 64),
        (32, 1, 40, 700, 576, 512),  # more rows than a unit holds
        (4, 4, 3, 900, 192, 128),
    ],
)
def test_it_is_the_reference_at_length(
    threads: int, heads: int, kv_heads: int, queries: int, tokens: int, dim: int, value_dim: int
) -> None:
    generator = torch.Generator().manual_seed(0)
    query = rows(generator, 1, heads, queries, dim)
    key = cache_view(generator, 1, kv_heads, tokens, dim)
    value = cache_view(generator, 1, kv_heads, tokens, value_dim)
    expected = reference(query, key, value, causal_mask(queries, tokens), dim**-0.5)
    out = attend(query, key, value, scale=dim**-0.5, causal=True)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=2e-6)
    masked = attend(query, key, value, causal_mask(queries, tokens), scale=dim**-0.5)
    assert torch.equal(out, masked)


@pytest.mark.parametrize("queries", [1, 20])
@pytest.mark.parametrize("size", [1e-30, 1e2, 1e4])
def test_scores_of_any_size(threads: int, queries: int, size: float) -> None:
    """No overflow, no lost weight: rows of a float32 softmax over scores of up to +-`size`, as torch computes them."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 2, n, 16, generator=generator) for n in (queries, 1500, 1500))
    scale = size / float((query @ key.transpose(-1, -2)).abs().max())
    out = attend(query, key, value, scale=scale)
    expected = reference(query, key, value, None, scale)
    ours = (out.double() - expected).abs().max()
    torchs = scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2)
    assert out.isfinite().all()
    assert ours <= 2 * (torchs.double() - expected).abs().max() + 1e-6


def test_weights_are_a_softmax() -> None:
    """Values of one, and a maximum that comes late: what was summed before it is scaled down, not lost."""
    key = torch.linspace(-100, 100, 700)[None, None, :, None].contiguous()
    out = attend(torch.ones(1, 1, 30, 1), key, torch.ones(1, 1, 700, 5), scale=1.0)
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-6, rtol=0)


@pytest.mark.parametrize("queries", [3, 20, 40])
def test_a_query_that_sees_nothing_is_zero_and_harms_no_other(threads: int, queries: int) -> None:
    generator = torch.Generator().manual_seed(2)
    query, key, value = (torch.randn(2, 2, n, 16, generator=generator) for n in (queries, 900, 900))
    mask = torch.rand(2, 1, queries, 900, generator=generator) < 0.3
    mask[0, :, 1] = False
    mask[1, :, :, 128:512] = False
    key[1, :, 128:512] = value[1, :, 128:512] = math.nan  # whole tiles that nobody sees are not read
    out = attend(query, key, value, mask, scale=0.3)
    expected = reference(query, *(t.nan_to_num(0.0) for t in (key, value)), mask, 0.3)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    assert (out[0, 1] == 0).all()


@pytest.mark.parametrize("queries", [2, 20])
def test_what_is_not_a_number_stays_in_its_row(queries: int) -> None:
    query, key, value = (torch.randn(1, 2, n, 16) for n in (queries, 300, 300))
    query[0, 0, 1] = math.nan
    out = attend(query, key, value, scale=0.3)
    assert out[0, 1, 0].isnan().all()
    out[0, 1, 0] = 0
    assert out.isfinite().all()
    key[0, 1, 70] = math.nan
    out = attend(query, key, value, scale=0.3)
    assert out[0, :, 1].isnan().all()


@pytest.mark.skipif(not usable(), reason="vectors too short to be faster than torch")
def test_what_it_does_not_take() -> None:
    query, key, value = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 8)
    mask = torch.ones(1, 1, 3, 70, dtype=torch.bool)
    assert takes(query, key, value, mask)
    assert takes(query, key, value, mask.expand(1, 2, 3, 70))
    assert not takes(query.double(), key.double(), value.double())
    assert not takes(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert not takes(query, key, value, mask.float()), "a mask that is added to the scores"
    assert not takes(query, key, value, mask[..., :1].expand(1, 1, 3, 70)), "rows that are not contiguous"
    assert not takes(query, key.transpose(-1, -2).contiguous().transpose(-1, -2), value)
    assert not takes(query[:, :, :0], key, value)
    assert not takes(query.requires_grad_(), key, value)
    with torch.no_grad():
        assert takes(query, key, value)
    assert not takes(*(t.to("meta") for t in (query, key, value)))


def test_shapes_that_do_not_fit_are_refused() -> None:
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 70, 8), torch.randn(1, 2, 70, 5)
    for wrong in [
        (query[:, :3], key, value),
        (query, key[:, :, :69], value),
        (query[..., :7], key, value),
        (query.expand(2, 4, 3, 8), key, value),
    ]:
        with pytest.raises(ValueError, match="do not fit each other"):
            attend(*wrong, scale=1.0)
    with pytest.raises(ValueError, match=r"scale is -1\.0"):
        attend(query, key, value, scale=-1.0)
    with pytest.raises(ValueError, match="3 queries cannot be the last of 2 tokens"):
        attend(query, key[:, :, :2], value[:, :, :2], scale=1.0, causal=True)
