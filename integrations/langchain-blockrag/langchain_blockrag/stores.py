"""`BlockKVByteStore`: a block store as a LangChain key-value store of bytes.

A block store knows keys of one form only, 64 hexadecimal digits. Such a key means the block of that name, and its
value is the encoded block, byte for byte. Any other key (and one that begins like those made here) is hashed, and kept
in front of its value so that it can be listed again:

    store key   "blockrag" in hexadecimal, then the first 48 digits of SHA-256 of the key
    value       length of the key's UTF-8 in 4 bytes, big endian; the key; the bytes

The hexadecimal "blockrag" tells one from the other without reading values.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING

from blockrag.errors import InputError, StoreError
from langchain_core.runnables import run_in_executor
from langchain_core.stores import BaseStore

from langchain_blockrag.errors import langchain_errors

if TYPE_CHECKING:
    from blockrag.stores import BlockStore

__all__ = ["BlockKVByteStore"]

_NAMED = b"blockrag".hex()
# A key that looks like one we made is hashed like any other: its value would be read as ours.
_BLOCK_KEY = re.compile(rf"(?!{_NAMED})[0-9a-f]{{64}}")
_LENGTH_BYTES = 4


class BlockKVByteStore(BaseStore[str, bytes]):
    """Bytes by key in a block store: its budget, durability and eviction, under LangChain's interface.

    For embedding caches and the like, and to move the blocks themselves. As in every block store a value may be gone
    at any time, evicted for others; `mget` then says None.

    Args:
        store: A store, or the URL of one, see `blockrag.open_store`. Equal URLs are one store in each process, the
            one that models use as well.

    Raises:
        ValueError: The URL is none, or the store cannot be opened.
    """

    def __init__(self, store: str | BlockStore) -> None:
        if isinstance(store, str):
            from blockrag.model.shared import shared_store

            with langchain_errors():
                store = shared_store(store)
        self._store = store

    def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """The value of each key, or None; a key may come twice.

        Raises:
            ValueError: A key is no string, or the store is closed or unsafe.
        """
        with langchain_errors():
            names = {_store_key(key): key for key in keys}
            found = {names[name]: _value(names[name], data) for name, data in self._store.get_many(list(names))}
            return [found[key] for key in keys]

    def mset(self, key_value_pairs: Sequence[tuple[str, bytes]]) -> None:
        """Store values, each in the place of what its key had.

        Raises:
            ValueError: A key is no string, a value is no bytes or larger than the store, or the store is closed.
        """
        with langchain_errors():
            for key, value in key_value_pairs:
                self._store.put(_store_key(key), _framed(key, value))

    def mdelete(self, keys: Sequence[str]) -> None:
        """Remove keys; those that are not there are ignored.

        Raises:
            ValueError: A key is no string, or the store is closed.
        """
        with langchain_errors():
            self._store.delete_many([_store_key(key) for key in keys])

    def yield_keys(self, *, prefix: str | None = None) -> Iterator[str]:
        """The keys that begin with a prefix, by default all, in no particular order.

        Reads every value that was stored under another key than a block's.

        Raises:
            ValueError: The store is closed.
        """
        with langchain_errors():
            for stored in self._store.keys():  # noqa: SIM118 - a block store is no mapping
                key = self._key_of(stored)
                if key is not None and key.startswith(prefix or ""):
                    yield key

    async def ayield_keys(self, *, prefix: str | None = None) -> AsyncIterator[str]:
        """`yield_keys`, in a thread; the other asynchronous methods are those of `BaseStore`, in a thread as well."""
        for key in await run_in_executor(None, lambda: list(self.yield_keys(prefix=prefix))):
            yield key

    def _key_of(self, stored: str) -> str | None:
        """The key behind a key of the store; None when its value has gone meanwhile."""
        if not stored.startswith(_NAMED):
            return stored
        data = self._store.get(stored)
        return None if data is None else _unframed(data)[0]


def _store_key(key: str) -> str:
    if not isinstance(key, str):
        raise InputError(f"a key must be a string, got {type(key).__name__} {key!r:.60}")
    if _BLOCK_KEY.fullmatch(key):
        return key
    return _NAMED + hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[: 64 - len(_NAMED)]


def _framed(key: str, value: bytes) -> bytes:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise InputError(f"the value of {key!r:.60} must be bytes, got {type(value).__name__}")
    if _BLOCK_KEY.fullmatch(key):
        return bytes(value)
    name = key.encode("utf-8", "surrogatepass")
    return len(name).to_bytes(_LENGTH_BYTES, "big") + name + bytes(value)


def _value(key: str, data: memoryview | None) -> bytes | None:
    if data is None:
        return None
    if _BLOCK_KEY.fullmatch(key):
        return bytes(data)
    name, value = _unframed(data)
    if name != key:
        raise StoreError(f"the store has {name!r:.60} in the place of {key!r:.60}; delete that key")
    return bytes(value)


def _unframed(data: memoryview) -> tuple[str, memoryview]:
    end = _LENGTH_BYTES + int.from_bytes(data[:_LENGTH_BYTES], "big")
    if end > len(data):
        raise StoreError(f"a value of {len(data)} bytes in the store is damaged; delete it and set it again")
    return bytes(data[_LENGTH_BYTES:end]).decode("utf-8", "surrogatepass"), data[end:]
