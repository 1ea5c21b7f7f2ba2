"""What makes two KV states equal: the fingerprint of everything that shaped them, and the key of one block.

A stored block may be reused only if computing it again would give the same numbers. That depends on the block's
token ids and on a handful of factors (weights, rope parameters, the precision at rest, ...). `Fingerprint` names
those factors one by one, so that a miss after an upgrade can say *which* of them changed; `block_key` binds a block's
token ids to them. Nothing here knows how a model computes, or where blocks are kept.

Two kinds of hash are used, for two jobs: BLAKE2b (RFC 7693) where equality must hold against somebody who chooses the
input (keys, digests), and XXH3 (xxhash.com) to read gigabytes of weights at memory speed, where only accidents matter.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import xxhash

from blockrag.errors import InputError

if TYPE_CHECKING:
    import torch

__all__ = [
    "FORMAT_VERSION",
    "FactorChange",
    "Fingerprint",
    "block_key",
    "check_fingerprint",
    "check_key",
    "check_namespace",
    "hash_json",
    "hash_tensors",
    "hash_tokenizer",
]

FORMAT_VERSION = 1
"""Version of the encoded block (`blockrag.codec`); part of every fingerprint."""

_KEY = re.compile(r"[0-9a-f]{64}")
_DIGEST = re.compile(r"[0-9a-f]{32}")
_CHUNK_BYTES = 64 << 20
_FOLLOW_DTYPE = ("weights", "rope")
_LONG_DIGEST = re.compile(r"[0-9a-f]{32,}")


def check_key(key: str) -> str:
    """Return `key` if it is a block key: 64 lower-case hexadecimal digits.

    Raises:
        InputError: It is anything else.
    """
    if not isinstance(key, str) or not _KEY.fullmatch(key):
        raise InputError(f"{key!r:.100} is not a block key (64 lower-case hex digits); make one with block_key()")
    return key


def check_fingerprint(fingerprint: str) -> str:
    """Return `fingerprint` if it is a fingerprint's digest: 32 lower-case hexadecimal digits.

    Raises:
        InputError: It is anything else.
    """
    if not isinstance(fingerprint, str) or not _DIGEST.fullmatch(fingerprint):
        raise InputError(
            f"{fingerprint!r:.100} is not a fingerprint (32 lower-case hex digits); pass Fingerprint.digest"
        )
    return fingerprint


def check_namespace(namespace: str) -> str:
    """Return `namespace` if it can be part of a key.

    Raises:
        InputError: It is no string, or holds a lone surrogate.
    """
    if not isinstance(namespace, str):
        raise InputError(f"a namespace is a string, got {namespace!r:.100}; pass the tenant's name")
    _utf8(namespace, "namespace")
    return namespace


@dataclass(frozen=True, slots=True)
class FactorChange:
    """One factor in which two fingerprints differ.

    Args:
        name: The factor, a field of `Fingerprint`.
        stored: What it was when blocks were stored.
        asked: What it is now.
    """

    name: str
    stored: str
    asked: str

    def __str__(self) -> str:
        return f"stored for {self.name} {_short(self.stored)}, asked with {_short(self.asked)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fingerprint:
    """Everything that shaped a model's KV states, factor by factor.

    Each factor is a short string: a digest of something large, or the thing itself where it is short. Paths, devices,
    batch sizes and dates are left out on purpose: they do not change what a block means. So is the namespace, which
    belongs to a block's key: fingerprints are shown to people.

    Args:
        weights: `hash_tensors` of the model's parameters and buffers, without those of adapters.
        config: `hash_json` of the configuration values that change the computation, but those of rope and attention.
        rope: `hash_json` of the rotation: its type and parameters, and the frequencies the model was seen to use.
        tokenizer: `hash_tokenizer` of the tokenizer: vocabulary, added tokens, begin-of-sequence policy.
        template: `hash_json` of what surrounds a block's text: the prompt template, the tokenizer's chat template.
        compute_dtype: The dtype the model computed in, e.g. "float32".
        precision: The precision at rest, e.g. "bfloat16" or "int8".
        attention: `hash_json` of what a token sees inside a block: windows, chunks, the kind of each layer.
        adapter: `hash_json` of adapters that are not merged: tensors, scale, which are active; "none" without any.
        splitting: How control tokens spelled in a text are treated.
        positions: Which positions stored keys are at.
        library: The library that computes, up to the part of its version that is declared compatible.
        format: The version of the encoded block.
    """

    weights: str
    config: str
    rope: str
    tokenizer: str
    template: str
    compute_dtype: str
    precision: str
    attention: str = "full"
    adapter: str = "none"
    splitting: str = "inert"
    positions: str = "unrotated"
    library: str = "none"
    format: str = str(FORMAT_VERSION)

    def __post_init__(self) -> None:
        for field in fields(self):
            if not isinstance(getattr(self, field.name), str) or not getattr(self, field.name):
                value = getattr(self, field.name)
                raise InputError(f"fingerprint factor {field.name!r} is {value!r:.100}; it must be a non-empty string")

    @property
    def digest(self) -> str:
        """32 hex digits: BLAKE2b-128 over the factors' canonical JSON."""
        return hash_json(asdict(self))

    def differences(self, other: Fingerprint) -> tuple[str, ...]:
        """Names of the factors in which two fingerprints differ; empty when they are equal."""
        return tuple(f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name))

    def changes_since(self, stored: Fingerprint) -> tuple[FactorChange, ...]:
        """What became different since another fingerprint's blocks were stored, for people to read.

        In another dtype the weights and the rotation's frequencies are other numbers as well: where `compute_dtype`
        differs, it alone is named for the three.
        """
        names = self.differences(stored)
        if "compute_dtype" in names:
            names = tuple(name for name in names if name not in _FOLLOW_DTYPE)
        return tuple(FactorChange(name, getattr(stored, name), getattr(self, name)) for name in names)

    def to_json(self) -> str:
        """The factors as one line of canonical JSON, for a manifest beside a store or an index."""
        return _canonical(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Fingerprint:
        """Read what `to_json` wrote.

        Raises:
            InputError: The text is not a JSON object with exactly the known factors, each a non-empty string.
        """
        try:
            factors = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise InputError(f"a fingerprint must be JSON, got {text!r:.100} ({error}); rebuild it") from None
        names = {field.name for field in fields(cls)}
        if not isinstance(factors, dict) or set(factors) != names:
            found = sorted(factors) if isinstance(factors, dict) else type(factors).__name__
            raise InputError(f"a fingerprint holds exactly {sorted(names)}, got {found!r:.200}; rebuild it")
        return cls(**factors)


def block_key(token_ids: Sequence[int], *, fingerprint: str, regime: str = "default", namespace: str = "") -> str:
    """The key of one block: equal exactly when token ids, fingerprint, regime and namespace are equal.

    BLAKE2b-256 over length-prefixed fields, so that no two different inputs spell the same message. A non-empty
    namespace keys the hash (RFC 7693, section 2.9): who does not know another tenant's namespace cannot compute the
    keys of that tenant's blocks, and so can neither read them nor learn that a passage is stored.

    Args:
        token_ids: The block's token ids, at least one, each in [0, 2**32).
        fingerprint: `Fingerprint.digest` of the model that computes the block.
        regime: Names the rotation regime where a model has several (longrope: short or long factors).
        namespace: Separates tenants; empty for one shared space.

    Returns:
        64 lower-case hex digits.

    Raises:
        InputError: No token ids, one out of range, or a malformed fingerprint.
    """
    if len(token_ids) == 0:
        raise InputError("a block needs at least one token id; leave empty passages out")
    try:
        ids = struct.pack(f"<{len(token_ids)}I", *token_ids)
    except struct.error as error:
        raise InputError(f"token ids must be integers in [0, 2**32): {error}; pass the tokenizer's ids") from None
    secret = hashlib.blake2b(_utf8(namespace, "namespace")).digest() if namespace else b""
    state = hashlib.blake2b(digest_size=32, key=secret, person=b"blockrag.key.1")
    for field in (check_fingerprint(fingerprint).encode(), _utf8(regime, "regime"), ids):
        state.update(struct.pack("<Q", len(field)))
        state.update(field)
    return state.hexdigest()


def hash_json(obj: object) -> str:
    """32 hex digits: BLAKE2b-128 over the canonical JSON of `obj` (sorted keys, no spaces, ASCII).

    A tuple equals a list and an integer key equals its decimal string, as after writing to JSON and reading back.

    Raises:
        InputError: `obj` holds something JSON has no form for, NaN or infinity included.
    """
    return hashlib.blake2b(_canonical(obj).encode(), digest_size=16).hexdigest()


def hash_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """32 hex digits over the content of named tensors: names, dtypes, shapes and every byte.

    The order in which they come, their strides and their device do not matter. Each tensor is read by XXH3-128, in
    place where it is contiguous in host memory, else in pieces of about 64 MiB.

    Args:
        named: (name, tensor) pairs, any dtype and shape, e.g. `model.state_dict().items()`.

    Raises:
        InputError: A name comes twice, or a tensor has no plain bytes to read (meta device, sparse, quantized).
    """
    lines: dict[str, list[object]] = {}
    for name, tensor in named:
        if name in lines:
            raise InputError(f"tensor name {name!r} comes twice; pass each tensor once")
        if tensor.is_meta or tensor.is_quantized or tensor.layout is not _strided():
            raise InputError(f"tensor {name!r} ({tensor.layout}, {tensor.device}) has no plain bytes; load its weights")
        state = xxhash.xxh3_128()
        for piece in _byte_pieces(tensor.detach()):
            state.update(piece)
        lines[name] = [name, str(tensor.dtype), list(tensor.shape), state.hexdigest()]
    return hash_json([lines[name] for name in sorted(lines)])


def hash_tokenizer(tokenizer: Any) -> str:
    """32 hex digits over all that decides which ids a text gets.

    A fast tokenizer is its backend's JSON (normalizer, pre-tokenizer, model, merges, added tokens), without the
    truncation and padding that calls switch on and off; any other is its class, its vocabulary and its added tokens.
    Special tokens and the policy of opening texts with one belong to both. The chat template does not: it is part of
    the `template` factor.

    Args:
        tokenizer: A transformers tokenizer, fast or slow.

    Raises:
        InputError: The object has neither a backend tokenizer nor a vocabulary.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        body = json.loads(backend.to_str())
        body.pop("truncation", None)
        body.pop("padding", None)
    elif hasattr(tokenizer, "get_vocab"):
        body = {
            "class": type(tokenizer).__name__,
            "vocab": tokenizer.get_vocab(),
            "added": tokenizer.get_added_vocab() if hasattr(tokenizer, "get_added_vocab") else {},
            # A fast tokenizer's backend does this itself, and says so.
            "adds": [bool(getattr(tokenizer, name, False)) for name in ("add_bos_token", "add_eos_token")],
        }
    else:
        raise InputError(f"{type(tokenizer).__name__} is not a tokenizer; pass one from transformers.AutoTokenizer")
    ids = list(getattr(tokenizer, "all_special_ids", ()))
    special = {name: str(token) for name, token in getattr(tokenizer, "special_tokens_map", {}).items()}
    return hash_json({"body": body, "special_ids": ids, "special_tokens": special})


def _short(value: str) -> str:
    return f"{value[:8]}..." if _LONG_DIGEST.fullmatch(value) else value


def _canonical(obj: object) -> str:
    try:
        return json.dumps(obj, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(
            f"{type(obj).__name__} has no canonical JSON ({error}); pass str, int, float, list, dict"
        ) from None


def _utf8(text: str, what: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InputError(f"the {what} {text!r:.100} holds a lone surrogate; pass valid Unicode") from None


def _strided() -> torch.layout:
    import torch

    return torch.strided


def _byte_pieces(tensor: torch.Tensor) -> Iterator[memoryview]:
    """The tensor's bytes in row-major order, piece by piece, copying only what is not contiguous in host memory."""
    import torch

    if tensor.numel() == 0:
        return
    if tensor.ndim == 0:
        tensor = tensor.reshape(1)
    direct = tensor.is_contiguous() and tensor.device.type == "cpu"
    row_bytes = tensor[0].numel() * tensor.element_size()
    rows = tensor.shape[0] if direct else max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, tensor.shape[0], rows):
        flat = tensor[start : start + rows].cpu().contiguous().reshape(-1).view(torch.uint8)
        yield flat.numpy().data
