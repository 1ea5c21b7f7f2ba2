"""Where a block's tensors begin in its payload, for code that is given addresses instead of tensors.

Says again, in bytes, what blockrag/kv.py (float precisions) and blockrag/quantize.py (int8, int4) say in views. Knows
neither where a payload lies nor what becomes of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import torch

from blockrag.kv import BlockKV
from blockrag.quantize import SCHEMES, payload_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockrag.kv import KVLayout
    from blockrag.quantize import QuantizedPrecision, StoredKV

__all__ = ["AtRest", "PlacedBlock", "payload_of"]


@dataclass(frozen=True, slots=True, eq=False)
class AtRest:
    """How a block lies in its payload.

    Args:
        num_tokens: Its tokens.
        precision: The name of its dtype, or of its quantisation.
        sections: Bytes from the payload's start, shape (2 * layers, 2): for keys and values of each layer in turn, the
            elements and the scales (0 where there are none).
        borders: Where each layer begins, in bytes, and the last one ends; what lies before them belongs to the first.
        first_channel: The number of each layer's first key channel.
        refined: Where the numbers of the refined key channels begin, behind which their zeros lie, and their
            refinements; 0 where there are none.
        num_refined: How many there are.
        num_channels: Key channels, refined or not.
        value_group: Channels that share one scale of a token's values; 0 where scales belong to channels.
    """

    num_tokens: int
    precision: str
    sections: NDArray[np.int64]
    borders: tuple[int, ...]
    first_channel: tuple[int, ...]
    refined: tuple[int, int] = (0, 0)
    num_refined: int = 0
    num_channels: int = 0
    value_group: int = 0

    @classmethod
    def of(cls, kv: StoredKV) -> AtRest:
        """How `kv` lies."""
        if isinstance(kv, BlockKV):
            return _floats_at_rest(kv.layout, kv.num_tokens, kv.data.dtype)
        return _quantized_at_rest(kv.layout, kv.num_tokens, kv.precision)


@dataclass(frozen=True, slots=True)
class PlacedBlock:
    """A block on the device, and its place.

    Args:
        at_rest: How it lies in its payload.
        address: Where the payload begins in the device's memory.
        position: Absolute position of its first token.
    """

    at_rest: AtRest
    address: int
    position: int


def payload_of(kv: StoredKV) -> torch.Tensor:
    """The block's bytes, one-dimensional uint8, where they lie."""
    return kv.data.view(torch.uint8) if isinstance(kv, BlockKV) else kv.payload


@lru_cache(maxsize=1024)
def _floats_at_rest(layout: KVLayout, num_tokens: int, dtype: torch.dtype) -> AtRest:
    size = num_tokens * dtype.itemsize
    layers = list(zip(layout.layers, layout.offsets, strict=True))
    elements = [first for shape, offset in layers for first in (offset, offset + shape.key_size)]
    sections = np.zeros((len(elements), 2), np.int64)
    sections[:, 0] = np.array(elements, np.int64) * size
    borders = (*(offset * size for offset in layout.offsets), layout.elements_per_token * size)
    return AtRest(num_tokens, str(dtype).removeprefix("torch."), sections, borders, (0,) * len(layers))


@lru_cache(maxsize=1024)
def _quantized_at_rest(layout: KVLayout, num_tokens: int, precision: QuantizedPrecision) -> AtRest:
    where = payload_map(layout, num_tokens, precision)
    pairs = [
        pair
        for one in where.layers
        for pair in ((one.keys.offset, one.key_scales.offset), (one.values.offset, one.value_scales.offset))
    ]
    return AtRest(
        num_tokens,
        precision,
        np.array(pairs, np.int64),
        (0, *(one.key_scales.offset for one in where.layers[1:]), where.nbytes),
        where.first_channel[:-1],
        (where.refined.offset, where.refinements.offset),
        where.num_refined,
        where.first_channel[-1],
        SCHEMES[precision].value_group,
    )
