r"""int8 and int4 at rest: how KV states become small integers and scales, and where each lies in a block's payload.

A number is `x = q * scale`, symmetric, `scale` a positive float16. int8 keeps q in [-127, 127], int4 in [-7, 7]. One
scale serves one channel of a head over all of the block's tokens; the values of int4 have one for each 32 channels of
a token instead. Those *key* channels that reach furthest, counted over all layers and heads of the block, are refined:
each of their numbers keeps four more bits, and each channel a middle to count from: `x = (q + r / 16 + zero) * scale`
with r in [-8, 7] and a whole `zero`.

Why: an error in a key is an error in a logit, and its size is that of the channel's scale. Layers whose keys reach far
attend sharply, and there a rounded key picks another token. Measured on the model that ships with blockrag, equal bytes
spent anywhere else (smaller groups, minimum and scale, rotated channels, the widest channels of each layer rather than
of the block) leave more answers changed; docs/guide/storage-and-sizing.md has the figures. Some families add a large
constant to a few key channels (the bias of Qwen2's projections): those reach furthest, and their zero takes the
constant out. That one scale per channel suits keys, and one per token values, is the finding of KIVI (arXiv
2402.02750).

The payload, every section starting at a multiple of 16 bytes from its beginning, with zeros between:

    refined  int32 [2, refined]: the channels, ascending (counted layer after layer, head after head), and the zero of
             each, from -32767 to 32767
    their r  nibbles [refined, ceil(tokens / 2)]
    layer 0  key scales    float16 [key_heads, key_dim]
             keys          int8 [key_heads, tokens, key_dim], or nibbles [key_heads, tokens, ceil(key_dim / 2)]
             value scales  int8: float16 [value_heads, value_dim]
                           int4: float16 [value_heads, tokens, ceil(value_dim / 32)]
             values        as keys, with value_heads and value_dim
    layer 1  ...

A row of n nibbles takes H = ceil(n / 2) bytes: byte j holds q[j] + 8 in its low half and q[j + H] + 8 in its high half,
8 where there is no q[j + H].

Nothing here knows about headers, checksums, stores or caches. NaN, infinity and what float16 scales cannot span are
refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import torch

from blockrag.errors import InputError
from blockrag.kv import BlockKV, KVLayout, explain_unfit

__all__ = [
    "SCHEMES",
    "LayerSections",
    "PayloadMap",
    "QuantizedKV",
    "QuantizedPrecision",
    "Scheme",
    "Section",
    "StoredKV",
    "payload_map",
    "quantize",
    "quantize_into",
]

QuantizedPrecision: TypeAlias = Literal["int8", "int4"]
"""The precisions at rest that keep integers and scales."""

_ALIGNMENT: Final = 16
_LARGEST_SCALE_BITS: Final = 0x7BFF
_LARGEST_ZERO: Final = 32767


class Scheme(NamedTuple):
    """How one precision quantises.

    Args:
        limit: The largest q; the smallest is its negative.
        bits: Bits of one q: 8, or 4 and then two to a byte.
        value_group: Channels that share one scale of a token's values; 0 where values are scaled per channel, as keys.
        refined_share: One key channel in that many is refined.
    """

    limit: int
    bits: int
    value_group: int
    refined_share: int


SCHEMES: Final[dict[QuantizedPrecision, Scheme]] = {
    "int8": Scheme(limit=127, bits=8, value_group=0, refined_share=16),
    "int4": Scheme(limit=7, bits=4, value_group=32, refined_share=8),
}


class Section(NamedTuple):
    """A part of the payload, in bytes from its beginning."""

    offset: int
    nbytes: int


class LayerSections(NamedTuple):
    """Where one layer lies."""

    key_scales: Section
    keys: Section
    value_scales: Section
    values: Section


class _Run(NamedTuple):
    """Scale sections of equal size at equal distances: `times` times `numbers` float16, `stride` bytes apart."""

    offset: int
    times: int
    stride: int
    numbers: int


@dataclass(frozen=True, slots=True)
class PayloadMap:
    """Where everything lies in the payload of a block.

    Args:
        refined: The numbers of the refined channels, and their zeros.
        refinements: Their r.
        num_refined: How many channels these are.
        layers: The layers.
        first_channel: The number of each layer's first key channel; behind them, how many there are.
        nbytes: Bytes of the payload.
        scale_runs: All scale sections, for checking them at once.
    """

    refined: Section
    refinements: Section
    num_refined: int
    layers: tuple[LayerSections, ...]
    first_channel: tuple[int, ...]
    nbytes: int
    scale_runs: tuple[_Run, ...]


@lru_cache(maxsize=1024)
def payload_map(layout: KVLayout, num_tokens: int, precision: QuantizedPrecision) -> PayloadMap:
    """Where everything lies in the payload of a block of `num_tokens` tokens."""
    scheme = SCHEMES[precision]
    first_channel = [0]
    for shape in layout.layers:
        first_channel.append(first_channel[-1] + shape.key_size)
    num_refined = -(-first_channel[-1] // scheme.refined_share)
    end = 0

    def section(nbytes: int) -> Section:
        nonlocal end
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = begin + nbytes
        return Section(begin, nbytes)

    refined, refinements = section(8 * num_refined), section(num_refined * _row_bytes(num_tokens, 4))
    layers = []
    for shape in layout.layers:
        groups = num_tokens * -(-shape.value_dim // scheme.value_group) if scheme.value_group else shape.value_dim
        layers.append(
            LayerSections(
                section(2 * shape.key_size),
                section(shape.key_heads * num_tokens * _row_bytes(shape.key_dim, scheme.bits)),
                section(2 * shape.value_heads * groups),
                section(shape.value_heads * num_tokens * _row_bytes(shape.value_dim, scheme.bits)),
            )
        )
    scales = _runs([layer.key_scales for layer in layers]) + _runs([layer.value_scales for layer in layers])
    return PayloadMap(refined, refinements, num_refined, tuple(layers), tuple(first_channel), end, scales)


@dataclass(frozen=True, eq=False)
class QuantizedKV:
    """The quantised KV states of one block, with keys un-rotated. Immutable by contract: nobody writes into `payload`.

    Args:
        layout: The model's layer shapes.
        num_tokens: Tokens in the block, at least one.
        precision: How the numbers are kept.
        payload: One-dimensional contiguous uint8 tensor as the page of `blockrag.quantize` draws it, on any device, at
            an address that is a multiple of 4.

    Raises:
        InputError: `payload` has another shape than the layout and the number of tokens require.
    """

    layout: KVLayout
    num_tokens: int
    precision: QuantizedPrecision
    payload: torch.Tensor

    def __post_init__(self) -> None:
        expected = payload_map(self.layout, self.num_tokens, self.precision).nbytes if self.num_tokens > 0 else -1
        if self.payload.dtype != torch.uint8 or self.payload.ndim != 1 or self.payload.numel() != expected:
            raise InputError(
                f"{self.precision} KV states of {self.num_tokens} tokens need a one-dimensional uint8 tensor of "
                f"{expected} elements, got {self.payload.dtype} of shape {tuple(self.payload.shape)}; build it with "
                "the same KVLayout"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the KV states, scales and padding included."""
        return self.payload.numel()

    @cached_property
    def map(self) -> PayloadMap:
        """Where everything lies in the payload."""
        return payload_map(self.layout, self.num_tokens, self.precision)

    def sections(self, layer: int) -> LayerSections:
        """Where one layer lies in the payload."""
        return self.map.layers[layer]

    @cached_property
    def first_refined(self) -> tuple[int, ...]:
        """For each layer the place of its first channel among the refined ones; behind them, how many there are."""
        channels = self._refined[0].cpu().numpy()
        return tuple(np.searchsorted(channels, self.map.first_channel).tolist())

    def keys(self, layer: int) -> torch.Tensor:
        """Un-rotated keys of one layer, dequantised: float32, shape (key_heads, tokens, key_dim)."""
        shape, where = self.layout.layers[layer], self.map.layers[layer]
        numbers = self._numbers(where.keys, shape.key_heads, shape.key_dim)
        self._refine(numbers, layer)
        return numbers.mul_(self._section(where.key_scales, torch.float16).view(shape.key_heads, 1, shape.key_dim))

    def values(self, layer: int) -> torch.Tensor:
        """Values of one layer, dequantised: float32, shape (value_heads, tokens, value_dim)."""
        shape, where = self.layout.layers[layer], self.map.layers[layer]
        numbers = self._numbers(where.values, shape.value_heads, shape.value_dim)
        scales, group = self._section(where.value_scales, torch.float16), SCHEMES[self.precision].value_group
        if group:
            by_group = scales.view(shape.value_heads, self.num_tokens, -(-shape.value_dim // group))
            scales = by_group.repeat_interleave(group, dim=-1)[..., : shape.value_dim]
        else:
            scales = scales.view(shape.value_heads, 1, shape.value_dim)
        return numbers.mul_(scales)

    def damage(self) -> Literal["scale", "channel"] | None:
        """What cannot be: a scale that is not a positive finite number, or refined channels that are none.

        Returns:
            Which of the two was found, None where neither. In host memory only.
        """
        payload = self.payload.numpy()
        for run in self.map.scale_runs:
            bits = np.ndarray((run.times, run.numbers), np.int16, payload.data, run.offset, (run.stride, 2))
            # As integers, positive finite float16 numbers are those from 1 to 0x7bff.
            if bits.min() < 1 or bits.max() > _LARGEST_SCALE_BITS:
                return "scale"
        channels, zeros = self._refined.numpy()
        if len(channels) == 0:
            return None
        within = channels[0] >= 0 and channels[-1] < self.map.first_channel[-1]
        within = within and zeros.min() >= -_LARGEST_ZERO and zeros.max() <= _LARGEST_ZERO
        return None if within and bool((channels[1:] > channels[:-1]).all()) else "channel"

    @property
    def _refined(self) -> torch.Tensor:
        """Numbers and zeros of the refined channels, shape (2, refined)."""
        return self._section(self.map.refined, torch.int32).view(2, -1)

    def _section(self, where: Section, dtype: torch.dtype) -> torch.Tensor:
        return self.payload[where.offset : where.offset + where.nbytes].view(dtype)

    def _numbers(self, where: Section, heads: int, dim: int) -> torch.Tensor:
        """Every q as float32, shape (heads, tokens, dim)."""
        if SCHEMES[self.precision].bits == 8:
            return self._section(where, torch.int8).view(heads, self.num_tokens, dim).float()
        return _unpack(self._section(where, torch.uint8).view(heads, self.num_tokens, _row_bytes(dim, 4)), dim)

    def _refine(self, numbers: torch.Tensor, layer: int) -> None:
        """Add r / 16 + zero where a key channel of the layer is refined."""
        first, end = self.first_refined[layer : layer + 2]
        if first == end:
            return
        channels, zeros = self._refined[:, first:end]
        channels = channels - self.map.first_channel[layer]
        packed = self._section(self.map.refinements, torch.uint8).view(-1, _row_bytes(self.num_tokens, 4))[first:end]
        dim = numbers.shape[-1]
        numbers[channels // dim, :, channels % dim] += _unpack(packed, self.num_tokens) / 16 + zeros[:, None]


StoredKV: TypeAlias = BlockKV | QuantizedKV
"""KV states as they are at rest; `keys` and `values` of either give tensors of numbers."""


def quantize(kv: BlockKV, precision: QuantizedPrecision) -> QuantizedKV:
    """Quantise a block into memory of its own; see `quantize_into`."""
    payload = torch.zeros(payload_map(kv.layout, kv.num_tokens, precision).nbytes, dtype=torch.uint8)
    quantize_into(payload, kv, precision)
    return QuantizedKV(kv.layout, kv.num_tokens, precision, payload)


def quantize_into(payload: torch.Tensor, kv: BlockKV, precision: QuantizedPrecision) -> None:
    """Quantise a block.

    Args:
        payload: One-dimensional uint8 tensor in host memory of `payload_map(...).nbytes` zeros, to be written.
        kv: The block, in any floating-point dtype, on any device.
        precision: How to keep the numbers. A number is off by half its scale at most, a refined one by a sixteenth of
            it, and either by the rounding of float32.

    Raises:
        InputError: A number is NaN or infinite, or larger than `limit` times the largest float16; the message names the
            layer.
    """
    scheme, where = SCHEMES[precision], payload_map(kv.layout, kv.num_tokens, precision)
    states = BlockKV(kv.layout, kv.num_tokens, kv.data.detach().to("cpu", torch.float32))
    grid = _KeyGrid.of(states, where.num_refined, scheme.limit)
    # NaN and infinity hand themselves on from a number to its scale.
    sound = bool(torch.isfinite(grid.scales).all())
    left = []
    for layer, sections in enumerate(where.layers):
        channels = slice(*where.first_channel[layer : layer + 2])
        exact, values = grid.exact(states, layer, channels), states.values(layer)
        numbers = _rounded(exact, scheme.limit)
        refined = grid.refined[(grid.refined >= channels.start) & (grid.refined < channels.stop)] - channels.start
        at = (refined // exact.shape[-1], slice(None), refined % exact.shape[-1])
        left.append(exact[at] - numbers[at])
        _write(payload, sections.key_scales, grid.scales[channels])
        _write(payload, sections.keys, _pack(numbers, scheme.bits))
        scales = _scales(_value_tops(values, scheme.value_group), scheme.limit)
        sound = sound and bool(torch.isfinite(scales).all())
        per_number = scales.float()
        if scheme.value_group:
            per_number = per_number.repeat_interleave(scheme.value_group, dim=-1)[..., : values.shape[-1]]
        _write(payload, sections.value_scales, scales)
        _write(payload, sections.values, _pack(_rounded(values / per_number, scheme.limit), scheme.bits))
    if not sound:
        raise InputError(explain_unfit(kv, precision, torch.float16, scheme.limit, wider="float32"))
    _write(payload, where.refined, torch.stack([grid.refined, grid.zeros[grid.refined].long()]).int())
    _write(payload, where.refinements, _pack((torch.cat(left) * 16).round_().clamp_(-8, 7), 4))


class _KeyGrid(NamedTuple):
    """What the key channels of all layers are counted in.

    Args:
        scales: Float16, one per channel.
        zeros: Float32 whole numbers, one per channel; 0 where a channel is not refined.
        refined: The refined channels, ascending: those that reach furthest, the first ones of those that reach equally.
    """

    scales: torch.Tensor
    zeros: torch.Tensor
    refined: torch.Tensor

    @classmethod
    def of(cls, states: BlockKV, count: int, limit: int) -> _KeyGrid:
        """Choose them for a block of float32 states."""
        keys = [states.keys(layer) for layer in range(states.layout.num_layers)]
        low, high = (torch.cat([end(one, 1).flatten() for one in keys]) for end in (torch.amin, torch.amax))
        reach = torch.maximum(high, -low)
        refined = torch.sort(reach, descending=True, stable=True).indices[:count].sort().values
        scales, zeros = _scales(reach, limit), torch.zeros_like(reach)
        middle, half = (high + low)[refined] / 2, (high - low)[refined] / 2
        scales[refined] = _scales(torch.maximum(half, middle.abs() * (limit / _LARGEST_ZERO)), limit, slack=0)
        zeros[refined] = (middle / scales[refined].float()).round()
        return cls(scales, zeros.clamp_(-_LARGEST_ZERO, _LARGEST_ZERO), refined)

    def exact(self, states: BlockKV, layer: int, channels: slice) -> torch.Tensor:
        """The keys of one layer, whose channels are `channels`, in units of their scales, from their zeros."""
        keys = states.keys(layer)
        shape = (keys.shape[0], 1, keys.shape[2])
        return keys / self.scales[channels].float().view(shape) - self.zeros[channels].view(shape)


def _value_tops(values: torch.Tensor, group: int) -> torch.Tensor:
    """The largest magnitude for each scale: (heads, 1, dim), or (heads, tokens, groups)."""
    if not group:
        return values.abs().amax(1, keepdim=True)
    room = -values.shape[-1] % group
    padded = torch.nn.functional.pad(values.abs(), (0, room))
    return padded.view(*padded.shape[:-1], padded.shape[-1] // group, group).amax(-1)


def _scales(tops: torch.Tensor, limit: int, slack: float = 0.5) -> torch.Tensor:
    """The nearest float16 to top / limit in which the top is limit + slack at most."""
    scales = (tops / limit).half().clamp_min_(2.0**-24)
    # Subnormal numbers are so coarse that the nearest may be too small by far.
    too_small = scales.float() * (limit + slack) < tops
    return torch.where(too_small, (scales.view(torch.int16) + 1).view(torch.float16), scales)


def _rounded(exact: torch.Tensor, limit: int) -> torch.Tensor:
    return exact.round().clamp_(-limit, limit)


def _pack(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """Whole numbers as int8, or as nibbles along the last dimension."""
    if bits == 8:
        return numbers.to(torch.int8)
    whole = torch.nn.functional.pad(numbers, (0, numbers.shape[-1] % 2)).add_(8).to(torch.uint8)
    low, high = whole.tensor_split(2, dim=-1)
    return low | high << 4


def _unpack(packed: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` nibbles of each row as float32."""
    numbers = torch.empty((*packed.shape[:-1], 2 * packed.shape[-1]), dtype=torch.float32, device=packed.device)
    low, high = numbers.tensor_split(2, dim=-1)
    low.copy_(packed & 15)
    high.copy_(packed >> 4)
    return numbers.sub_(8)[..., :count]


def _write(payload: torch.Tensor, where: Section, numbers: torch.Tensor) -> None:
    payload[where.offset : where.offset + where.nbytes] = numbers.contiguous().view(-1).view(torch.uint8)


def _row_bytes(count: int, bits: int) -> int:
    return -(-count * bits // 8)


def _runs(sections: list[Section]) -> tuple[_Run, ...]:
    """Sections that are not empty, neighbours of one size and distance taken together."""
    runs: list[_Run] = []
    for offset, nbytes in sections:
        if not nbytes:
            continue
        last = runs[-1] if runs else None
        stride = offset - last.offset - (last.times - 1) * last.stride if last else 0
        if last and last.numbers == nbytes // 2 and last.times == 1:
            runs[-1] = _Run(last.offset, 2, stride, last.numbers)
        elif last and last.numbers == nbytes // 2 and last.stride == stride:
            runs[-1] = last._replace(times=last.times + 1)
        else:
            runs.append(_Run(offset, 1, 2, nbytes // 2))
    return tuple(runs)
