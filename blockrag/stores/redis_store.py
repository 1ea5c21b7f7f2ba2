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

import copy
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote

import redis
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, OutOfMemoryError, RedisError, ResponseError
from redis.retry import Retry

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.fingerprint import Fingerprint, check_key
from blockrag.stores.memory import byte_view
from blockrag.stores.remote import DEFAULT_DEADLINE_S, PATIENT_S, WRITE_TIMEOUT_S, Explained, Remote, examine
from blockrag.stores.urls import parse_store_url, with_parameters

if TYPE_CHECKING:
    from blockrag.stores.protocol import StoreStats
    from blockrag.stores.report import StoreReport

__all__ = ["RedisStore"]

_LOG = logging.getLogger(__name__)

_PREFIX: Final = "blockrag:1:"
_FINGERPRINTS: Final = f"{_PREFIX}fingerprints"
_MAX_VALUE_BYTES: Final = 512 << 20
_KEYS_AT_ONCE: Final = 512
_CONNECT_TIMEOUT_S: Final = 5.0
_FAULTS: Final = (RedisError, OSError)
_PLACE: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:/@\[\]]+)(?::([0-9]{1,5}))?(?:/([0-9]{1,5})?)?")
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_PASSWORD: Final = "BLOCKRAG_REDIS_PASSWORD"
_USERNAME: Final = "BLOCKRAG_REDIS_USERNAME"


class RedisStore:
    """Encoded blocks in a Redis or Valkey server. Implements `BlockStore`; threads, processes, machines may share it.

    A process that was forked must open the store again.

    Args:
        url: `redis://host:port/db`, `rediss://host:port/db` (TLS) or `redis+unix:///path/of/socket`, without
            parameters. The port is 6379 and the db 0 where they are not given.
        deadline_s: Seconds that one call of `get` or `get_many` waits for the network altogether.

    Raises:
        InputError: A URL that cannot be used.
        StoreError: The server cannot be reached, or lets nobody in.
    """

    def __init__(self, url: str, *, deadline_s: float = DEFAULT_DEADLINE_S) -> None:
        self._address, self._base = _address(url)
        self._deadline_s = deadline_s
        self._remote = self._traffic(deadline_s)
        self._hurried = self._client(deadline_s)
        self._patient = self._client(max(deadline_s, WRITE_TIMEOUT_S))
        self._asked(self._patient.ping)

    @property
    def url(self) -> str:
        """Where the store is, with its deadline, without a password."""
        deadline = None if self._deadline_s == DEFAULT_DEADLINE_S else float(self._deadline_s)
        return with_parameters(self._base, {"deadline": deadline})

    def get(self, key: str) -> memoryview | None:
        """The encoded block over a fresh buffer, or None; what fails, is late or damaged counts as missing.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        return self._remote.get(key)

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order; up to eight are read ahead, in parallel.

        Raises:
            InputError: A key comes twice or is malformed.
            StoreError: The store is closed.
        """
        return self._remote.get_many(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store one encoded block, replacing the one under the same key.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: `data` is larger than any value may be, or the server is out of memory.
            StoreError: It could not be written, or the store is closed.
        """
        name = _PREFIX + check_key(key)
        view = byte_view(data)
        if len(view) > _MAX_VALUE_BYTES:
            raise StoreFullError(
                f"a block of {len(view)} bytes exceeds Redis's limit of {_MAX_VALUE_BYTES} bytes per value; "
                "split the passage, or keep such blocks in another store"
            )
        self._remote.counted_put(key, lambda _: self._patient.set(name, view))

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored; what fails counts as missing.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        wanted = iter({check_key(key) for key in keys})
        portions = iter(lambda: tuple(islice(wanted, _KEYS_AT_ONCE)), ())
        found: set[str] = set()

        def ask(portion: tuple[str, ...]) -> bool:
            pipeline = self._hurried.pipeline(transaction=False)
            for key in portion:
                pipeline.exists(_PREFIX + key)
            found.update(key for key, there in zip(portion, pipeline.execute(), strict=True) if there)
            return True

        self._remote.ask_each(ask, portions)
        return found

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks; returns how many there were.

        Raises:
            InputError: A malformed key.
            StoreError: They could not be removed, or the store is closed.
        """
        self._remote.check_open()
        names = iter({_PREFIX + check_key(key) for key in keys})
        deleted = 0
        while portion := tuple(islice(names, _KEYS_AT_ONCE)):
            deleted += self._remote.write(partial(self._unlink, portion))
        return deleted

    def keys(self) -> Iterator[str]:
        """The stored keys, scanned while others may write; a key may be missed that comes or goes meanwhile.

        Raises:
            StoreError: They cannot be listed, or the store is closed.
        """
        self._remote.check_open()
        return self._scan()

    def stats(self) -> StoreStats:
        """The traffic; blocks and bytes are None, for counting them would scan the server.

        Raises:
            StoreError: The store is closed.
        """
        return self._remote.stats()

    def pinned(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Does nothing: the server alone decides what it evicts."""
        return nullcontext()

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note that blocks of this fingerprint are written here.

        Raises:
            StoreError: It could not be written, or the store is closed.
        """
        text = fingerprint.to_json()
        self._remote.write(lambda: self._patient.hset(_FINGERPRINTS, fingerprint.digest, text))

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The remembered fingerprints by digest; one that cannot be read is left out and logged.

        Raises:
            StoreError: They cannot be read, or the store is closed.
        """
        self._remote.check_open()
        found: dict[str, Fingerprint] = {}
        for name, text in self._asked(partial(self._patient.hgetall, _FINGERPRINTS)).items():
            try:
                fingerprint = Fingerprint.from_json(text.decode())
            except (InputError, UnicodeDecodeError) as error:
                _LOG.warning("%s: fingerprint %r cannot be read: %s", self.url, name, error)
                continue
            if fingerprint.digest.encode() == name:
                found[fingerprint.digest] = fingerprint
            else:
                _LOG.warning("%s: %r holds fingerprint %s; delete it", self.url, name, fingerprint.digest)
        return found

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Read and check every block.

        Raises:
            StoreError: The store cannot be listed, or it is closed.
        """
        self._remote.check_open()
        examined = copy.copy(self)
        examined._hurried = self._patient
        examined._remote = examined._traffic(PATIENT_S, checked=False)
        try:
            return examine(self, examined, fix=fix)
        finally:
            examined._remote.close()

    def close(self) -> None:
        """Close the connections; closing twice is fine."""
        self._remote.close()
        self._hurried.close()
        self._patient.close()

    def _traffic(self, deadline_s: float, *, checked: bool = True) -> Remote:
        return Remote(
            self.url, deadline_s=deadline_s, fetch=self._fetch, faults=_FAULTS, explain=self._explain, checked=checked
        )

    def _client(self, timeout_s: float) -> redis.Redis:
        return redis.Redis(
            **self._address,
            username=os.environ.get(_USERNAME),
            password=os.environ.get(_PASSWORD),
            socket_timeout=timeout_s,
            socket_connect_timeout=min(timeout_s, _CONNECT_TIMEOUT_S),
            # Once, for a connection that the server has closed meanwhile.
            retry=Retry(NoBackoff(), 1),
        )

    def _fetch(self, key: str) -> memoryview | None:
        found: Any = self._hurried.get(_PREFIX + key)
        return None if found is None else memoryview(found)

    def _unlink(self, names: tuple[str, ...]) -> int:
        removed: Any = self._patient.unlink(*names)
        return int(removed)

    def _scan(self) -> Iterator[str]:
        # A scan may say a key twice.
        seen: set[str] = set()
        cursor: Any = 0
        while True:
            cursor, names = self._asked(partial(self._patient.scan, cursor, match=f"{_PREFIX}*", count=_KEYS_AT_ONCE))
            for key in {name.decode("ascii", "replace").removeprefix(_PREFIX) for name in names} - seen:
                if _KEY.fullmatch(key):
                    seen.add(key)
                    yield key
            if cursor == 0:
                return

    def _asked(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except _FAULTS as error:
            raise self._explain(error).error from error

    def _explain(self, error: Exception) -> Explained:
        what = f"the store {self.url} failed: {str(error)[:300]}"
        if isinstance(error, OutOfMemoryError):
            hint = "raise the server's maxmemory, or set maxmemory-policy allkeys-lru"
            return Explained(StoreFullError(f"{what}; {hint}"), unanswered=False)
        if isinstance(error, (AuthenticationError, NoPermissionError)):
            return Explained(StoreError(f"{what}; set {_PASSWORD} (and {_USERNAME}) in the environment"), False)
        return Explained(StoreError(f"{what}; check that it can be reached"), not isinstance(error, ResponseError))


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
