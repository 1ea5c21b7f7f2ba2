"""The compiled placement writes what torch writes: every precision, rotation, size, window, and nothing beside it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.kernels import place as place_module
from blockrag.kernels.build import library, why_not
from blockrag.kernels.place import CompiledPlacement, Rows
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.quantize import QuantizedKV, quantize
from blockrag.rope import RopeSpec, rotate_

pytestmark = pytest.mark.skipif(library() is None, reason=f"no compiled kernels: {why_not()}")

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = [*FLOATS, "int8", "int4"]
UNTOUCHED = 12345.0


def stored(layout: KVLayout, num_tokens: int, precision: str, seed: int = 0) -> BlockKV | QuantizedKV:
    data = torch.randn(layout.elements_per_token * num_tokens, generator=torch.Generator().manual_seed(seed))
    if precision in FLOATS:
        return BlockKV(layout, num_tokens, data.to(FLOATS[precision]))
    return quantize(BlockKV(layout, num_tokens, data), precision)


def frequencies(dim: int) -> tuple[float, ...]:
    return tuple((10000.0 ** (-torch.arange(0, dim, 2).float() / dim)).tolist())


def rope(kind: str, start: int, dim: int) -> RopeSpec:
    return RopeSpec() if kind == "none" else RopeSpec(kind, start, dim, frequencies(dim))


def room(layout: KVLayout, capacity: int, ropes: list[tuple[RopeSpec, RopeSpec]], rows: int, start: int) -> list[Rows]:
    """Rows in the middle of a larger room, whose other elements must stay as they are."""
    made = []
    for shape, (keys, values) in zip(layout.layers, ropes, strict=True):
        for heads, dim, spec in ((shape.key_heads, shape.key_dim, keys), (shape.value_heads, shape.value_dim, values)):
            whole = torch.full((heads, capacity, dim), UNTOUCHED)
            made.append(Rows(whole[:, 3 : 3 + rows], start, spec))
    return made


def expected(kv: BlockKV | QuantizedKV, ropes: list[tuple[RopeSpec, RopeSpec]], position: int) -> list[torch.Tensor]:
    states = []
    for layer, (keys, values) in enumerate(ropes):
        for tensor, spec in ((kv.keys(layer), keys), (kv.values(layer), values)):
            turned = tensor.float().clone()
            rotate_(turned, spec, position)
            states.append(turned)
    return states


def check(layout: KVLayout, ropes: list[tuple[RopeSpec, RopeSpec]], precision: str, tokens: int, position: int) -> None:
    kv = stored(layout, tokens, precision)
    end = position + tokens
    rows = room(layout, end + 7, ropes, end, 0)
    placement = CompiledPlacement.of(rows, end)
    assert placement is not None
    placement.place(kv, position, range(layout.num_layers))
    for made, right in zip(rows, expected(kv, ropes, position), strict=True):
        torch.testing.assert_close(made.states[:, position:end], right, atol=2e-6, rtol=2e-6)
        assert bool((made.states[:, :position] == UNTOUCHED).all())
        base = made.states._base
        assert base is not None
        assert bool((base[:, :3] == UNTOUCHED).all())
        assert bool((base[:, 3 + end :] == UNTOUCHED).all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("dim", "kind", "start", "rotated"),
    [
        (64, "half", 0, 64),
        (48, "half", 0, 48),
        (80, "half", 0, 32),
        (64, "half", 32, 32),
        (24, "half", 4, 12),
        (32, "interleaved", 0, 32),
        (20, "interleaved", 6, 10),
        (40, "none", 0, 0),
        (9, "none", 0, 0),
    ],
)
def test_it_writes_what_torch_writes(precision, dim, kind, start, rotated):
    layout = KVLayout((LayerShape(2, dim, 2, dim),) * 2)
    ropes = [(rope(kind, start, rotated), RopeSpec())] * 2
    for tokens in (1, 37):
        check(layout, ropes, precision, tokens, position=11)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_layout_any_place(data):
    def tensor() -> tuple[int, int, RopeSpec]:
        heads, dim = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 40))
        rotated = 2 * data.draw(st.integers(0, dim // 2))
        kind = data.draw(st.sampled_from(["half", "interleaved"])) if rotated else "none"
        return heads, dim, rope(kind, data.draw(st.integers(0, dim - rotated)), rotated)

    drawn = [(tensor(), tensor()) for _ in range(data.draw(st.integers(1, 3)))]
    layout = KVLayout(tuple(LayerShape(k[0], k[1], v[0], v[1]) for k, v in drawn))
    ropes = [(k[2], v[2]) for k, v in drawn]
    precision = data.draw(st.sampled_from(PRECISIONS))
    check(layout, ropes, precision, data.draw(st.integers(1, 70)), data.draw(st.integers(0, 50)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("position", [0, 5, 20, 29])
def test_a_window_takes_only_the_tail(precision, position):
    """Rows begin at position 20; the block lies before, across, or behind that border."""
    layout, spec = KVLayout((LayerShape(2, 32, 2, 32),)), rope("half", 0, 32)
    kv = stored(layout, 18, precision)
    rows = [
        Rows(torch.full((2, 40, 32), UNTOUCHED), 20, spec),
        Rows(torch.full((2, 40, 32), UNTOUCHED), 20, RopeSpec()),
    ]
    placement = CompiledPlacement.of(rows, 60)
    assert placement is not None
    placement.place(kv, position, range(1))
    first = max(position, 20)
    for made, right in zip(rows, expected(kv, [(spec, RopeSpec())], position), strict=True):
        written = slice(first - 20, max(position + 18 - 20, first - 20))
        torch.testing.assert_close(made.states[:, written], right[:, first - position :], atol=2e-6, rtol=2e-6)
        assert bool((made.states[:, : written.start] == UNTOUCHED).all())
        assert bool((made.states[:, written.stop :] == UNTOUCHED).all())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_writing_past_the_cache_writes_the_same(precision, monkeypatch):
    layout = KVLayout((LayerShape(2, 48, 2, 48),) * 3)
    ropes = [(rope("half", 0, 48), RopeSpec())] * 3
    kv = stored(layout, 33, precision)
    found = []
    for least in (1, 1 << 60):
        monkeypatch.setattr(place_module, "_STREAMING_BYTES", least)
        rows = [Rows(torch.zeros(2, 64, 48), 0, spec) for pair in ropes for spec in pair]
        placement = CompiledPlacement.of(rows, 64)
        assert placement is not None
        placement.place(kv, 9, range(3))
        found.append([made.states for made in rows])
    for streamed, cached in zip(*found, strict=True):
        assert torch.equal(streamed, cached)


def test_layers_may_be_placed_apart():
    layout = KVLayout((LayerShape(1, 16, 2, 8), LayerShape(2, 8, 1, 16), LayerShape(1, 8, 1, 8)))
    ropes = [(RopeSpec(), RopeSpec())] * 3
    for precision in PRECISIONS:
        kv = stored(layout, 5, precision)
        rows = room(layout, 20, ropes, 9, 0)
        placement = CompiledPlacement.of(rows, 9)
        assert placement is not None
        placement.place(kv, 2, range(1, 3))
        assert bool((rows[0].states == UNTOUCHED).all())
        assert bool((rows[1].states == UNTOUCHED).all())
        placement.place(kv, 2, range(1))
        for made, right in zip(rows, expected(kv, ropes, 2), strict=True):
            torch.testing.assert_close(made.states[:, 2:7], right, atol=2e-6, rtol=2e-6)


def test_a_block_that_does_not_fit_writes_nothing():
    layout = KVLayout((LayerShape(1, 8, 1, 8),))
    rows = [Rows(torch.full((1, 10, 8), UNTOUCHED), 0, RopeSpec()) for _ in range(2)]
    placement = CompiledPlacement.of(rows, 10)
    assert placement is not None
    for position in (-1, 6):
        with pytest.raises(ValueError, match="do not fit a run that ends at 10"):
            placement.place(stored(layout, 5, "float16"), position, range(1))
    assert bool((rows[0].states == UNTOUCHED).all())


def test_other_caches_are_left_to_torch():
    spec = RopeSpec()
    assert CompiledPlacement.of([Rows(torch.zeros(1, 4, 8, dtype=torch.bfloat16), 0, spec)], 4) is None
    assert CompiledPlacement.of([Rows(torch.zeros(1, 4, 2048), 0, spec)], 4) is None
    assert CompiledPlacement.of([Rows(torch.zeros(1, 8, 4).transpose(1, 2), 0, spec)], 4) is None


def test_special_float16_values_are_converted_exactly():
    """All 65,536 bit patterns but NaN; subnormal numbers included."""
    patterns = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    numbers = patterns[~patterns.isnan()]
    numbers = numbers[: numbers.numel() // 16 * 16]
    for dim in (8, 5):
        usable = numbers[: numbers.numel() // (2 * dim) * 2 * dim]
        tokens = usable.numel() // (2 * dim)
        layout = KVLayout((LayerShape(1, dim, 1, dim),))
        rows = [Rows(torch.zeros(1, tokens, dim), 0, RopeSpec()) for _ in range(2)]
        placement = CompiledPlacement.of(rows, tokens)
        assert placement is not None
        placement.place(BlockKV(layout, tokens, usable), 0, range(1))
        assert torch.equal(torch.cat([made.states.flatten() for made in rows]), usable.float())
