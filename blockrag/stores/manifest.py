"""The list of a bucket's blocks: one JSON object a line, so that a store can be compared without listing or reading it.

    {"key": "<64 hex digits>", "bytes": 12345, "fingerprint": "<32 hex digits>", "checksum": "<32 hex digits>"}

The checksum is the one in the block's header. Nothing here knows where the list is kept.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import NamedTuple

from blockrag.errors import DamagedBlockError, InputError
from blockrag.fingerprint import check_fingerprint, check_key

__all__ = ["ManifestEntry", "read_manifest", "write_manifest"]

_NAMES = ["key", "bytes", "fingerprint", "checksum"]


class ManifestEntry(NamedTuple):
    """One block as its header describes it.

    Args:
        key: Its key.
        nbytes: The size of the object.
        fingerprint: Whose it is.
        checksum: 32 hex digits.
    """

    key: str
    nbytes: int
    fingerprint: str
    checksum: str


def write_manifest(entries: Iterable[ManifestEntry]) -> bytes:
    """The entries as JSON lines."""
    return b"".join(json.dumps(dict(zip(_NAMES, entry, strict=True))).encode() + b"\n" for entry in entries)


def read_manifest(text: bytes | memoryview) -> list[ManifestEntry]:
    """Read what `write_manifest` wrote.

    Raises:
        DamagedBlockError: A line is no entry; the message names it.
    """
    entries = []
    for number, line in enumerate(bytes(text).splitlines(), 1):
        try:
            found = json.loads(line)
            entry = ManifestEntry(*(found[name] for name in _NAMES))
            check_key(entry.key), check_fingerprint(entry.fingerprint), check_fingerprint(entry.checksum)
        except (ValueError, TypeError, KeyError, RecursionError, InputError):
            raise DamagedBlockError(f"line {number} is no block: {line[:80]!r}", reason="length") from None
        if len(found) != len(_NAMES) or type(entry.nbytes) is not int or entry.nbytes < 0:
            raise DamagedBlockError(f"line {number} is no block: {line[:80]!r}", reason="length")
        entries.append(entry)
    return entries
