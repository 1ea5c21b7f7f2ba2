"""What the database keeps beside a passage: its metadata as canonical JSON, and digests of rows and of facts.

The digest of a row finds accidents: SQLite would hand out a text in which a bit has flipped. The digest of a fact, one
name and value of the metadata, is what `where` filters look up. Nothing here touches a database.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import xxhash

from blockrag.errors import InputError
from blockrag.passage import Passage

__all__ = ["encode_metadata", "fact_digest", "fact_digests", "row_digest"]

_CANONICAL: dict[str, Any] = {"sort_keys": True, "separators": (",", ":")}


def encode_metadata(passage: Passage) -> str:
    """A passage's metadata as canonical JSON.

    Raises:
        InputError: It is not JSON-serialisable (or holds NaN or infinity, which JSON lacks).
    """
    return json.dumps({name: _plain(name, value, passage.id) for name, value in passage.metadata.items()}, **_CANONICAL)


def _plain(name: str, value: object, passage_id: str = "") -> Any:
    """A JSON value as it reads back."""
    try:
        return json.loads(json.dumps(value, allow_nan=False, default=_as_dict))
    except (TypeError, ValueError, RecursionError) as error:
        of = f"passage {passage_id!r}: " if passage_id else ""
        raise InputError(
            f"{of}metadata {name!r} is not JSON-serialisable ({error}); pass strings, finite numbers, booleans, None, "
            "or lists and dicts of them"
        ) from error


def _as_dict(value: object) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def fact_digests(metadata: Mapping[str, object]) -> set[bytes]:
    """What a passage of this metadata, as it reads back from JSON, is looked up by."""
    return {_fact_digest(name, value) for name, value in metadata.items()}


def fact_digest(name: str, value: object) -> bytes:
    """What passages are looked up by whose metadata has this value under this name.

    Raises:
        InputError: The value is not JSON-serialisable.
    """
    return _fact_digest(name, _plain(name, value))


def _fact_digest(name: str, value: object) -> bytes:
    """Sixteen bytes that stand for "this name has this value"; 2 and 2.0 are one value, 1 and true are two."""
    fact = json.loads(json.dumps([name, value]), parse_float=_number)
    return hashlib.blake2b(json.dumps(fact, **_CANONICAL).encode(), digest_size=16).digest()


def _number(text: str) -> float | int:
    value = float(text)
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def row_digest(*values: int | str | bytes | None) -> bytes:
    """XXH3 (xxhash.com) over values of one row, its number among them, so that no row can take another's place."""
    state = xxhash.xxh3_64()
    for value in values:
        data = value.encode() if isinstance(value, str) else value if isinstance(value, bytes) else repr(value).encode()
        state.update(b"%d:" % len(data))
        state.update(data)
    return state.digest()
