"""`RemoteStore`: what stores behind a network have in common, which is all but the language of the server.

A `Server` speaks that language through its client library, `Remote` decides how long to wait for it and what a failure
means. Here the two become a `BlockStore`: arguments are checked, keys go in portions, fingerprints and blocks are
verified.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, Protocol

from blockrag import codec
from blockrag.errors import DamagedBlockError, InputError
from blockrag.fingerprint import Fingerprint, check_key
from blockrag.stores.arguments import byte_view
from blockrag.stores.remote import DEFAULT_DEADLINE_S, Explained, Remote
from blockrag.stores.report import Fault, check_blocks
from blockrag.stores.urls import with_parameters

if TYPE_CHECKING:
    from blockrag.stores.protocol import StoreStats
    from blockrag.stores.report import StoreReport

__all__ = ["RemoteStore", "Server", "shown_url"]

_LOG = logging.getLogger(__name__)

# The deadline of a check: it is no prompt, and waits; each of its requests has `WRITE_TIMEOUT_S`.
_PATIENT_S: Final = 3600.0
_DELETED_AT_ONCE: Final = 1000


class Server(Protocol):
    """One kind of server, in the words of its client library. Thread-safe.

    Args:
        url: The store's URL, without secrets.
        faults: The client library's exceptions; every method may raise them, or a StoreError.
        keys_per_question: How many keys one request of `contains` asks for.
    """

    url: str
    faults: tuple[type[Exception], ...]
    keys_per_question: int

    def explain(self, error: Exception) -> Explained:
        """What one of `faults` means."""

    def open(self) -> None:
        """Connect, and make sure that the server is there and keeps blocks as this release does."""

    def fetch(self, key: str, *, patient: bool) -> memoryview | None:
        """A block, or None; within the deadline, or with the patience of a write."""

    def put(self, key: str, data: memoryview, *, damaged: bool) -> None:
        """Write a block; told whether a damaged copy has been seen there."""

    def contains(self, keys: Sequence[str], *, patient: bool) -> Collection[str]:
        """Those of some keys that are there; patience as in `fetch`."""

    def delete(self, keys: Sequence[str]) -> int:
        """Remove blocks that have just been there; how many were."""

    def keys(self) -> Iterator[str]:
        """Every key once."""

    def remember_fingerprint(self, digest: str, text: bytes) -> None:
        """Keep a fingerprint's text."""

    def fingerprints(self) -> Iterable[tuple[str, bytes]]:
        """Digests and texts of those that are kept."""

    def close(self) -> None:
        """Let go of the connections that nobody uses."""


def shown_url(base: str, deadline_s: float, options: Mapping[str, Any]) -> str:
    """A store's URL with what it was opened with."""
    deadline = None if deadline_s == DEFAULT_DEADLINE_S else float(deadline_s)
    return with_parameters(base, {"deadline": deadline, **options})


class RemoteStore:
    """Encoded blocks on a server. Implements `BlockStore`; threads, processes and machines may share it.

    Any of its methods raises UnsafeStoreError where a name in a directory (`file://`) leads out of it, or to something
    that is no file. A process that was forked must open the store again.

    Args:
        server: The server. The store owns it.
        deadline_s: Seconds that one call of `get` or `get_many` waits for the network altogether.

    Raises:
        InputError: A deadline that is none, or a URL that the client library does not take.
        StoreError: The server cannot be reached, or cannot be used.
    """

    def __init__(self, server: Server, deadline_s: float) -> None:
        self._server = server
        self._remote = self._traffic(deadline_s)
        with self._explained():
            server.open()

    @property
    def url(self) -> str:
        """Where the store is, with what it was opened with, without secrets."""
        return self._server.url

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
        """Store one encoded block, replacing another under the same key.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: There is no room, or the server takes no block as large.
            StoreError: It could not be written, or the store is closed.
        """
        check_key(key)
        view = byte_view(data)
        self._remote.counted_put(key, lambda damaged: self._server.put(key, view, damaged=damaged))

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored; what fails counts as missing.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed.
        """
        ask = partial(self._server.contains, patient=False)
        return set().union(*self._remote.ask_each(ask, self._questions(keys)))

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks; returns how many there were.

        Raises:
            InputError: A malformed key.
            StoreError: They could not be removed, or the store is closed.
        """
        there = self._remote.write_each(partial(self._server.contains, patient=True), self._questions(keys))
        portions = _portions((key for found in there for key in found), _DELETED_AT_ONCE)
        return sum(self._remote.write(partial(self._server.delete, portion)) for portion in portions)

    def keys(self) -> Iterator[str]:
        """The stored keys, listed while others may write; one may be missed that comes or goes meanwhile.

        Raises:
            StoreError: They cannot be listed, or the store is closed.
        """
        self._remote.check_open()
        return self._listed(self._server.keys())

    def stats(self) -> StoreStats:
        """The traffic; blocks and bytes are None, for counting them would list what the server keeps.

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
        text = fingerprint.to_json().encode()
        self._remote.write(lambda: self._server.remember_fingerprint(fingerprint.digest, text))

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The remembered fingerprints by digest; one that is none is left out and logged.

        Raises:
            StoreError: They cannot be read, the server has just not been answering, or the store is closed.
        """
        found: dict[str, Fingerprint] = {}
        # A prompt asks for them to explain why its blocks are missing; that is no time to wait for a dead server.
        for name, text in self._remote.write(lambda: list(self._server.fingerprints())):
            try:
                fingerprint = Fingerprint.from_json(text.decode())
            except (InputError, UnicodeDecodeError) as error:
                _LOG.warning("%s: fingerprint %r cannot be read: %s", self.url, name, error)
                continue
            if fingerprint.digest == name:
                found[name] = fingerprint
            else:
                _LOG.warning("%s: %r holds fingerprint %s; delete it", self.url, name, fingerprint.digest)
        return found

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Read and check every block.

        Args:
            fix: Remove damaged blocks. One that is there and cannot be read stays.

        Raises:
            StoreError: The store cannot be listed or mended, or it is closed.
        """
        self._remote.check_open()
        # The same store, which hands out damaged blocks and waits for late ones.
        examined = copy.copy(self)
        examined._remote = self._traffic(_PATIENT_S, patient=True)
        faults = []
        try:
            report = check_blocks(examined, fix=False)
            for fault in report.faults:
                key = fault.where
                if fault.kind == "missing":
                    faults.append(Fault("unreadable", key, "is listed, and could not be read"))
                    continue
                # Whoever met it may have replaced it since: a check takes long.
                if fix and not _is_block(key, examined.get(key)):
                    self.delete_many([key])
                faults.append(replace(fault, fixed=fix))
        finally:
            examined._remote.close()
        return replace(report, faults=tuple(faults))

    def close(self) -> None:
        """Stop, and close the connections, those in use when the store is let go of; closing twice is fine."""
        self._remote.close()
        self._server.close()

    def _traffic(self, deadline_s: float, *, patient: bool = False) -> Remote:
        return Remote(
            self._server.url,
            deadline_s=deadline_s,
            fetch=partial(self._server.fetch, patient=patient),
            faults=self._server.faults,
            explain=self._server.explain,
            checked=not patient,
        )

    def _questions(self, keys: Iterable[str]) -> Iterator[Sequence[str]]:
        return _portions({check_key(key) for key in keys}, self._server.keys_per_question)

    def _listed(self, keys: Iterator[str]) -> Iterator[str]:
        with self._explained():
            yield from keys

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """For what is asked once, however long it takes."""
        try:
            yield
        except self._server.faults as error:
            raise self._server.explain(error).error from error


def _is_block(key: str, data: memoryview | None) -> bool:
    try:
        return data is not None and codec.read_header(data).key == key
    except DamagedBlockError:
        return False


def _portions(keys: Iterable[str], size: int) -> Iterator[tuple[str, ...]]:
    rest = iter(keys)
    return iter(lambda: tuple(islice(rest, size)), ())
