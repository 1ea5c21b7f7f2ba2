"""Where encoded blocks are kept: one protocol, several stores, and `open_store` to get one from a URL.

    memory://                               this process's memory
    memory://?max_bytes=2GB                 with a byte budget, least recently used out first
    disk:///var/cache/blocks?max_bytes=1TB  a local directory (absolute path), shared by processes of one machine
    disk://blocks                           a local directory (relative path; `~` works too)

Paths are percent-decoded (`%3F` is a question mark). Sizes are bytes or take K/KB, M/MB, G/GB, T/TB (powers of 1000)
or KiB, MiB, GiB, TiB (powers of 1024). A store is opened by the module that knows it, imported when it is asked for.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from blockrag.errors import InputError
from blockrag.stores.memory import MemoryStore
from blockrag.stores.protocol import BlockStore, StoreStats

if TYPE_CHECKING:
    from blockrag.stores.disk import DiskStore

__all__ = ["BlockStore", "DiskStore", "MemoryStore", "StoreStats", "open_store", "parse_bytes"]

_SCHEMES = {"memory": "memory://?max_bytes=2GB", "disk": "disk:///path?max_bytes=200GB"}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([kmgt])(i?)b?|b)?\s*", re.IGNORECASE)


def open_store(url: str) -> BlockStore:
    """Open the block store a URL names, creating it if it is not there.

    Args:
        url: See the module's docstring for the forms.

    Raises:
        InputError: An unknown scheme, parameter or size; the message says what is allowed.
        StoreError: The directory cannot be used; see `DiskStore`.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in _SCHEMES:
        raise InputError(f"cannot open store {url!r}; use one of: {', '.join(_SCHEMES.values())}")
    path, _, query = rest.partition("?")
    max_bytes = _parse_query(url, query)
    if scheme == "memory":
        if path:
            raise InputError(f"store {url!r}: a memory store has no path, got {path!r}; use {_SCHEMES['memory']}")
        return MemoryStore(max_bytes)
    if not path:
        raise InputError(f"store {url!r} names no directory; use {_SCHEMES['disk']}")
    from blockrag.stores.disk import DiskStore

    return DiskStore(unquote(path), max_bytes=max_bytes)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as "512", "64KiB", "1.5GB" or "2T"; letter case does not matter.

    Raises:
        InputError: Anything else, or less than one byte.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError(
            f"cannot read the size {text!r}; write bytes or a number with KB, MB, GB, TB, KiB, MiB, GiB, TiB"
        )
    number, unit, binary = match.groups()
    exponent = " kmgt".index(unit.lower()) if unit else 0
    size = (
        int(float(number) * (1024 if binary else 1000) ** exponent)
        if "." in number
        else (int(number) * (1024 if binary else 1000) ** exponent)
    )
    if size < 1:
        raise InputError(f"the size {text!r} is less than one byte; leave max_bytes out for no limit")
    return size


def _parse_query(url: str, query: str) -> int | None:
    pairs = parse_qsl(query, keep_blank_values=True)
    unknown = [name for name, _ in pairs if name != "max_bytes"]
    if unknown or len(pairs) > 1:
        raise InputError(f"store {url!r}: unknown or repeated parameters; only max_bytes=SIZE is allowed, once")
    return parse_bytes(pairs[0][1]) if pairs else None


def __getattr__(name: str) -> Any:
    if name == "DiskStore":
        from blockrag.stores.disk import DiskStore

        return DiskStore
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
