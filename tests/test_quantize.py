"""int8 and int4 at rest: what they keep, where it lies, and what they refuse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from shared_models import FINE_TUNED
from test_exactness import prompt_of
from tiny_models import WINDOW, ModelCase

from blockrag.codec import encode, read_header
from blockrag.errors import InputError
from blockrag.kernels.place import CompiledPlacement
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.model.block_model import BlockModel
from blockrag.prompt import SegmentedPrompt
from blockrag.quantize import SCHEMES, QuantizedKV, QuantizedPrecision, payload_map, quantize
from blockrag.stores import MemoryStore

PRECISIONS: tuple[QuantizedPrecision, ...] = ("int8", "int4")
# Multi-head latent attention, odd sizes, layers that differ.
MIXED = KVLayout((LayerShape(1, 37, 1, 5), LayerShape(3, 2, 5, 1), LayerShape(2, 16, 2, 40)))
UNIFORM = KVLayout((LayerShape(2, 32, 2, 32),) * 4)


def make_kv(layout: KVLayout, tokens: int, *, seed: int = 0, spread: float = 1.0) -> BlockKV:
    """Numbers whose channels reach differently far: over some orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    kv = BlockKV(layout, tokens, torch.randn(layout.elements_per_token * tokens, generator=generator))
    for layer in range(layout.num_layers):
        for part in (kv.keys(layer), kv.values(layer)):
            part *= 10 ** (spread * torch.randn((part.shape[0], 1, part.shape[2]), generator=generator))
    return kv


def scales_of(kv: QuantizedKV, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale of each key and each value, read from the payload as the page in `blockrag.quantize` draws it."""
    shape, where = kv.layout.layers[layer], kv.sections(layer)
    parts = [
        kv.payload[section.offset : section.offset + section.nbytes].view(torch.float16).float()
        for section in (where.key_scales, where.value_scales)
    ]
    keys = parts[0].view(shape.key_heads, 1, shape.key_dim)
    group = SCHEMES[kv.precision].value_group
    if not group:
        return keys, parts[1].view(shape.value_heads, 1, shape.value_dim)
    by_group = parts[1].view(shape.value_heads, kv.num_tokens, -1)
    return keys, by_group[..., torch.arange(shape.value_dim) // group]


def refined_channels(kv: QuantizedKV) -> torch.Tensor:
    where = kv.map.refined
    return kv.payload[where.offset : where.offset + where.nbytes].view(torch.int32).view(2, -1)[0].long()


layer_shapes = st.builds(LayerShape, *[st.integers(1, 3), st.integers(1, 40)] * 2)
layouts = st.lists(layer_shapes, min_size=1, max_size=4).map(lambda layers: KVLayout(tuple(layers)))


@given(layout=layouts, tokens=st.integers(1, 40), precision=st.sampled_from(PRECISIONS), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
@example(
    layout=KVLayout((LayerShape(1, 33, 1, 40), LayerShape(1, 40, 2, 9), LayerShape(2, 40, 1, 10))),
    tokens=1,
    precision="int8",
    seed=6,
)
def test_every_number_is_off_by_half_its_scale_at_most(layout, tokens, precision, seed):
    kv = make_kv(layout, tokens, seed=seed)
    small = quantize(kv, precision)
    refined = torch.zeros(small.map.first_channel[-1], dtype=torch.bool)
    refined[refined_channels(small)] = True
    for layer, shape in enumerate(layout.layers):
        key_scales, value_scales = scales_of(small, layer)
        # Each of the numbers at rest is rounded from a float32 quotient, which has 24 bits itself: where a zero takes
        # 15 of them, that shows beside a sixteenth.
        slack = 1 + 1e-4
        rounding = kv.keys(layer).abs() * 2**-23
        bound = torch.full((shape.key_heads, 1, shape.key_dim), 0.5)
        first = small.map.first_channel[layer]
        bound[refined[first : first + shape.key_size].view(shape.key_heads, 1, shape.key_dim)] = 1 / 16
        assert bool(((small.keys(layer) - kv.keys(layer)).abs() <= bound * key_scales * slack + rounding).all())
        assert bool(((small.values(layer) - kv.values(layer)).abs() <= 0.5 * value_scales * slack).all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("top", [1e-12, 1e-8, 3e-7, 2e-6, 1e-5, 1.0, 65504.0, 400_000.0])
def test_the_bound_holds_where_float16_scales_are_coarse_or_large(precision, top):
    """Subnormal scales are off by up to a half of themselves; the nearest one would cut the largest numbers off."""
    layout = KVLayout((LayerShape(1, 8, 1, 8),))
    kv = BlockKV(layout, 5, torch.linspace(-top, top, 80))
    small = quantize(kv, precision)
    key_scales, value_scales = scales_of(small, 0)
    assert bool((key_scales > 0).all())
    assert bool(((small.keys(0) - kv.keys(0)).abs() <= 0.5001 * key_scales).all())
    assert bool(((small.values(0) - kv.values(0)).abs() <= 0.5001 * value_scales).all())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zeros_stay_zeros(precision):
    small = quantize(BlockKV(MIXED, 3, torch.zeros(MIXED.elements_per_token * 3)), precision)
    assert small.damage() is None
    for layer in range(MIXED.num_layers):
        assert not small.keys(layer).any()
        assert not small.values(layer).any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_numbers_on_the_grid_come_back_exactly(precision):
    limit = SCHEMES[precision].limit
    generator = torch.Generator().manual_seed(3)
    numbers = torch.randint(-limit, limit + 1, (UNIFORM.elements_per_token * 6,), generator=generator)
    kv = BlockKV(UNIFORM, 6, numbers * 0.25)
    for layer in range(UNIFORM.num_layers):
        # Every channel and every token reaches both limits, so that each scale is 0.25, counted from zero.
        kv.keys(layer)[:, 0] = kv.values(layer)[:, 0] = -limit * 0.25
        kv.keys(layer)[:, 1] = limit * 0.25
        kv.values(layer)[:, :, 0] = limit * 0.25
    small = quantize(kv, precision)
    for layer in range(UNIFORM.num_layers):
        assert torch.equal(small.keys(layer), kv.keys(layer))
        assert torch.equal(small.values(layer), kv.values(layer))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_channels_that_reach_furthest_are_refined_whatever_layer_they_are_in(precision):
    kv = make_kv(UNIFORM, 20, spread=0.1)
    for layer, head, channel in ((3, 1, 31), (3, 0, 0), (1, 1, 7)):
        kv.keys(layer)[head, :, channel] *= 100
    small = quantize(kv, precision)
    chosen = refined_channels(small)
    assert len(chosen) == 4 * 2 * 32 // SCHEMES[precision].refined_share
    assert {3 * 64 + 63, 3 * 64, 64 + 32 + 7} <= set(chosen.tolist())
    assert bool((chosen[1:] > chosen[:-1]).all())
    reach = torch.cat([kv.keys(layer).abs().amax(1).flatten() for layer in range(4)])
    others = torch.ones(len(reach), dtype=torch.bool)
    others[chosen] = False
    assert reach[chosen].min() >= reach[others].max()
    assert [small.first_refined[layer] for layer in (0, 4)] == [0, len(chosen)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("constant", [3.0, -400.0, 50_000.0])
def test_a_constant_on_some_key_channels_costs_nothing(precision, constant):
    """Projections with a bias (Qwen2) put numbers far from zero that hardly differ from token to token."""
    kv = make_kv(UNIFORM, 20, spread=0)
    shifted = BlockKV(UNIFORM, 20, kv.data.clone())
    for layer in range(4):
        shifted.keys(layer)[:, :, :2] += constant
    small = quantize(shifted, precision)
    for layer in range(4):
        error = (small.keys(layer) - shifted.keys(layer))[:, :, :2].abs().amax()
        reach = kv.keys(layer)[:, :, :2].abs().amax()
        # A sixteenth of a scale, and what float32 and the largest zero leave of so large a constant.
        assert error <= reach / SCHEMES[precision].limit / 15 + abs(constant) / 32767


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_payload_is_what_the_page_draws(precision):
    """Dequantised here number by number, from the words of the module's docstring alone."""
    tokens, layout = 5, KVLayout((LayerShape(1, 3, 2, 1), LayerShape(2, 4, 1, 35)))
    kv = make_kv(layout, tokens)
    small = quantize(kv, precision)
    data = bytes(small.payload.numpy())
    at = 0

    def take(count: int) -> bytes:
        nonlocal at
        at = -(-at // 16) * 16
        at += count
        return data[at - count : at]

    def halves(raw: bytes) -> list[float]:
        return torch.frombuffer(bytearray(raw), dtype=torch.float16).tolist()

    def row(raw: bytes, count: int) -> list[int]:
        half = (count + 1) // 2
        return [(raw[j] & 15) - 8 if j < half else (raw[j - half] >> 4) - 8 for j in range(count)]

    def numbers(heads: int, dim: int) -> list[list[list[int]]]:
        width = dim if precision == "int8" else (dim + 1) // 2
        raw = take(heads * tokens * width)
        rows = [raw[i * width : (i + 1) * width] for i in range(heads * tokens)]
        read = [[b - 256 if b > 127 else b for b in r] if precision == "int8" else row(r, dim) for r in rows]
        return [read[head * tokens : (head + 1) * tokens] for head in range(heads)]

    count = -(-11 // (16 if precision == "int8" else 8))
    both = torch.frombuffer(bytearray(take(8 * count)), dtype=torch.int32).tolist()
    chosen, zero = both[:count], dict(zip(both[:count], both[count:], strict=True))
    width = (tokens + 1) // 2
    raw = take(count * width)
    r = {channel: row(raw[i * width : (i + 1) * width], tokens) for i, channel in enumerate(chosen)}
    before = 0
    for layer, shape in enumerate(layout.layers):
        scales, q = halves(take(2 * shape.key_size)), numbers(shape.key_heads, shape.key_dim)
        for head in range(shape.key_heads):
            for t in range(tokens):
                for channel in range(shape.key_dim):
                    number = head * shape.key_dim + channel
                    at_all = before + number
                    extra = r[at_all][t] / 16 + zero[at_all] if at_all in r else 0
                    assert small.keys(layer)[head, t, channel] == (q[head][t][channel] + extra) * scales[number]
        before += shape.key_size
        groups = -(-shape.value_dim // 32)
        per_channel = precision == "int8"
        scales = halves(take(2 * shape.value_heads * (shape.value_dim if per_channel else tokens * groups)))
        q = numbers(shape.value_heads, shape.value_dim)
        for head in range(shape.value_heads):
            for t in range(tokens):
                for channel in range(shape.value_dim):
                    by_token = (head * tokens + t) * groups + channel // 32
                    scale = scales[head * shape.value_dim + channel if per_channel else by_token]
                    assert small.values(layer)[head, t, channel] == q[head][t][channel] * scale
    assert at == len(data) == small.nbytes


@pytest.mark.parametrize(("precision", "at_most"), [("int8", 0.52), ("int4", 0.29)])
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("tokens", [130, 256, 1000])
def test_bytes_per_token_beside_float16(precision, at_most, dim, tokens):
    layout = KVLayout((LayerShape(2, dim, 2, dim),) * 4)
    assert payload_map(layout, tokens, precision).nbytes <= at_most * layout.nbytes(tokens, 2)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_block_gives_the_same_bytes(precision):
    """Equal scales too: the first channels are refined."""
    kv = BlockKV(UNIFORM, 4, torch.ones(UNIFORM.elements_per_token * 4))
    small = quantize(kv, precision)
    assert torch.equal(small.payload, quantize(kv, precision).payload)
    assert refined_channels(small).tolist() == list(range(256 // SCHEMES[precision].refined_share))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_dtypes_are_quantised_as_their_float32_values(precision, dtype):
    kv = make_kv(MIXED, 7, spread=0.3)
    rounded = BlockKV(MIXED, 7, kv.data.to(dtype))
    widened = BlockKV(MIXED, 7, rounded.data.float())
    assert torch.equal(quantize(rounded, precision).payload, quantize(widened, precision).payload)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantising_does_not_touch_the_block(precision):
    kv = make_kv(MIXED, 7)
    before = kv.data.clone()
    small = quantize(kv, precision)
    payload = small.payload.clone()
    for layer in range(MIXED.num_layers):
        small.keys(layer).zero_()
        small.values(layer).zero_()
    assert torch.equal(kv.data, before)
    assert torch.equal(small.payload, payload)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("layer", "part"), [(0, "keys"), (2, "values")])
def test_what_is_not_finite_is_refused_with_its_layer(precision, value, layer, part):
    kv = make_kv(MIXED, 3)
    getattr(kv, part)(layer)[0, 1, 2] = value
    with pytest.raises(InputError, match=f"layer {layer}: the {part} hold NaN or infinity"):
        quantize(kv, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_no_scale_spans_is_refused(precision):
    limit = SCHEMES[precision].limit
    kv = make_kv(MIXED, 3, spread=0)
    kv.values(1)[4, 0, 0] = 65504.0 * limit
    quantize(kv, precision)
    kv.values(1)[4, 0, 0] = 65536.0 * limit
    with pytest.raises(InputError, match=rf"layer 1: the values reach .*, {precision} holds .*; use float32"):
        quantize(kv, precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bits", [0x0000, 0x8000, 0x7C00, 0xFC00, 0x7E00, 0xFFFF, 0xBC00])
def test_a_scale_that_cannot_be_is_found_wherever_it_is(precision, bits):
    small = quantize(make_kv(MIXED, 3), precision)
    assert small.damage() is None
    word = torch.tensor([bits], dtype=torch.int32).to(torch.int16).view(torch.uint8)
    for layer in range(MIXED.num_layers):
        where = small.sections(layer)
        for section in (where.key_scales, where.value_scales):
            for offset in range(section.offset, section.offset + section.nbytes, 2):
                kept = small.payload[offset : offset + 2].clone()
                small.payload[offset : offset + 2] = word
                assert small.damage() == "scale"
                small.payload[offset : offset + 2] = kept
    assert small.damage() is None


@pytest.mark.parametrize("precision", PRECISIONS)
def test_refined_channels_that_cannot_be_are_found(precision):
    """Compiled code writes where they point."""
    small = quantize(make_kv(UNIFORM, 3), precision)
    where = small.map.refined
    numbers = small.payload[where.offset : where.offset + where.nbytes].view(torch.int32)
    count = small.map.num_refined
    wrong = ((0, -1), (count - 1, 256), (1, int(numbers[0])), (2, int(numbers[1]) - 1))
    for place, value in (*wrong, (count, -32768), (2 * count - 1, 32768)):
        kept = int(numbers[place])
        numbers[place] = value
        assert small.damage() == "channel"
        numbers[place] = kept
    assert small.damage() is None


@pytest.mark.parametrize(
    "payload", [torch.zeros(7, dtype=torch.uint8), torch.zeros((2, 2), dtype=torch.uint8), torch.zeros(4)]
)
def test_another_payload_than_the_layouts_is_refused(payload):
    with pytest.raises(InputError, match="build it with the same KVLayout"):
        QuantizedKV(UNIFORM, 3, "int8", payload)


# -- Through the model ------------------------------------------------------------------------------------------------

FAMILIES = ["llama", "mistral", "gemma3", "cohere", "deepseek-v3"]


def composed(model: BlockModel, prompt: SegmentedPrompt) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Keys and values of every layer's cache behind the passages, and the logits behind the question."""
    running = model.start()
    try:
        running.extend(prompt.local_blocks, room=8)
        cache = [states.clone() for layer in running.cache.kv_layers for states in (layer.keys, layer.values)]
        running.extend(prompt.blocks[len(prompt.local_blocks) :], room=8)
        assert running.logits is not None
        return cache, running.logits.clone()
    finally:
        running.close()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "torch"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("case", FAMILIES)
def test_composing_is_composing_the_dequantised_states(make_model, monkeypatch, case, precision, compiled):
    """To the bit: quantising changes what is stored, and nothing about how it is placed, turned and attended to."""
    if not compiled:
        monkeypatch.setattr(CompiledPlacement, "of", classmethod(lambda cls, rows, end: None))
    prompt = prompt_of((7, WINDOW + 4, 9, 1), 6)
    small, exact = make_model(case, precision=precision), make_model(case, precision="float32")
    layout = exact.profile.layout
    for block in prompt.local_blocks:
        (kv,) = exact.prefill([block.token_ids])
        rounded = quantize(kv, precision)
        parts = [part for layer in range(layout.num_layers) for part in (rounded.keys(layer), rounded.values(layer))]
        widened = BlockKV(layout, kv.num_tokens, torch.cat([part.flatten() for part in parts]))
        for model, states in ((small, kv), (exact, widened)):
            key, digest = model.block_key(block.token_ids), model.fingerprint.digest
            model.store.put(key, encode(states, key=key, fingerprint=digest, precision=model.precision))
    (cache, logits), (expected_cache, expected_logits) = composed(small, prompt), composed(exact, prompt)
    for states, expected in zip(cache, expected_cache, strict=True):
        assert torch.equal(states, expected)
    assert torch.equal(logits, expected_logits)
    # It is the stored states that were composed.
    assert not torch.equal(logits, composed(make_model(case, precision="float32"), prompt)[1])


@pytest.mark.parametrize("case", FAMILIES)
def test_cold_and_warm_are_the_same(make_model, case):
    prompt = prompt_of((7, WINDOW + 4, 9, 1), 6)
    for precision in PRECISIONS:
        model = make_model(case, precision=precision)
        (_, cold), (_, warm) = composed(model, prompt), composed(model, prompt)
        assert torch.equal(cold, warm)


def test_fewer_bits_are_further_from_the_oracle(make_model):
    prompt = prompt_of((7, WINDOW + 4, 9, 1), 6)
    exact = make_model("llama").reference_logits(prompt.blocks)[-1]
    error = {p: (composed(make_model("llama", precision=p), prompt)[1] - exact).abs().max() for p in PRECISIONS}
    assert 1e-5 < error["int8"] < 0.05 * exact.abs().max()
    assert error["int8"] < error["int4"] < 0.5 * exact.abs().max()


def test_blocks_of_another_precision_are_never_found(make_model):
    store, prompt = MemoryStore(), prompt_of((7, 9), 6)
    models = [make_model(precision=p, store=store) for p in ("float16", *PRECISIONS)]
    keys = set()
    for model in models:
        report = model.materialize(prompt.local_blocks)
        assert (report.blocks_new, report.blocks_reused) == (2, 0)
        keys |= {model.block_key(block.token_ids) for block in prompt.local_blocks}
    assert keys == set(store.keys())
    assert len(keys) == 6


def test_what_no_scale_spans_is_stored_as_float32(make_model):
    model = make_model(ModelCase("loud", "llama"), precision="int4")
    with torch.no_grad():
        model.model.model.layers[0].self_attn.v_proj.weight[0] *= 1e9
    loud = BlockModel(model.model, model.tokenizer, precision="int4", facts=FINE_TUNED)
    prompt = prompt_of((7,), 6)
    loud.materialize(prompt.local_blocks)
    data = loud.store.get(loud.block_key(prompt.blocks[0].token_ids))
    assert data is not None
    assert read_header(data).precision == "float32"


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("empty", [(0, 0, 0, 0), (2, 4, 0, 0), (0, 0, 2, 33)], ids=str)
def test_layers_that_keep_nothing(precision: QuantizedPrecision, empty: tuple[int, int, int, int]) -> None:
    """Layers that share another's KV states have none of their own; those around them are kept as ever."""
    around = LayerShape(2, 8, 2, 8)
    layout = KVLayout((around, LayerShape(*empty), around))
    kv = make_kv(layout, 5)
    states = quantize(kv, precision)
    assert states.keys(1).shape == kv.keys(1).shape
    assert states.values(1).shape == kv.values(1).shape
    for layer in (0, 2):
        written = kv.keys(layer)
        torch.testing.assert_close(states.keys(layer), written, rtol=0, atol=float(written.abs().max()) / 5)
