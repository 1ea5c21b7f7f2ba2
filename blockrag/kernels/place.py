"""The compiled way of placing a block into a prompt's cache: convert, rotate and write in one pass over its bytes.

Owns the description of the cache's slots that `place.c` reads. Knows neither which blocks a prompt has nor where they
come from, and refuses what the C code does not do (other caches than float32 in host memory), so that the caller can
fall back to torch.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from blockrag.kernels.build import library
from blockrag.kv import BlockKV
from blockrag.quantize import SCHEMES
from blockrag.rope import angle_table

if TYPE_CHECKING:
    from blockrag.quantize import StoredKV
    from blockrag.rope import RopeSpec

__all__ = ["CompiledPlacement", "Rows"]

_ROPES: Final = {"none": 0, "half": 1, "interleaved": 2}
_DTYPES: Final = {torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}
_QUANTIZED: Final = {"int8": 4, "int4": 5}
_MAX_DIM: Final = 1024
# A cache this large does not stay in the processor's cache until it is read: writing past it saves reading it first.
_STREAMING_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """The new rows of one tensor (keys or values) of one layer.

    Args:
        states: Shape (heads, rows, dim), the rows of a head contiguous; to be written.
        start: Absolute position of the first row; tokens before it are not kept.
        rope: What turns.
    """

    states: torch.Tensor
    start: int
    rope: RopeSpec


class _Slot(ctypes.Structure):
    """`struct slot` of place.c."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("head_stride", ctypes.c_int64),
        ("start", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("heads", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("rope", ctypes.c_int32),
        ("rope_start", ctypes.c_int32),
        ("rope_dim", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("streaming", ctypes.c_int32),
    )


class CompiledPlacement:
    """The slots of one run of blocks, ready for `place`, which several threads may call for different blocks.

    Args:
        rows: Keys and values of each layer in turn, float32 in host memory.
        end: Absolute position behind the last row.
    """

    def __init__(self, rows: Sequence[Rows], end: int) -> None:
        self._rows = rows
        self._end = end
        self._tables: list[torch.Tensor] = []
        self._streaming = sum(r.states.numel() for r in rows) * 4 >= _STREAMING_BYTES
        # One description per precision, made when it is needed: the groups of the scales differ.
        self._slots: dict[int, ctypes.Array[_Slot]] = {}
        self._lock = threading.Lock()

    @classmethod
    def of(cls, rows: Sequence[Rows], end: int) -> CompiledPlacement | None:
        """The placement, or None where these rows, or this machine, are not for compiled code."""
        for r in rows:
            states = r.states
            dim = states.shape[-1]
            if states.dtype != torch.float32 or states.device.type != "cpu" or dim > _MAX_DIM:
                return None
            if states.shape[1] and states.stride()[1:] != (dim, 1):
                return None
        return None if library() is None else cls(rows, end)

    def place(self, kv: StoredKV, position: int, layers: range) -> None:
        """Write the block of `kv` to its rows of some layers, converted and rotated.

        Args:
            kv: A block whose payload lies in host memory.
            position: Absolute position of its first token.
            layers: A contiguous range of layers.

        Raises:
            ValueError: The block does not lie within the rows; nothing was written.
        """
        if position < 0 or position + kv.num_tokens > self._end:
            raise ValueError(
                f"tokens {position} to {position + kv.num_tokens} do not fit a run that ends at {self._end}"
            )
        if isinstance(kv, BlockKV):
            payload, code, refined = kv.data, _DTYPES[kv.data.dtype], 0
        else:
            payload, code, refined = kv.payload, _QUANTIZED[kv.precision], kv.map.num_refined
        compiled = library()
        if compiled is None:
            raise AssertionError("of() gives a placement only where there is a library")
        compiled.blockrag_place(
            self._slots_for(kv, code),
            ctypes.c_int32(2 * layers.start),
            ctypes.c_int32(2 * layers.stop),
            ctypes.c_void_p(payload.data_ptr()),
            ctypes.c_int32(code),
            ctypes.c_int64(refined),
            ctypes.c_int64(kv.num_tokens),
            ctypes.c_int64(position),
        )

    def _slots_for(self, kv: StoredKV, code: int) -> ctypes.Array[_Slot]:
        with self._lock:
            if code not in self._slots:
                value_group = 0 if isinstance(kv, BlockKV) else SCHEMES[kv.precision].value_group
                self._slots[code] = self._describe(value_group)
            return self._slots[code]

    def _describe(self, value_group: int) -> ctypes.Array[_Slot]:
        slots = (_Slot * len(self._rows))()
        for index, (slot, r) in enumerate(zip(slots, self._rows, strict=True)):
            keys = index % 2 == 0
            slot.rows, slot.head_stride, slot.start = r.states.data_ptr(), r.states.stride(0), r.start
            slot.heads, slot.dim = r.states.shape[0], r.states.shape[2]
            slot.rope, slot.rope_start, slot.rope_dim = _ROPES[r.rope.kind], r.rope.start, r.rope.dim
            slot.group, slot.streaming = 0 if keys else value_group, self._streaming
            if r.rope.kind != "none":
                cos, sin = angle_table(r.rope, self._end, torch.device("cpu"))
                self._tables += (cos, sin)
                slot.cos, slot.sin = cos.data_ptr(), sin.data_ptr()
        return slots
