"""Real encoded blocks of any size, the same for the same number in every process, and how to judge what comes back."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from blockrag import codec
from blockrag.errors import DamagedBlockError
from blockrag.kv import BlockKV, KVLayout, LayerShape

__all__ = ["FINGERPRINT", "HEADER_BYTES", "IN_FILE", "IN_ROW", "LAYOUT", "block", "judge", "key", "locate"]

LAYOUT = KVLayout((LayerShape(1, 8, 1, 8),))
FINGERPRINT = "cd" * 16
HEADER_BYTES = 128
_TOKEN_BYTES = 32
# Sizes on both sides of the limit at which the disk store gives a block a file of its own.
IN_ROW, IN_FILE = 2_048, 40_960


def key(number: int) -> str:
    """The key of a block; neighbours' keys have nothing in common, as those of real blocks."""
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=32).hexdigest()


@lru_cache(maxsize=1024)
def block(number: int, size: int) -> bytes:
    """An encoded block of `size` bytes, a multiple of 32 and more than a header."""
    tokens = (size - HEADER_BYTES) // _TOKEN_BYTES
    generator = torch.Generator().manual_seed(number)
    data = torch.randn(LAYOUT.elements_per_token * tokens, generator=generator)
    encoded = codec.encode(BlockKV(LAYOUT, tokens, data), key=key(number), fingerprint=FINGERPRINT, precision="float16")
    assert len(encoded) == size
    return bytes(encoded)


def judge(
    number: int, data: memoryview | bytes | None, expected: bytes
) -> Literal["right", "missing", "refused", "wrong"]:
    """What a reader makes of the bytes a store gave for a block: it uses them, computes it anew, or is deceived."""
    if data is None:
        return "missing"
    try:
        codec.decode(data, key=key(number), fingerprint=FINGERPRINT, layout=LAYOUT)
    except DamagedBlockError:
        return "refused"
    return "right" if data == expected else "wrong"


def locate(root: Path, data: bytes) -> tuple[Path, int]:
    """The file below `root` that holds `data` in one piece, and where in it."""
    for path in sorted(root.rglob("*")):
        if path.is_file() and (offset := path.read_bytes().find(data)) >= 0:
            return path, offset
    raise AssertionError(f"no file below {root} holds the block in one piece")
