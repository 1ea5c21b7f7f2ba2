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

# Tokens a program places: enough to keep its threads busy, few enough that short blocks waste little.
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
        # It is 1 for some models; that needs no code of its own.
        return triton.jit(function, do_not_specialize=["num_sources"])
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(function)


@_jit
def _invert(
    blocks: tl.tensor,
    number: tl.tensor,
    ordinals: tl.tensor,
    CHANNELS: tl.constexpr,
    REFINED: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Which of a block's refined channels a channel is, counted from 1, and its zero. Grid: tiles of these, blocks.

    `blocks` int64 (blocks): where the refined channels begin, from `number`. `ordinals` int32 (blocks, 2, CHANNELS),
    zeros: the ordinals, then what numbers are counted from.
    """
    block = tl.program_id(1).to(tl.int64)
    ordinal = tl.program_id(0) * TILE + tl.arange(0, TILE)
    mask = ordinal < REFINED
    refined = number + tl.load(blocks + block) + ordinal
    to = ordinals + block * 2 * CHANNELS + tl.load(refined, mask=mask, other=0)
    tl.store(to, ordinal + 1, mask=mask)
    tl.store(to + CHANNELS, tl.load(refined + REFINED, mask=mask, other=0), mask=mask)


@_jit
def _refinement(
    ordinals: tl.tensor,
    nibbles: tl.tensor,
    channel: tl.tensor,
    known: tl.tensor,
    tokens: tl.tensor,
    token: tl.tensor,
    mask: tl.tensor,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
    """What refines a tile of key channels, by their numbers in the block; 0 where nothing does."""
    ordinal = tl.load(ordinals + channel, mask=known, other=0)
    zero = tl.load(ordinals + CHANNELS + channel, mask=known, other=0).to(tl.float32)
    width = (tokens + 1) // 2
    high = token >= width
    at = (ordinal - 1)[None, :] * width + tl.where(high, token - width, token)[:, None]
    # 136 is two zeros.
    pair = tl.load(nibbles + at, mask=tl.where(mask, ordinal[None, :], 0) > 0, other=136).to(tl.int32)
    return (tl.where(high[:, None], pair >> 4, pair & 15) - 8).to(tl.float32) / 16 + zero[None, :]


@_jit
def _read(
    elements: tl.tensor,
    scales: tl.tensor,
    ordinals: tl.tensor,
    nibbles: tl.tensor,
    head: tl.tensor,
    tokens: tl.tensor,
    token: tl.tensor,
    channel: tl.tensor,
    mask: tl.tensor,
    BITS: tl.constexpr,
    DIM: tl.constexpr,
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
) -> tl.tensor:
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
    if CHANNELS > 0:
        numbers += _refinement(ordinals, nibbles, head * DIM + channel, channel < DIM, tokens, token, mask, CHANNELS)
    if BITS <= 8:
        if GROUP == 0:
            scale = tl.load(scales + head * DIM + channel, mask=channel < DIM, other=0)
            numbers = numbers * scale.to(tl.float32)[None, :]
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
    ordinal: tl.tensor,
    nibble: tl.tensor,
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
    GROUP: tl.constexpr,
    CHANNELS: tl.constexpr,
    PAGED: tl.constexpr,
    PACK: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """A tile of a block's tokens, all heads of one tensor. Grid: tiles of the longest block, blocks, tensors.

    `payload` to `table` only give types and a place to count from: everything is reached by its distance from them, in
    elements; but `ordinal` is what `_invert` made, with CHANNELS > 0 per row. `blocks` int64 (blocks, 4): tokens,
    absolute position of the first, row of the ordinals, where the refinements begin. `sources` int64 (blocks,
    num_sources, 2): where elements and scales begin. `targets` int64 (tensors, 9): index into the sources, where the
    first row begins, elements from head to head and from row to row, absolute position of the first row, where cosines
    and sines begin, whether it turns, number of its first key channel. `slots` int64: row of each absolute position,
    where PAGED. PACK > 0 promises that payload, scales and cache begin, and the cache's rows and heads lie apart, by
    multiples of 16 bytes (of 32, for a float32 cache), which is PACK elements of the payload.
    """
    block = tl.program_id(1).to(tl.int64)
    target = targets + tl.program_id(2) * 9
    tokens = tl.load(blocks + block * 4)
    position = tl.load(blocks + block * 4 + 1)
    ordinals = ordinal + tl.load(blocks + block * 4 + 2) * 2 * CHANNELS + tl.load(target + 8)
    nibbles = nibble + tl.load(blocks + block * 4 + 3)
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
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
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
                x = _read(
                    elements,
                    scales,
                    ordinals,
                    nibbles,
                    head,
                    tokens,
                    token,
                    x_channel,
                    both,
                    BITS,
                    DIM,
                    GROUP,
                    CHANNELS,
                )
                y = _read(
                    elements,
                    scales,
                    ordinals,
                    nibbles,
                    head,
                    tokens,
                    token,
                    y_channel,
                    both,
                    BITS,
                    DIM,
                    GROUP,
                    CHANNELS,
                )
                to = rows + head * head_stride + row[:, None]
                tl.store(to + x_channel[None, :], (x * cos - y * sin).to(cache.dtype.element_ty), mask=both)
                tl.store(to + y_channel[None, :], (y * cos + x * sin).to(cache.dtype.element_ty), mask=both)
        else:
            pairs = tl.arange(0, 2 * HALF_ROOM)
            xy_channel = BEGIN + pairs
            all_pairs = visible[:, None] & (pairs < 2 * HALF)[None, :]
            for head in range(HEADS):
                xy = _read(
                    elements,
                    scales,
                    ordinals,
                    nibbles,
                    head,
                    tokens,
                    token,
                    xy_channel,
                    all_pairs,
                    BITS,
                    DIM,
                    GROUP,
                    CHANNELS,
                )
                x, y = tl.split(tl.reshape(xy, (TILE, HALF_ROOM, 2)))
                turned = tl.reshape(tl.join(x * cos - y * sin, y * cos + x * sin), (TILE, 2 * HALF_ROOM))
                to = rows + head * head_stride + row[:, None] + xy_channel[None, :]
                tl.store(to, turned.to(cache.dtype.element_ty), mask=all_pairs)
    if OTHERS > 0:
        other = tl.arange(0, OTHERS_ROOM)
        channel = tl.where(other < BEGIN, other, other + 2 * HALF)
        wanted = visible[:, None] & (other < OTHERS)[None, :]
        for head in range(HEADS):
            x = _read(
                elements, scales, ordinals, nibbles, head, tokens, token, channel, wanted, BITS, DIM, GROUP, CHANNELS
            )
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
        self._blocks: dict[str, list[PlacedBlock]] = {}
        self._ordinals: dict[str, torch.Tensor] = {}
        self._tables: dict[RopeSpec, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(self, blocks: Sequence[PlacedBlock]) -> None:
        """The blocks of the run, all of them, before anything is launched."""
        for block in blocks:
            self._blocks.setdefault(block.at_rest.precision, []).append(block)

    def launch(self, layers: range) -> None:
        """Write the blocks to their rows of some layers, on the device's current stream.

        Args:
            layers: A contiguous range; what the blocks hold of them, and of the first layer, is on the device, or on
                its way there before anything that the current stream is given from now on.
        """
        with self._link.current():
            for precision, blocks in self._blocks.items():
                self._launch_precision(precision, blocks, layers)

    def _launch_precision(self, precision: str, blocks: Sequence[PlacedBlock], layers: range) -> None:
        quantized = _AT_REST[precision][1] <= 8
        if quantized and precision not in self._ordinals:
            self._ordinals[precision] = self._inverted(blocks)
        for shape, indices in self._shapes(layers, quantized=quantized).items():
            ends = [block.position + block.at_rest.num_tokens for block in blocks]
            seen = [(row, block) for row, block in enumerate(blocks) if ends[row] > shape.start]
            if seen and shape.heads and shape.dim:
                self._launch(precision, shape, seen, indices)

    def _inverted(self, blocks: Sequence[PlacedBlock]) -> torch.Tensor:
        """See `_invert`; int32, shape (blocks, 2, key channels)."""
        at_rest, device = blocks[0].at_rest, self._rows[0].states.device
        ordinals = torch.zeros((len(blocks), 2, max(1, at_rest.num_channels)), dtype=torch.int32, device=device)
        number = _anchor(torch.int32, device)
        begins = np.array([block.address + block.at_rest.refined[0] for block in blocks], np.int64)
        (table,) = self._link.upload((begins - number.data_ptr()) // 4)
        tile = 256
        _invert[(-(-at_rest.num_refined // tile), len(blocks))](
            table,
            number,
            ordinals,
            CHANNELS=ordinals.shape[2],
            REFINED=at_rest.num_refined,
            TILE=tile,
            enable_fp_fusion=True,
        )
        return ordinals

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

    def _launch(
        self, precision: str, shape: _Shape, seen: Sequence[tuple[int, PlacedBlock]], indices: Sequence[int]
    ) -> None:
        dtype, bits = _AT_REST[precision]
        cache = self._rows[indices[0]].states
        kinds = (dtype, torch.float16, torch.int32, torch.uint8, cache.dtype, torch.float32)
        anchors = [_anchor(kind, cache.device) for kind in kinds]
        blocks = [block for _, block in seen]
        bases = np.array([anchor.data_ptr() for anchor in anchors], np.int64)
        sizes = np.array([anchor.element_size() for anchor in anchors], np.int64)
        begins = np.array([block.address for block in blocks], np.int64)
        addresses = np.stack([block.at_rest.sections[indices] for block in blocks]) + begins[:, None, None]
        nibbles = np.array([block.at_rest.refined[1] for block in blocks], np.int64) + begins - bases[3]
        known = np.array(
            [
                (block.at_rest.num_tokens, block.position, row, at)
                for (row, block), at in zip(seen, nibbles, strict=True)
            ],
            np.int64,
        )
        first_channel = blocks[0].at_rest.first_channel
        targets = np.array(
            [(at, *self._target(index, bases), first_channel[index // 2]) for at, index in enumerate(indices)], np.int64
        )
        aligned = not ((addresses % 16).any() or (targets[:, 1:4] % 8).any() or (targets[:, 5:7] % 4).any())
        tables = self._link.upload(known, (addresses - bases[:2]) // sizes[:2], targets)
        half = shape.rope[2] // 2
        others = shape.dim - 2 * half
        if shape.keys:
            anchors[2] = self._ordinals[precision]
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
            GROUP=0 if shape.keys else blocks[0].at_rest.value_group,
            CHANNELS=anchors[2].shape[2] if shape.keys else 0,
            PAGED=self._slots is not None,
            PACK=16 // anchors[0].element_size() if aligned else 0,
            TILE=_TILE,
            num_warps=_WARPS,
            enable_fp_fusion=True,
        )

    def _target(self, index: int, bases: NDArray[np.int64]) -> tuple[int, ...]:
        """The middle of a row of the kernel's `targets`; addresses relative to the anchors, in elements."""
        rows = self._rows[index]
        states, tables = rows.states, self._angles(rows.rope)
        first = (states.data_ptr() - int(bases[4])) // states.element_size()
        cos, sin = ((table.data_ptr() - int(bases[5])) // 4 for table in tables) if tables else (0, 0)
        return first, states.stride(0), states.stride(1), rows.start, cos, sin, int(tables is not None)

    def _angles(self, rope: RopeSpec) -> tuple[torch.Tensor, torch.Tensor] | None:
        if rope.kind == "none":
            return None
        # Kept here as well: the kernel reads them by address.
        if rope not in self._tables:
            self._tables[rope] = angle_table(rope, self._end, self._rows[0].states.device)
        return self._tables[rope]


@lru_cache(maxsize=64)
def _anchor(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    return torch.empty(16, dtype=dtype, device=device)


def _room(count: int) -> int:
    """Triton's ranges are powers of two."""
    return 1 << max(0, count - 1).bit_length()
