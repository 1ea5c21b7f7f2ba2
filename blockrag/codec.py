r"""`BlockKV` to bytes and back: the header, the precision at rest, the checksum.

An encoded block is one buffer: a header, then the payload, which is the elements of `BlockKV.data` in their order or,
for int8 and int4, what blockrag/quantize.py draws. Everything is little-endian, and the payload starts at a multiple of
64 bytes so that a tensor can be made over it in place.

    offset  bytes  field
         0      8  magic: 93 42 4C 4B 4B 56 0D 0A ("\x93BLKKV\r\n"; a text-mode copy breaks it)
         8      2  format version, now 1
        10      2  precision: 1 float32, 2 bfloat16, 3 float16, 4 int8, 5 int4
        12      4  header bytes, i.e. where the payload starts; a multiple of 64
        16     16  XXH3-128 of everything but these 16 bytes, header first, big-endian as xxHash prints it
        32     32  block key
        64     16  fingerprint
        80      4  number of tokens
        84      4  number of layers
        88      8  payload bytes
        96     16  per layer: key heads, key dim, value heads, value dim, 4 bytes each
         .      .  zeros up to the payload

Bytes that come back from a store are judged, not trusted: every length is compared with what is really there before
it is used, then the checksum, then key, fingerprint and shapes, then the scales of quantised states. Any disagreement
is a `DamagedBlockError`, which readers treat as a miss. The checksum finds accidents; it does not authenticate (XXH3
is not a cryptographic hash). Nothing here knows where the bytes are kept, or how a model computes them.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Final, Literal, NamedTuple, TypeAlias, get_args

import torch
import xxhash

from blockrag.errors import DamagedBlockError, InputError
from blockrag.fingerprint import FORMAT_VERSION, check_fingerprint, check_key
from blockrag.kv import BlockKV, KVLayout, LayerShape, explain_unfit
from blockrag.quantize import QuantizedKV, QuantizedPrecision, StoredKV, payload_map, quantize_into

__all__ = [
    "LABEL_BYTES",
    "BlockHeader",
    "BlockLabel",
    "Precision",
    "decode",
    "encode",
    "encoded_nbytes",
    "payload_nbytes",
    "read_header",
    "read_label",
    "view_encoded",
]

_FloatPrecision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Precision: TypeAlias = Literal[_FloatPrecision, QuantizedPrecision]
"""How elements are kept at rest."""

_MAGIC: Final = b"\x93BLKKV\r\n"
_HEAD: Final = struct.Struct("<8sHHI16s32s16sIIQ")
LABEL_BYTES: Final = _HEAD.size
"""The first bytes of an encoded block, which `read_label` needs."""
_CHECKSUM: Final = slice(16, 32)
_ALIGNMENT: Final = 64
_QUANTIZED_ALIGNMENT: Final = 4
_DTYPES: Final[dict[_FloatPrecision, torch.dtype]] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_CODES: Final[dict[Precision, int]] = {"float32": 1, "bfloat16": 2, "float16": 3, "int8": 4, "int4": 5}
_PRECISIONS: Final = {code: precision for precision, code in _CODES.items()}


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What an encoded block says about itself, for tools that list or inspect a store.

    Args:
        version: Format version.
        precision: Precision at rest.
        num_tokens: Tokens in the block.
        layout: Shapes of the KV states, layer by layer.
        key: The block's key, 64 hex digits.
        fingerprint: The digest of the fingerprint it was computed under, 32 hex digits.
        payload_offset: Where the elements start, in bytes.
        payload_bytes: How many bytes of elements follow.
    """

    version: int
    precision: Precision
    num_tokens: int
    layout: KVLayout
    key: str
    fingerprint: str
    payload_offset: int
    payload_bytes: int


class BlockLabel(NamedTuple):
    """What the first `LABEL_BYTES` of an encoded block claim, unverified.

    Args:
        key: 64 hex digits.
        fingerprint: 32 hex digits.
        checksum: 32 hex digits.
    """

    key: str
    fingerprint: str
    checksum: str


class _Fields(NamedTuple):
    """The header's fields after all self-consistency checks; `layers` is still packed."""

    precision: Precision
    payload_offset: int
    key: bytes
    fingerprint: bytes
    num_tokens: int
    payload_bytes: int
    layers: bytes


def encoded_nbytes(layout: KVLayout, num_tokens: int, precision: Precision) -> int:
    """Bytes of an encoded block of `num_tokens` tokens: header, padding and payload.

    Raises:
        InputError: `precision` is not one of the known ones.
    """
    return _payload_offset(layout.num_layers) + payload_nbytes(layout, num_tokens, precision)


def payload_nbytes(layout: KVLayout, num_tokens: int, precision: Precision) -> int:
    """Bytes of the KV states of a block of `num_tokens` tokens at rest, scales included, without the header.

    Raises:
        InputError: `precision` is not one of the known ones.
    """
    _checked(precision)
    if precision == "int8" or precision == "int4":
        return payload_map(layout, num_tokens, precision).nbytes
    return layout.nbytes(num_tokens, _DTYPES[precision].itemsize)


def encode(kv: BlockKV, *, key: str, fingerprint: str, precision: Precision) -> bytearray:
    """Encode one block; elements are converted (and copied from their device) straight into the result.

    Args:
        kv: The block, in any floating-point dtype, on any device.
        key: The block's key from `block_key`.
        fingerprint: `Fingerprint.digest` of the model that computed it.
        precision: How to keep the elements. Floating-point precisions round to nearest even, as torch converts; for
            the others see `blockrag.quantize`.

    Returns:
        `encoded_nbytes(kv.layout, kv.num_tokens, precision)` bytes.

    Raises:
        InputError: An element is NaN or infinite, or does not fit the precision; the message names the layer. Also a
            malformed key or fingerprint, an unknown precision, a block without elements or not of floating point.
    """
    _checked(precision)
    key_bytes, fingerprint_bytes = bytes.fromhex(check_key(key)), bytes.fromhex(check_fingerprint(fingerprint))
    if kv.data.numel() == 0 or not kv.data.is_floating_point():
        raise InputError(f"cannot encode {kv.data.numel()} elements of {kv.data.dtype}; pass floating-point KV states")
    offset = _payload_offset(kv.layout.num_layers)
    payload_bytes = payload_nbytes(kv.layout, kv.num_tokens, precision)
    out = bytearray(offset + payload_bytes)
    payload = torch.frombuffer(out, dtype=torch.uint8, offset=offset)
    if precision == "int8" or precision == "int4":
        quantize_into(payload, kv, precision)
    else:
        _convert_into(payload.view(_DTYPES[precision]), kv, precision)
    layers = _pack_layers(kv.layout)
    head = (_MAGIC, FORMAT_VERSION, _CODES[precision], offset, bytes(16), key_bytes, fingerprint_bytes)
    _HEAD.pack_into(out, 0, *head, kv.num_tokens, kv.layout.num_layers, payload_bytes)
    out[_HEAD.size : _HEAD.size + len(layers)] = layers
    out[_CHECKSUM] = _checksum(memoryview(out))
    return out


def _convert_into(elements: torch.Tensor, kv: BlockKV, precision: _FloatPrecision) -> None:
    elements.copy_(kv.data.detach())
    low, high = torch.aminmax(elements)
    # NaN fails every comparison, and aminmax hands it on.
    if not (low > -torch.inf and high < torch.inf):
        wider = "bfloat16 or float32" if precision == "float16" else "float32"
        raise InputError(explain_unfit(kv, precision, elements.dtype, wider=wider))


def decode(data: memoryview | bytes | bytearray, *, key: str, fingerprint: str, layout: KVLayout) -> StoredKV:
    """The block in `data`, after every check has passed.

    Args:
        data: An encoded block. Where it is writable and aligned the tensor lies over it, sharing its memory, and the
            caller leaves it alone from then on; else the payload is copied once.
        key: The key it was asked for by.
        fingerprint: The fingerprint digest of the model that will use it.
        layout: The KV layout of that model.

    Returns:
        The KV states in host memory, in their precision at rest.

    Raises:
        DamagedBlockError: `data` is not that block; `reason` says which check failed.
        InputError: A malformed key or fingerprint, or `data` is no contiguous buffer.
    """
    key_bytes, fingerprint_bytes = bytes.fromhex(check_key(key)), bytes.fromhex(check_fingerprint(fingerprint))
    view = _as_bytes(data)
    found = _parse(view)
    if found.key != key_bytes:
        raise DamagedBlockError(f"asked for block {key}, the bytes are block {found.key.hex()}", reason="key")
    if found.fingerprint != fingerprint_bytes:
        message = f"block {key} was computed under fingerprint {found.fingerprint.hex()}, this model is {fingerprint}"
        raise DamagedBlockError(message, reason="fingerprint")
    if found.layers != _pack_layers(layout):
        raise DamagedBlockError(f"block {key} has another KV layout than this model's", reason="shape")
    kv = _view(view, found, layout)
    if isinstance(kv, QuantizedKV) and (damage := kv.damage()):
        message = f"block {key} has a {damage} that quantising never writes; its checksum is right, its writer is not"
        raise DamagedBlockError(message, reason=damage)
    return kv


def view_encoded(data: bytearray, *, layout: KVLayout) -> StoredKV:
    """What `decode` gives for the bytes that `encode` has just returned in this process, taken at their word.

    Never for bytes that have been anywhere else: nothing is verified that needs reading them.

    Args:
        data: What `encode` returned; the tensor lies over it.
        layout: The layout of what was encoded.

    Returns:
        The KV states in host memory, in their precision at rest.
    """
    view = memoryview(data)
    return _view(view, _parse(view, verify=False), layout)


def read_header(data: memoryview | bytes | bytearray) -> BlockHeader:
    """What an encoded block says about itself, for tools; the checksum is verified, key and fingerprint are reported.

    Raises:
        DamagedBlockError: The bytes are not a whole, undamaged block of a known version.
        InputError: `data` is no contiguous buffer.
    """
    found = _parse(_as_bytes(data))
    return BlockHeader(
        version=FORMAT_VERSION,
        precision=found.precision,
        num_tokens=found.num_tokens,
        layout=_unpack_layers(found.layers),
        key=found.key.hex(),
        fingerprint=found.fingerprint.hex(),
        payload_offset=found.payload_offset,
        payload_bytes=found.payload_bytes,
    )


def read_label(head: memoryview | bytes | bytearray) -> BlockLabel:
    """What the first bytes of an encoded block claim, for lists of stores too large to be read.

    Raises:
        DamagedBlockError: They are fewer than `LABEL_BYTES`, or not the beginning of a block of a known version.
        InputError: `head` is no contiguous buffer.
    """
    view = _as_bytes(head)
    if len(view) < _HEAD.size:
        raise DamagedBlockError(f"{len(view)} bytes are too few for a block's header ({_HEAD.size})", reason="length")
    magic, version, _, _, checksum, key, fingerprint, *_ = _HEAD.unpack_from(view)
    _check_version(magic, version)
    return BlockLabel(key.hex(), fingerprint.hex(), checksum.hex())


def _check_version(magic: bytes, version: int) -> None:
    if magic != _MAGIC:
        raise DamagedBlockError(f"the bytes start with {magic.hex(' ')}: not an encoded block", reason="magic")
    if version != FORMAT_VERSION:
        message = f"the block has format version {version}, this release reads {FORMAT_VERSION}"
        raise DamagedBlockError(message, reason="version")


def _parse(view: memoryview, *, verify: bool = True) -> _Fields:
    """Check everything the bytes can be held to on their own: lengths, magic, version, checksum, arithmetic.

    With `verify=False` the checksum, which reads them all, is left out.
    """
    if len(view) < _HEAD.size:
        raise DamagedBlockError(f"{len(view)} bytes are too few for a block's header ({_HEAD.size})", reason="length")
    fields = _HEAD.unpack_from(view)
    magic, version, code, offset, _, key, fingerprint, num_tokens, num_layers, payload_bytes = fields
    _check_version(magic, version)
    if offset != _payload_offset(num_layers) or offset + payload_bytes != len(view):
        message = f"the header promises {offset} + {payload_bytes} bytes for {num_layers} layers, got {len(view)}"
        raise DamagedBlockError(message, reason="length")
    if verify and _checksum(view) != view[_CHECKSUM]:
        raise DamagedBlockError(f"block {key.hex()} fails its checksum", reason="checksum")
    if code not in _PRECISIONS:
        raise DamagedBlockError(f"unknown precision code {code}", reason="precision")
    precision = _PRECISIONS[code]
    layers = bytes(view[_HEAD.size : _HEAD.size + 16 * num_layers])
    layout = _unpack_layers(layers)
    if num_tokens < 1 or layout.elements_per_token < 1:
        raise DamagedBlockError(f"the header promises {num_tokens} tokens of {num_layers} layers", reason="shape")
    if payload_nbytes(layout, num_tokens, precision) != payload_bytes:
        message = f"{num_tokens} tokens of this layout in {precision} do not make {payload_bytes} bytes"
        raise DamagedBlockError(message, reason="shape")
    return _Fields(precision, offset, key, fingerprint, num_tokens, payload_bytes, layers)


def _view(view: memoryview, found: _Fields, layout: KVLayout) -> StoredKV:
    """The KV states in the payload; `layout` is the found one, as the caller's own object."""
    precision = found.precision
    if precision == "int8" or precision == "int4":
        payload = _tensor_over(view, found.payload_offset, _QUANTIZED_ALIGNMENT)
        return QuantizedKV(layout, found.num_tokens, precision, payload)
    dtype = _DTYPES[precision]
    return BlockKV(layout, found.num_tokens, _tensor_over(view, found.payload_offset, dtype.itemsize).view(dtype))


def _tensor_over(view: memoryview, offset: int, alignment: int) -> torch.Tensor:
    if not view.readonly:
        payload = torch.frombuffer(view, dtype=torch.uint8, offset=offset)
        if payload.data_ptr() % alignment == 0:
            return payload
    # torch warns on read-only buffers and does not align; a private copy is writable and aligned by the allocator.
    return torch.frombuffer(bytearray(view[offset:]), dtype=torch.uint8)


def _checksum(view: memoryview) -> bytes:
    state = xxhash.xxh3_128(view[: _CHECKSUM.start])
    state.update(view[_CHECKSUM.stop :])
    return state.digest()


def _payload_offset(num_layers: int) -> int:
    return -(-(_HEAD.size + 16 * num_layers) // _ALIGNMENT) * _ALIGNMENT


@lru_cache(maxsize=16)
def _pack_layers(layout: KVLayout) -> bytes:
    return b"".join(
        struct.pack("<4I", layer.key_heads, layer.key_dim, layer.value_heads, layer.value_dim)
        for layer in layout.layers
    )


@lru_cache(maxsize=16)
def _unpack_layers(packed: bytes) -> KVLayout:
    return KVLayout(tuple(LayerShape(*shape) for shape in struct.iter_unpack("<4I", packed)))


def _as_bytes(data: memoryview | bytes | bytearray) -> memoryview:
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise InputError(
            f"{type(data).__name__} is no contiguous byte buffer ({error}); pass bytes-like data"
        ) from None


def _checked(precision: Precision) -> Precision:
    if precision not in _CODES:
        raise InputError(f"unknown precision {precision!r}; use one of {', '.join(get_args(Precision))}")
    return precision
