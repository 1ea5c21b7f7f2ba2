"""Rotation against an independent float64 reference, at every border the implementation has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag import rope
from blockrag.rope import RopeKind, RopeSpec, angle_table, rotate_, unrotate

CHUNK = rope._CHUNK_TOKENS


def frequencies(dim: int, theta: float = 10000.0) -> tuple[float, ...]:
    """RoFormer's frequencies as a model holds them: rounded to float32."""
    return tuple(torch.tensor([theta ** (-2 * i / dim) for i in range(dim // 2)], dtype=torch.float32).tolist())


def spec_of(kind: RopeKind, *, start: int = 0, dim: int = 16, sign: int = 1) -> RopeSpec:
    return RopeSpec(kind, start, dim, tuple(sign * f for f in frequencies(dim)))


def reference(states: torch.Tensor, spec: RopeSpec, start: int) -> torch.Tensor:
    """Each pair as a complex number times e^(i angle), in float64; the angle is the float32 product models compute."""
    result = states.double().clone()
    half = spec.dim // 2
    for token in range(states.shape[-2]):
        position = torch.tensor(float(start + token), dtype=torch.float32)
        angles = (position * torch.tensor(spec.frequencies, dtype=torch.float32)).double()
        for i in range(half):
            a, b = (i, i + half) if spec.kind == "half" else (2 * i, 2 * i + 1)
            a, b = spec.start + a, spec.start + b
            pair = torch.complex(result[..., token, a], result[..., token, b])
            turned = pair * torch.polar(torch.ones((), dtype=torch.float64), angles[i])
            result[..., token, a], result[..., token, b] = turned.real, turned.imag
    return result


def states_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


SPECS = [
    pytest.param(spec_of("half"), id="half"),
    pytest.param(spec_of("interleaved"), id="interleaved"),
    pytest.param(spec_of("half", dim=8), id="partial-half"),
    pytest.param(spec_of("interleaved", dim=8), id="partial-interleaved"),
    pytest.param(spec_of("half", start=8, dim=8), id="half-at-the-end"),
    pytest.param(spec_of("interleaved", start=8, dim=8), id="interleaved-at-the-end"),
    pytest.param(spec_of("half", sign=-1), id="half-backwards"),
    pytest.param(spec_of("interleaved", sign=-1), id="interleaved-backwards"),
]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("start", [0, 1, 37, 5000])
def test_rotation_is_the_reference(spec: RopeSpec, start: int) -> None:
    states = states_of(2, 3, 5, 16)
    rotated = states.clone()
    rotate_(rotated, spec, start)
    torch.testing.assert_close(rotated.double(), reference(states, spec, start), atol=1e-6, rtol=0)
    outside = [i for i in range(16) if not spec.start <= i < spec.start + spec.dim]
    assert torch.equal(rotated[..., outside], states[..., outside]), "dimensions that do not turn keep every bit"


def test_the_kinds_and_directions_differ() -> None:
    """The reference above could not tell two specs apart if they gave the same result."""
    results = []
    for parameter in SPECS:
        states = states_of(1, 4, 16)
        rotate_(states, parameter.values[0], 3)  # type: ignore[arg-type]
        results.append(states)
    for i, one in enumerate(results):
        assert all((one - other).abs().max() > 0.1 for other in results[i + 1 :])


@pytest.mark.parametrize("kind", ["half", "interleaved"])
@pytest.mark.parametrize("tokens", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
def test_chunk_borders(kind: RopeKind, tokens: int) -> None:
    """One call over many tokens is the same as a call per token near every border."""
    spec = spec_of(kind)
    states = states_of(2, tokens, 16)
    rotated = states.clone()
    rotate_(rotated, spec, 11)
    for token in {0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, tokens - 1}:
        if token < tokens:
            alone = states[:, token : token + 1].clone()
            rotate_(alone, spec, 11 + token)
            torch.testing.assert_close(rotated[:, token : token + 1], alone, atol=1e-6, rtol=0)


def test_far_positions_are_as_exact_as_near_ones() -> None:
    """At offset 32,000 the error stays float32 rounding; an angle per block would be 1e-3 off there."""
    spec = spec_of("half", dim=128)
    states = states_of(4, 64, 128)
    rotated = states.clone()
    rotate_(rotated, spec, 32_000)
    truth = reference(states, spec, 32_000)
    error = float((rotated.double() - truth).abs().max() / truth.abs().max())
    assert error <= 1e-6, f"{error:.1e}"


def test_rotating_by_parts_is_not_good_enough() -> None:
    """Why positions are absolute: turning twice, first to the block's start, is visibly off."""
    spec = spec_of("half", dim=128)
    states = states_of(4, 64, 128)
    truth = reference(states, spec, 32_000)
    twice = states.clone()
    rotate_(twice, spec, 0)
    angle = torch.tensor(spec.frequencies, dtype=torch.float32) * torch.tensor(32_000.0)
    rope._rotate_chunk_(twice, spec, angle.cos(), angle.sin())
    assert (twice.double() - truth).abs().max() / truth.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["half", "interleaved"])
def test_half_precision_rounds_once(dtype: torch.dtype, kind: RopeKind) -> None:
    spec = spec_of(kind, start=4, dim=8)
    states = states_of(2, 40, 16, dtype=dtype)
    rotated = states.clone()
    rotate_(rotated, spec, 700)
    exact = states.float()
    rotate_(exact, spec, 700)
    assert rotated.dtype == dtype
    assert torch.equal(rotated, exact.to(dtype)), "computed in float32, rounded at the end"


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["half", "interleaved"]),
    start=st.integers(0, 40_000),
    tokens=st.integers(1, 40),
    place=st.sampled_from([(0, 16), (0, 8), (8, 8), (2, 12)]),
    sign=st.sampled_from([1, -1]),
    seed=st.integers(0, 100),
)
def test_unrotate_takes_back_what_rotate_did(
    kind: RopeKind, start: int, tokens: int, place: tuple[int, int], sign: int, seed: int
) -> None:
    spec = spec_of(kind, start=place[0], dim=place[1], sign=sign)
    states = states_of(2, tokens, 16, seed=seed)
    turned = states.clone()
    rotate_(turned, spec, start)
    before = turned.clone()
    torch.testing.assert_close(unrotate(turned, spec, start), states, atol=2e-6, rtol=0)
    assert torch.equal(turned, before), "unrotate does not write into its argument"


def test_a_table_is_shared_and_grows_by_doubling() -> None:
    spec = spec_of("half", dim=4)
    device = torch.device("cpu")
    short = angle_table(spec, 10, device)[0]
    longer = angle_table(spec, 1024, device)[0]
    assert short.shape == (10, 2)
    assert longer.shape == (1024, 2)
    assert short.data_ptr() == longer.data_ptr(), "views of one table"
    assert angle_table(spec, 1025, device)[0].data_ptr() != short.data_ptr()
    torch.testing.assert_close(angle_table(spec, 1025, device)[0][:10], short, atol=0, rtol=0)


def test_no_rotation_changes_nothing() -> None:
    states = states_of(1, 3, 16)
    kept = states.clone()
    rotate_(states, RopeSpec(), 100)
    assert torch.equal(states, kept)
    copy = unrotate(states, RopeSpec(), 100)
    assert torch.equal(copy, kept)
    assert copy.data_ptr() != states.data_ptr(), "always a new tensor"


def test_zero_tokens() -> None:
    states = torch.empty(2, 0, 16)
    rotate_(states, spec_of("half"), 3)
    assert unrotate(states, spec_of("half"), 3).shape == (2, 0, 16)


def test_strided_views_are_rotated_in_place() -> None:
    """The cache hands out slices of a larger room."""
    room = states_of(2, 10, 16)
    kept = room.clone()
    view = room[:, 3:7]
    rotate_(view, spec_of("half"), 5)
    torch.testing.assert_close(view.double(), reference(kept[:, 3:7], spec_of("half"), 5), atol=1e-6, rtol=0)
    assert torch.equal(room[:, :3], kept[:, :3])
    assert torch.equal(room[:, 7:], kept[:, 7:])


def test_describe() -> None:
    assert RopeSpec().describe() == "none"
    assert spec_of("half", start=4, dim=8).describe() == "half[4:12]"
