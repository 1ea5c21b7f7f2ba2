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

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockrag.kv import KVLayout
    from blockrag.quantize import StoredKV

__all__ = ["AtRest", "PlacedBlock", "payload_of"]


@dataclass(frozen=True, slots=True, eq=False)
class AtRest:
    """How a block lies in its payload.

    Args:
        num_tokens: Its tokens.
        precision: The name of its dtype, or of its quantisation.
        sections: Bytes from the payload's start, shape (2 * layers, 2): for keys and values of each layer in turn, the
            elements and the scales (0 where there are none).
        borders: Where each layer begins, in bytes, and the last one ends.
    """

    num_tokens: int
    precision: str
    sections: NDArray[np.int64]
    borders: tuple[int, ...]

    @classmethod
    def of(cls, kv: StoredKV) -> AtRest:
        """How `kv` lies."""
        if isinstance(kv, BlockKV):
            return _floats_at_rest(kv.layout, kv.num_tokens, kv.data.dtype)
        raise NotImplementedError


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
    return AtRest(num_tokens, str(dtype).removeprefix("torch."), sections, borders)
