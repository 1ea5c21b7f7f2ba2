"""The GPU's way of placing blocks into a prompt's cache: gather, convert, rotate and scatter, in one Triton kernel.

One launch takes any number of blocks into all tensors of the cache that are shaped alike; a model whose layers are
alike needs one per precision. Blocks are given by the addresses of their payloads, which may lie anywhere on the
device. The cache's rows lie one behind the other, or wherever a map of slots says.

Triton is imported with this module, and nowhere else: who imports it must be ready for its absence. Where there is no
CUDA device the same code runs in Triton's interpreter, on tensors in host memory: slowly, for tests. The layout of the
payload is that of blockrag/kv.py (float precisions) and blockrag/quantize.py (int8, int4).
Source: https://triton-lang.org/main/python-api/triton.language.html
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
import triton
import triton.language as tl

from blockrag.errors import InputError
from blockrag.rope import angle_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockrag.kernels.at_rest import PlacedBlock
    from blockrag.kernels.device import Link
    from blockrag.kernels.place import Rows
    from blockrag.rope import RopeSpec

__all__ = ["TritonPlacement"]

# Tokens a program places: enough to keep its threads busy, few enough that short blocks waste little. A tile of a
# quantised block's keys must not span two groups of tokens.
_TILE: Final = 16
_WARPS: Final = 4
_AT_REST: Final = {
    "float32": (torch.float32, 32),
    "bfloat16": (torch.bfloat16, 16),
    "float16": (torch.float16, 16),
    "int8": (torch.int8, 8),
    "int4": (torch.uint8, 4),
}
_KINDS: Final = {"none": 0, "half": 1, "interleaved": 2}


def _jit(function: Callable[..., Any]) -> Any:
    """Compiled where there is a device to compile for, else interpreted."""
    if torch.cuda.is_available():
        return triton.jit(function)
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


@_jit
def _read(
    elements: tl.tensor,
    scales: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    token: tl.tensor,
    first: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
) -> Any:
    """Some channels of a tile of one head, shape (tile, channels), as float32."""
    row = (head * tokens + token)[:, None]
    if BITS == 4:
        WIDTH: tl.constexpr = (DIM + 1) // 2
        high = channel >= WIDTH
        pair = tl.load(elements + row * WIDTH + tl.where(high, channel - WIDTH, channel)[None, :], mask=mask, other=8)
        pair = pair.to(tl.int32)
        numbers = (tl.where(high[None, :], pair >> 4, pair & 15) - 8).to(tl.float32)
    else:
        numbers = tl.load(elements + row * DIM + channel[None, :], mask=mask, other=0).to(tl.float32)
    if BITS <= 8:
        if KEYS:
            # Per channel; a tile never spans two groups of tokens.
            if GROUP == 0:
                at = head * DIM + channel
            else:
                at = (head * ((tokens + GROUP - 1) // GROUP) + first // GROUP) * DIM + channel
            scale = tl.load(scales + at, mask=channel < DIM, other=0)
            numbers = numbers * scale.to(tl.float32)[None, :]
        else:
            if GROUP == 0:
                scale = tl.load(scales + head * tokens + token, mask=token < tokens, other=0)
                numbers = numbers * scale.to(tl.float32)[:, None]
            else:
                GROUPS: tl.constexpr = (DIM + GROUP - 1) // GROUP
                scale = tl.load(scales + row * GROUPS + (channel // GROUP)[None, :], mask=mask, other=0)
                numbers = numbers * scale.to(tl.float32)
    return numbers


@_jit
def _place(
    blocks: tl.tensor,
    sources: tl.tensor,
    targets: tl.tensor,
    slots: tl.tensor,
    payload: tl.tensor,
    scale: tl.tensor,
    cache: tl.tensor,
    table: tl.tensor,
    num_sources: tl.tensor,
    BITS: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    KIND: tl.constexpr,
    BEGIN: tl.constexpr,
    HALF: tl.constexpr,
    HALF_ROOM: tl.constexpr,
    OTHERS: tl.constexpr,
    OTHERS_ROOM: tl.constexpr,
    KEYS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGED: tl.constexpr,
    PACK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A tile of a block's tokens, all heads of one tensor. Grid: tiles of the longest block, blocks, tensors.

    `payload`, `scale`, `cache` and `table` only give types and a place to count from: everything is reached by its
    distance from them, in elements. `blocks` int64 (blocks, 2): tokens, absolute position of the first. `sources`
    int64 (blocks, num_sources, 2): where elements and scales begin. `targets` int64 (tensors, 8): index into the
    sources, where the first row begins, elements from head to head and from row to row, absolute position of the first
    row, where cosines and sines begin, whether it turns. `slots` int64: row of each absolute position, where PAGED.
    PACK > 0 promises that all of these are multiples of 16 bytes (of 32, for a float32 cache), PACK payload elements.
    """
    block = tl.program_id(1).to(tl.int64)
    target = targets + tl.program_id(2) * 8
    tokens = tl.load(blocks + block * 2)
    position = tl.load(blocks + block * 2 + 1)
    source = sources + (block * num_sources + tl.load(target)) * 2
    payload_at = tl.load(source)
    scale_at = tl.load(source + 1)
    cache_at = tl.load(target + 1)
    cos_at = tl.load(target + 5)
    sin_at = tl.load(target + 6)
    head_stride = tl.load(target + 2)
    row_stride = tl.load(target + 3)
    if PACK > 0:
        payload_at = tl.multiple_of(payload_at, PACK)
        scale_at = tl.multiple_of(scale_at, 8)
        cache_at = tl.multiple_of(cache_at, 8)
        cos_at = tl.multiple_of(cos_at, 4)
        sin_at = tl.multiple_of(sin_at, 4)
        head_stride = tl.multiple_of(head_stride, 8)
        row_stride = tl.multiple_of(row_stride, 8)
    elements = payload + payload_at
    scales = scale + scale_at
    rows = cache + cache_at
    first = tl.program_id(0) * TILE
    token = first + tl.arange(0, TILE)
    at = position + token
    start = tl.load(target + 4)
    visible = (token < tokens) & (at >= start)
    if PAGED:  # noqa: SIM108 -- only one of them is compiled
        row = tl.load(slots + at, mask=visible, other=0) * row_stride
    else:
        row = (at - start) * row_stride
    if HALF > 0:
        pair = tl.arange(0, HALF_ROOM)
        both = visible[:, None] & (pair < HALF)[None, :]
        turns = tl.where(both, tl.load(target + 7), 0) != 0
        angle = at[:, None] * HALF + pair[None, :]
        cos = tl.load(table + cos_at + angle, mask=turns, other=1.0)
        sin = tl.load(table + sin_at + angle, mask=turns, other=0.0)
        if KIND == 1:
            x_channel = BEGIN + pair
            y_channel = BEGIN + HALF + pair
            for head in range(HEADS):
                x = _read(elements, scales, head, tokens, token, first, x_channel, both, BITS, DIM, KEYS, GROUP)
                y = _read(elements, scales, head, tokens, token, first, y_channel, both, BITS, DIM, KEYS, GROUP)
                to = rows + head * head_stride + row[:, None]
                tl.store(to + x_channel[None, :], (x * cos - y * sin).to(cache.dtype.element_ty), mask=both)
                tl.store(to + y_channel[None, :], (y * cos + x * sin).to(cache.dtype.element_ty), mask=both)
        else:
            pairs = tl.arange(0, 2 * HALF_ROOM)
            xy_channel = BEGIN + pairs
            all_pairs = visible[:, None] & (pairs < 2 * HALF)[None, :]
            for head in range(HEADS):
                xy = _read(elements, scales, head, tokens, token, first, xy_channel, all_pairs, BITS, DIM, KEYS, GROUP)
                x, y = tl.split(tl.reshape(xy, (TILE, HALF_ROOM, 2)))
                turned = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), (TILE, 2 * HALF_ROOM))
                to = rows + head * head_stride + row[:, None] + xy_channel[None, :]
                tl.store(to, turned.to(cache.dtype.element_ty), mask=all_pairs)
    if OTHERS > 0:
        other = tl.arange(0, OTHERS_ROOM)
        channel = tl.where(other < BEGIN, other, other + 2 * HALF)
        wanted = visible[:, None] & (other < OTHERS)[None, :]
        for head in range(HEADS):
            x = _read(elements, scales, head, tokens, token, first, channel, wanted, BITS, DIM, KEYS, GROUP)
            to = rows + head * head_stride + row[:, None]
            tl.store(to + channel[None, :], x.to(cache.dtype.element_ty), mask=wanted)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a launch compiles for, and which blocks its tensors can see."""

    start: int
    heads: int
    dim: int
    rope: tuple[str, int, int]
    keys: bool


class TritonPlacement:
    """The tensors of a prompt's cache, ready to take blocks.

    Args:
        rows: Keys and values of each layer in turn; channels of a row contiguous, all of one dtype on one device. With
            `slots`, as many rows as the cache has slots, beginning at position 0.
        end: Absolute position behind the last one that will be placed.
        link: The device.
        slots: Int64, the row of each absolute position up to `end`; None where rows follow each other.

    Raises:
        InputError: Channels that do not lie one behind the other.
    """

    def __init__(self, rows: Sequence[Rows], end: int, link: Link, slots: torch.Tensor | None = None) -> None:
        for r in rows:
            if r.states.stride(2) != 1:
                raise InputError(f"rows of strides {r.states.stride()} are not contiguous; keep channels together")
        self._rows, self._end, self._link, self._slots = rows, end, link, slots
        self._tables: dict[RopeSpec, tuple[torch.Tensor, torch.Tensor]] = {}

    def launch(self, blocks: Sequence[PlacedBlock], layers: range) -> None:
        """Write blocks to their rows of some layers, on the device's current stream.

        Args:
            blocks: On the device, or on their way there before anything given to the current stream from now on.
            layers: A contiguous range of layers.
        """
        for precision in dict.fromkeys(block.at_rest.precision for block in blocks):
            alike = [block for block in blocks if block.at_rest.precision == precision]
            for shape, indices in self._shapes(layers, quantized=_AT_REST[precision][1] <= 8).items():
                seen = [block for block in alike if block.position + block.at_rest.num_tokens > shape.start]
                if seen and shape.heads and shape.dim:
                    self._launch(precision, shape, seen, indices)

    def _shapes(self, layers: range, *, quantized: bool) -> dict[_Shape, list[int]]:
        """Indices of the tensors, by what their launches differ in."""
        shapes: dict[_Shape, list[int]] = {}
        for index in range(2 * layers.start, 2 * layers.stop):
            mine, other = self._rows[index], self._rows[index ^ 1]
            rope = mine.rope
            # Values go with the keys, unturned, where they are shaped like them; scales differ.
            if rope.kind == "none" and not quantized and mine.states.shape == other.states.shape:
                rope = other.rope
            heads, _, dim = mine.states.shape
            key = _Shape(mine.start, heads, dim, (rope.kind, rope.start, rope.dim), quantized and index % 2 == 0)
            shapes.setdefault(key, []).append(index)
        return shapes

    def _launch(self, precision: str, shape: _Shape, blocks: Sequence[PlacedBlock], indices: Sequence[int]) -> None:
        dtype, bits = _AT_REST[precision]
        cache = self._rows[indices[0]].states
        anchors = [_anchor(one, cache.device) for one in (dtype, torch.float16, cache.dtype, torch.float32)]
        bases = np.array([anchor.data_ptr() for anchor in anchors], np.int64)
        addresses = np.stack([block.at_rest.sections[indices] for block in blocks])
        addresses += np.array([block.address for block in blocks], np.int64)[:, None, None]
        sources = (addresses - bases[:2]) // np.array([anchor.element_size() for anchor in anchors[:2]], np.int64)
        targets = np.array([self._target(at, index, bases) for at, index in enumerate(indices)], np.int64)
        aligned = not ((addresses % 16).any() or (targets[:, 1:4] % 8).any() or (targets[:, 5:7] % 4).any())
        sizes = np.array([(block.at_rest.num_tokens, block.position) for block in blocks], np.int64)
        tables = self._link.upload(sizes, sources, targets)
        half = shape.rope[2] // 2
        others = shape.dim - 2 * half
        key_group, value_group = _groups(precision)
        tiles = -(-max(block.at_rest.num_tokens for block in blocks) // _TILE)
        _place[(tiles, len(blocks), len(indices))](
            *tables,
            tables[0] if self._slots is None else self._slots,
            *anchors,
            len(indices),
            BITS=bits,
            HEADS=shape.heads,
            DIM=shape.dim,
            KIND=_KINDS[shape.rope[0]],
            BEGIN=shape.rope[1],
            HALF=half,
            HALF_ROOM=_room(half),
            OTHERS=others,
            OTHERS_ROOM=_room(others),
            KEYS=shape.keys,
            GROUP=key_group if shape.keys else value_group,
            PAGED=self._slots is not None,
            PACK=16 // anchors[0].element_size() if aligned else 0,
            TILE=_TILE,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )

    def _target(self, at: int, index: int, bases: NDArray[np.int64]) -> tuple[int, ...]:
        """A row of the kernel's `targets`; addresses relative to the anchors, in elements."""
        rows = self._rows[index]
        states, tables = rows.states, self._angles(rows.rope)
        first = (states.data_ptr() - int(bases[2])) // states.element_size()
        cos, sin = ((table.data_ptr() - int(bases[3])) // 4 for table in tables) if tables else (0, 0)
        return at, first, states.stride(0), states.stride(1), rows.start, cos, sin, tables is not None

    def _angles(self, rope: RopeSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
        if rope.kind == "none":
            return None
        # Kept here as well: the kernel reads them by address.
        if rope not in self._tables:
            self._tables[rope] = angle_table(rope, self._end, self._rows[0].states.device)
        return self._tables[rope]


def _groups(precision: str) -> tuple[int, int]:
    """Tokens per key scale and channels per value scale; 0 for all of them."""
    if _AT_REST[precision][1] > 8:
        return 0, 0
    from blockrag.quantize import GROUPS

    keys, values = GROUPS[precision]
    return keys, values


@lru_cache(maxsize=64)
def _anchor(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(16, dtype=dtype, device=device)


def _room(count: int) -> int:
    """Triton's ranges are powers of two."""
    return 1 << max(0, count - 1).bit_length()
