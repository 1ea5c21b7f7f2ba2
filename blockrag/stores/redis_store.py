"""`RedisStore`: encoded blocks in Redis or Valkey, a fast tier that several machines share.

Through redis-py, which only this module knows. A block is a string value under `blockrag:1:<key>`; the fingerprints
are the fields of the hash `blockrag:1:fingerprints`. Blocks are read over several connections at a time, since one
connection is slower than the network. What the server keeps is the server's to say: give it `maxmemory` and
`maxmemory-policy allkeys-lru`, else it refuses writes when it is full. Redis has no value above 512 MB, and its
replies are not checked by anything but the codec's checksum.

The password comes from the environment (`BLOCKRAG_REDIS_PASSWORD`, and `BLOCKRAG_REDIS_USERNAME` for an ACL user),
never from the URL, which is shown in errors and logs. Without `rediss://` all of it crosses the network readably.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, Final
from urllib.parse import unquote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.stores.remote import DEFAULT_DEADLINE_S, WRITE_TIMEOUT_S, Explained
from blockrag.stores.remote_store import RemoteStore, shown_url
from blockrag.stores.urls import parse_store_url

__all__ = ["RedisStore"]

_PREFIX: Final = "blockrag:1:"
_FINGERPRINTS: Final = f"{_PREFIX}fingerprints"
_MAX_VALUE_BYTES: Final = 512 << 20
_KEYS_AT_ONCE: Final = 512
_CONNECT_TIMEOUT_S: Final = 5.0
_PLACE: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:/@\[\]]+)(?::([0-9]{1,5}))?(?:/([0-9]{1,5})?)?")
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_PASSWORD: Final = "BLOCKRAG_REDIS_PASSWORD"
_USERNAME: Final = "BLOCKRAG_REDIS_USERNAME"


class RedisStore(RemoteStore):
    """Encoded blocks in a Redis or Valkey server. Implements `BlockStore`, see `RemoteStore`.

    Args:
        url: `redis://host:port/db`, `rediss://host:port/db` (TLS) or `redis+unix:///path/of/socket`, without
            parameters. The port is 6379 and the db 0 where they are not given.
        deadline_s: Seconds that one call of `get` or `get_many` waits for the network altogether.

    Raises:
        InputError: A URL that cannot be used.
        StoreError: The server cannot be reached, or lets nobody in.
    """

    def __init__(self, url: str, *, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        super().__init__(_RedisServer(url, deadline_s), deadline_s)


class _RedisServer:
    """What redis-py is asked for. A `Server`."""

    faults: tuple[type[Exception], ...] = (RedisError, OSError)
    keys_per_question: int = _KEYS_AT_ONCE

    def __init__(self, url: str, deadline_s: float) -> None:
        self._address, base = _address(url)
        self.url = shown_url(base, deadline_s, {})
        self._deadline_s = deadline_s

    def explain(self, error: Exception) -> Explained:
        what = f"the store {self.url} failed: {str(error)[:300]}"
        if isinstance(error, OutOfMemoryError):
            hint = "raise the server's maxmemory, or set maxmemory-policy allkeys-lru"
            return Explained(StoreFullError(f"{what}; {hint}"), unanswered=False)
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            return Explained(StoreError(f"{what}; set {_PASSWORD} (and {_USERNAME}) in the environment"), False)
        return Explained(StoreError(f"{what}; check that it can be reached"), not isinstance(error, ResponseError))

    def open(self) -> None:
        self._hurried = _connect(self._address, self._deadline_s)
        self._patient = _connect(self._address, max(self._deadline_s, WRITE_TIMEOUT_S))
        self._patient.ping()

    def fetch(self, key: str, *, patient: bool) -> memoryview | None:
        found: Any = self._client(patient).get(_PREFIX + key)
        return None if found is None else memoryview(found)

    def put(self, key: str, data: memoryview, *, damaged: bool) -> None:
        if len(data) > _MAX_VALUE_BYTES:
            raise StoreFullError(
                f"a block of {len(data)} bytes exceeds Redis's limit of {_MAX_VALUE_BYTES} bytes per value; "
                "split the passage, or keep such blocks in another store"
            )
        self._patient.set(_PREFIX + key, data)

    def contains(self, keys: Sequence[str], *, patient: bool) -> list[str]:
        pipeline = self._client(patient).pipeline(transaction=False)
        for key in keys:
            pipeline.exists(_PREFIX + key)
        return [key for key, there in zip(keys, pipeline.execute(), strict=True) if there]

    def delete(self, keys: Sequence[str]) -> int:
        removed: Any = self._patient.unlink(*(_PREFIX + key for key in keys))
        return int(removed)

    def keys(self) -> Iterator[str]:
        # A scan may say a key twice.
        seen: set[str] = set()
        for name in self._patient.scan_iter(f"{_PREFIX}*", count=_KEYS_AT_ONCE):
            key = name.decode("ascii", "replace").removeprefix(_PREFIX)
            if key not in seen and _KEY.fullmatch(key):
                seen.add(key)
                yield key

    def remember_fingerprint(self, digest: str, text: bytes) -> None:
        self._patient.hset(_FINGERPRINTS, digest, text)

    def fingerprints(self) -> list[tuple[str, bytes]]:
        found: Any = self._patient.hgetall(_FINGERPRINTS)
        return [(name.decode("ascii", "backslashreplace"), text) for name, text in found.items()]

    def close(self) -> None:
        for client in (self._hurried, self._patient):
            # Whoever is still using a connection would fall over it; those end with the client.
            client.connection_pool.disconnect(inuse_connections=False)

    def _client(self, patient: bool) -> redis.Redis:
        return self._patient if patient else self._hurried


def _connect(address: dict[str, Any], timeout_s: float) -> redis.Redis:
    return redis.Redis(
        **address,
        username=os.environ.get(_USERNAME),
        password=os.environ.get(_PASSWORD),
        socket_timeout=timeout_s,
        socket_connect_timeout=min(timeout_s, _CONNECT_TIMEOUT_S),
        # Once, for a connection that the server has closed meanwhile. What was late would be late again.
        retry=Retry(NoBackoff(), 1, supported_errors=(redis.ConnectionError,)),
    )


def _address(url: str) -> tuple[dict[str, Any], str]:
    """What redis-py connects to, and the URL as it may be shown."""
    parts = parse_store_url(url, ())
    if "@" in parts.text:
        raise InputError(f"store {parts.text!r}: no credentials in a URL; set {_PASSWORD} in the environment")
    if parts.scheme == "redis+unix":
        if not parts.place.startswith("/"):
            raise InputError(f"store {parts.text!r} names no socket; write redis+unix:///path/of/socket")
        return {"unix_socket_path": unquote(parts.place)}, parts.text
    match = _PLACE.fullmatch(parts.place)
    if match is None:
        raise InputError(f"store {parts.text!r}: write {parts.scheme}://host:port/db, e.g. redis://localhost:6379/0")
    host, port, db = match.groups()
    address = {"host": host.strip("[]"), "port": int(port or 6379), "db": int(db or 0)}
    return {**address, "ssl": True} if parts.scheme == "rediss" else address, parts.text
