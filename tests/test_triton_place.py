"""The Triton kernel writes what torch writes: every precision, rotation, size and window, strided and paged caches.

Where there is a CUDA device the compiled kernel runs on it; elsewhere Triton's interpreter runs the same code.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from blockrag.errors import InputError
from blockrag.kernels.at_rest import AtRest, PlacedBlock, payload_of
from blockrag.kernels.device import link_to
from blockrag.kernels.place import Rows
from blockrag.kernels.triton_place import TritonPlacement
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.quantize import quantize
from blockrag.rope import RopeSpec, rotate_

DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PRECISIONS = [*FLOATS, "int8", "int4"]
UNTOUCHED = 12345.0


def stored(layout, num_tokens, precision, seed=0):
    data = torch.randn(layout.elements_per_token * num_tokens, generator=torch.Generator().manual_seed(seed))
    if precision in FLOATS:
        return BlockKV(layout, num_tokens, data.to(FLOATS[precision]))
    return quantize(BlockKV(layout, num_tokens, data), precision)


def rope(kind, start, dim):
    if kind == "none":
        return RopeSpec()
    return RopeSpec(kind, start, dim, tuple((10000.0 ** (-torch.arange(0, dim, 2).float() / dim)).tolist()))


def uniform(heads, dim, layers=2):
    return KVLayout((LayerShape(heads, dim, heads, dim),) * layers)


def room(layout, capacity, ropes, *, start=0, dtype=torch.float32):
    made = []
    for shape, (keys, values) in zip(layout.layers, ropes, strict=True):
        for heads, dim, spec in ((shape.key_heads, shape.key_dim, keys), (shape.value_heads, shape.value_dim, values)):
            whole = torch.full((heads, capacity + 5, dim), UNTOUCHED, dtype=dtype, device=DEVICE)
            made.append(Rows(whole[:, 3 : 3 + capacity], start, spec))
    return made


def expected(kv, ropes, position):
    """As torch does it, on the CPU: keys and values of each layer in turn."""
    states = []
    for layer, (keys, values) in enumerate(ropes):
        for tensor, spec in ((kv.keys(layer), keys), (kv.values(layer), values)):
            turned = tensor.float().clone()
            rotate_(turned, spec, position)
            states.append(turned)
    return states


def launch(rows, end, blocks, layers, slots=None):
    """`blocks` are pairs of a block and its position."""
    payloads = [payload_of(kv).to(DEVICE) for kv, _ in blocks]
    placed = [
        PlacedBlock(AtRest.of(kv), payload.data_ptr(), position)
        for (kv, position), payload in zip(blocks, payloads, strict=True)
    ]
    placement = TritonPlacement(rows, end, link_to(DEVICE), slots)
    placement.take(placed)
    for layer in layers:
        placement.launch(range(layer, layer + 1))
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def check(rows, right, first, end, *, atol=2e-6):
    """Positions first to end - 1 are right, and nothing else was written."""
    for made, states in zip(rows, right, strict=True):
        found = made.states[:, first - made.start : end - made.start].cpu().float()
        torch.testing.assert_close(found, states.to(made.states.dtype).float(), atol=atol, rtol=atol)
        untouched = made.states._base.clone()
        untouched[:, 3 + first - made.start : 3 + end - made.start] = UNTOUCHED
        assert bool((untouched == torch.tensor(UNTOUCHED, dtype=untouched.dtype)).all())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("dim", "kind", "start", "rotated"),
    [
        (16, "half", 0, 16),
        (24, "half", 4, 12),
        (48, "half", 32, 16),
        (16, "interleaved", 0, 16),
        (20, "interleaved", 6, 10),
        (9, "none", 0, 0),
    ],
)
def test_it_writes_what_torch_writes(precision, dim, kind, start, rotated):
    layout = uniform(2, dim)
    ropes = [(rope(kind, start, rotated), RopeSpec())] * 2
    kv = stored(layout, 37, precision)
    rows = room(layout, 60, ropes)
    launch(rows, 60, [(kv, 11)], range(2))
    check(rows, expected(kv, ropes, 11), 11, 48)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_caches_of_sixteen_bits(dtype, precision):
    layout, ropes = uniform(2, 16, 1), [(rope("half", 0, 16), RopeSpec())]
    kv = stored(layout, 20, precision)
    rows = room(layout, 30, ropes, dtype=dtype)
    launch(rows, 30, [(kv, 4)], range(1))
    # One rounding, of a number computed in float32.
    check(rows, expected(kv, ropes, 4), 4, 24, atol=1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("precision", ["float16", "int8", "int4"])
def test_many_blocks_of_many_lengths_in_one_launch(precision):
    layout, ropes = uniform(2, 16), [(rope("half", 0, 16), RopeSpec())] * 2
    lengths = [1, 40, 7, 16, 33]
    starts = [sum(lengths[:index]) for index in range(len(lengths))]
    kvs = [stored(layout, length, precision, seed=length) for length in lengths]
    rows = room(layout, sum(lengths), ropes)
    launch(rows, sum(lengths), list(zip(kvs, starts, strict=True)), range(2))
    parts = [expected(kv, ropes, start) for kv, start in zip(kvs, starts, strict=True)]
    check(rows, [torch.cat(part, dim=1) for part in zip(*parts, strict=True)], 0, sum(lengths))


def test_blocks_of_several_precisions():
    layout, ropes = uniform(1, 16, 1), [(rope("half", 0, 16), RopeSpec())]
    kvs = [stored(layout, 10, precision) for precision in FLOATS]
    rows = room(layout, 30, ropes)
    launch(rows, 30, [(kv, 10 * index) for index, kv in enumerate(kvs)], range(1))
    parts = [expected(kv, ropes, 10 * index) for index, kv in enumerate(kvs)]
    check(rows, [torch.cat(part, dim=1) for part in zip(*parts, strict=True)], 0, 30)


def test_layers_that_differ_and_values_that_turn():
    """As in multi-head latent attention: keys and values of different shapes, the values rotated."""
    layout = KVLayout((LayerShape(1, 24, 1, 8), LayerShape(3, 8, 1, 16), LayerShape(1, 8, 2, 8)))
    ropes = [(RopeSpec(), rope("interleaved", 0, 8)), (rope("half", 0, 8), rope("half", 4, 8)), (RopeSpec(),) * 2]
    for precision in ("float32", "int8", "int4"):
        kv = stored(layout, 19, precision)
        rows = room(layout, 40, ropes)
        launch(rows, 40, [(kv, 6)], range(1, 3))
        assert all(bool((made.states == UNTOUCHED).all()) for made in rows[:2])
        launch(rows, 40, [(kv, 6)], range(1))
        check(rows, expected(kv, ropes, 6), 6, 25)


@pytest.mark.parametrize("position", [0, 5, 20, 29])
@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
def test_a_window_takes_only_the_tail(precision, position):
    """Rows begin at position 20; the block lies before, across, or behind that border."""
    layout, ropes = uniform(2, 16, 1), [(rope("half", 0, 16), RopeSpec())]
    kv = stored(layout, 18, precision)
    rows = room(layout, 40, ropes, start=20)
    launch(rows, 60, [(kv, position)], range(1))
    first, end = max(position, 20), max(position + 18, 20)
    check(rows, [states[:, first - position :] for states in expected(kv, ropes, position)], first, end)


@pytest.mark.parametrize("kind", ["half", "interleaved"])
def test_a_paged_cache(kind):
    """Token-major slots, in the order a map of positions says."""
    layout, ropes = uniform(2, 16, 1), [(rope(kind, 0, 16), RopeSpec())]
    kv = stored(layout, 21, "float16")
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:30]
    pages = [torch.full((64, 2, 16), UNTOUCHED, device=DEVICE) for _ in range(2)]
    rows = [Rows(page.transpose(0, 1), 0, spec) for page, spec in zip(pages, ropes[0], strict=True)]
    launch(rows, 30, [(kv, 9)], range(1), slots=slots.to(DEVICE))
    for page, right in zip(pages, expected(kv, ropes, 9), strict=True):
        torch.testing.assert_close(page[slots[9:30]].cpu(), right.transpose(0, 1), atol=2e-6, rtol=2e-6)
        page[slots[9:30]] = UNTOUCHED
        assert bool((page == UNTOUCHED).all())


def test_rows_with_scattered_channels_are_refused():
    rows = [Rows(torch.zeros(1, 8, 4, device=DEVICE).transpose(1, 2), 0, RopeSpec())] * 2
    with pytest.raises(InputError, match="keep channels together"):
        TritonPlacement(rows, 4, link_to(DEVICE))


COMPILE = """
import torch
torch.cuda.is_available = lambda: True
import triton.language as tl
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from blockrag.kernels.triton_place import _place

constants = dict(BITS=8, HEADS=8, DIM=128, KIND=1, BEGIN=0, HALF=64, HALF_ROOM=64, OTHERS=0, OTHERS_ROOM=1,
                 GROUP=0, CHANNELS=32768, PAGED=False, PACK=16, TILE=16)
pointers = dict(blocks="*i64", sources="*i64", targets="*i64", slots="*i64", payload="*i8", scale="*fp16",
                ordinal="*i32", nibble="*u8", cache="*bf16", table="*fp32")
signature = {**pointers, "num_sources": "i32", **dict.fromkeys(constants, "constexpr")}
source = ASTSource(_place, signature, constants, {(i,): [["tt.divisibility", 16]] for i in range(len(pointers))})
text = compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
assert "ld.global.v2.b32" in text, "elements at rest are not read eight bytes at a time"
assert "st.global.v4.b32" in text, "the cache is not written sixteen bytes at a time"
assert "st.global.b16" not in text
"""


def test_it_compiles_to_wide_loads_and_stores(tmp_path):
    """For a GPU that need not be there: what the interpreter cannot show."""
    triton = pytest.importorskip("triton", minversion="3.4")
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"Triton {triton.__version__}: {done.stderr[-2000:]}"
