"""The compiled product of few rows against float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.kernels import linear
from blockrag.kernels.build import library, why_not
from blockrag.kernels.linear import multiply, takes

pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled kernels here: {why_not()}")


@settings(max_examples=120, deadline=None)
@given(
    rows=st.one_of(st.integers(1, 70), st.sampled_from([96, 128])),
    in_features=st.one_of(st.integers(1, 80), st.sampled_from([128, 288, 1000])),
    out_features=st.one_of(st.integers(1, 50), st.sampled_from([256, 500])),
    bias=st.booleans(),
    seed=st.integers(0, 1 << 16),
)
def test_it_is_the_product(rows: int, in_features: int, out_features: int, bias: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(1, rows, in_features, generator=generator)
    weight = torch.randn(out_features, in_features, generator=generator) / math.sqrt(in_features)
    offset = torch.randn(out_features, generator=generator) if bias else None
    expected = states.double() @ weight.double().T + (0 if offset is None else offset.double())
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(multiply(states, weight, offset))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(results[0].double(), expected, atol=3e-6, rtol=3e-6)
    assert results[0].shape == (1, rows, out_features)
    assert all(torch.equal(result, results[0]) for result in results), "threads do not change the result"


@pytest.mark.parametrize("rows", [1, 3, 20, 51])
def test_wide_layers_lose_no_more_than_torch(rows: int) -> None:
    """Sums of thousands of products, taken in pieces: at most three times the error of torch's own product."""
    generator = torch.Generator().manual_seed(rows)
    states, weight = (torch.randn(n, 8192, generator=generator) for n in (rows, 300))
    expected = states.double() @ weight.double().T
    torchs = (torch.nn.functional.linear(states, weight).double() - expected).abs().max()
    assert (multiply(states, weight).double() - expected).abs().max() <= 3 * torchs


@pytest.mark.parametrize("rows", [2, 19])
def test_what_is_not_a_number_stays_in_its_row(rows: int) -> None:
    states, weight = torch.randn(rows, 40), torch.randn(30, 40)
    states[1, 3] = math.nan
    out = multiply(states, weight)
    assert out[1].isnan().all()
    out[1] = 0
    assert out.isfinite().all()


def test_what_it_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight = torch.randn(1, 5, 16), torch.randn(8, 16)
    assert not takes(states, weight, None), "gradients are on"
    with torch.no_grad():
        # Without AVX-512 it takes nothing.
        taken = takes(states, weight, None)
        assert taken == bool(library().blockrag_linear_pays(torch.get_num_threads()))  # type: ignore[union-attr]
        assert takes(states, weight, torch.zeros(8)) == taken
        assert not takes(states.double(), weight.double(), None)
        assert not takes(states.bfloat16(), weight.bfloat16(), None)
        assert not takes(states.expand(40, 5, 16)[:, :, :16], weight, None), "many rows"
        assert not takes(states, torch.randn(16, 8).T, None), "weights that lie the other way"
        assert not takes(states.transpose(1, 2), torch.randn(8, 5), None)
        assert not takes(states[:, :0], weight, None)
        assert not takes(states.to("meta"), weight.to("meta"), None)
        monkeypatch.setattr(linear, "library", lambda: None)
        assert not takes(states, weight, None)


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        multiply(torch.randn(2, 5), torch.randn(8, 16))
    with pytest.raises(ValueError, match="do not fit"):
        multiply(torch.randn(2, 16), torch.randn(8, 16), torch.zeros(7))
