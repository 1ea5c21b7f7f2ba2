"""`Remote`: how a store deals with a server that may be slow, wrong or gone.

Reading never fails: what does not come in time, or comes damaged, is a miss that the caller makes good by computing.
Writing fails with a `StoreError`, because whoever fills a store must know. Several blocks are read at the same time, a
bounded number ahead of the consumer, and each is verified by the thread that read it: a network delivers anything
sooner or later. Questions (which blocks are there?) have threads of their own, for many may be asked at once, and a
prompt must not wait behind them. What is asked of the server, and in which words, is the store's own business.
"""

from __future__ import annotations

import concurrent.futures
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Final, NamedTuple, TypeVar, cast

from blockrag import codec
from blockrag.errors import DamagedBlockError, InputError, StoreError
from blockrag.fingerprint import check_key
from blockrag.stores.arguments import check_distinct
from blockrag.stores.breaker import Breaker
from blockrag.stores.protocol import StoreStats

__all__ = ["DEFAULT_DEADLINE_S", "WRITE_TIMEOUT_S", "Explained", "Remote", "flaw"]

_LOG = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")

DEFAULT_DEADLINE_S: Final = 2.0
"""Enough for a new TLS connection and ten passages of an 8B model (170 MB) over 1 Gbit/s; what takes longer is usually
computed sooner on a GPU. Set it to what computing the passages takes."""
WRITE_TIMEOUT_S: Final = 30.0
"""For one block, as long as the server answers."""

_READ_AHEAD: Final = 8
_THREADS: Final = 16
_KEYS_AT_ONCE: Final = 1024
_MOST_SUSPECTS: Final = 100_000


class Explained(NamedTuple):
    """What an exception of a client library means.

    Args:
        error: The same as blockrag's.
        unanswered: Whether the server failed; not where it only refused.
    """

    error: StoreError
    unanswered: bool


def flaw(key: str, data: memoryview) -> str | None:
    """What is wrong with an encoded block that came back under `key`; None if nothing is.

    Bytes that do not even claim to be an encoded block are none of the store's business: None as well.
    """
    try:
        header = codec.read_header(data)
    except DamagedBlockError as error:
        claims_nothing = error.reason == "magic" or (error.reason == "length" and len(data) < codec.LABEL_BYTES)
        return None if claims_nothing else str(error)
    return None if header.key == key else f"it is block {header.key}"


class _Request:
    """One block that was asked for."""

    answer: Future[tuple[memoryview | None, bool]]

    def __init__(self, key: str) -> None:
        self.key = key
        self.abandoned = False


class Remote:
    """The traffic of one store. Thread-safe; a forked process must open the store again.

    Args:
        name: The store's URL, for errors and the log; without secrets.
        deadline_s: Seconds that one `get` or `get_many` waits for the server altogether; the rest are misses.
        fetch: Reads one block; None where the server has none.
        faults: The exceptions that the client library raises.
        explain: Translates them.
        checked: Whether damaged blocks are misses; else they are handed out, to be examined.

    Raises:
        InputError: The deadline is not positive, or endless.
    """

    def __init__(
        self,
        name: str,
        *,
        deadline_s: float,
        fetch: Callable[[str], memoryview | None],
        faults: tuple[type[Exception], ...],
        explain: Callable[[Exception], Explained],
        checked: bool = True,
    ) -> None:
        if not 0 < deadline_s <= 3600:
            raise InputError(f"the deadline is {deadline_s} s; pass more than 0 and at most 3600")
        self._name = name
        self._deadline_s = deadline_s
        self._fetch = fetch
        self._faults = faults
        self._explain = explain
        self._checked = checked
        self._breaker = Breaker(name)
        self._lock = threading.Lock()
        self._suspects: set[str] = set()
        self._hits = self._misses = self._puts = self._failures = 0
        self._closed = False
        self._readers = ThreadPoolExecutor(_THREADS, thread_name_prefix="blockrag-read")
        self._askers = ThreadPoolExecutor(_THREADS, thread_name_prefix="blockrag-ask")

    def get(self, key: str) -> memoryview | None:
        """The block, or None, as in `get_many`."""
        ((_, data),) = self.get_many([key])
        return data

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order, up to eight ahead.

        Raises:
            InputError: A key comes twice or is malformed.
            StoreError: The store is closed.
        """
        check_distinct(keys)
        for key in keys:
            check_key(key)
        return self._read_ahead(keys)

    def ask_each(self, ask: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """What the server answers to each of the items, asked in parallel; a failure is no answer.

        Raises:
            StoreError: The store is closed.
        """
        answers: list[R] = []
        for answer, failed in self._each(lambda item: self._attempt(lambda: ask(item)), items):
            if failed:
                self._count(failures=1)
            else:
                answers.append(cast("R", answer))
        return answers

    def write_each(self, call: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """Do with each of the items, in parallel, something that must succeed.

        Raises:
            StoreError: As in `write`.
        """
        return list(self._each(lambda item: self.write(lambda: call(item)), items))

    def write(self, call: Callable[[], T]) -> T:
        """Do something that must succeed.

        Nothing is tried while the server's last answer did not come: who has just waited for a block in vain, and
        computed it, must not wait as long again to store it.

        Raises:
            StoreError: It failed, the server has not been answering, or the store is closed.
        """
        self.check_open()
        if self._breaker.shaken or not self._breaker.allows():
            self._count(failures=1)
            raise StoreError(f"the store {self._name} has not been answering; try again in some seconds")
        try:
            done = call()
        except self._faults as error:
            explained = self._explain(error)
            self._report(failed=explained.unanswered)
            self._count(failures=1)
            raise explained.error from error
        except StoreError:
            self._count(failures=1)
            raise
        self._breaker.succeeded()
        return done

    def counted_put(self, key: str, put: Callable[[bool], object]) -> None:
        """Write one block, as in `write`; `put` is told whether a damaged copy has been seen there."""
        self.write(lambda: put(key in self._suspects))
        with self._lock:
            self._suspects.discard(key)
            self._puts += 1

    def check_open(self) -> None:
        """Raise StoreError if the store is closed."""
        if self._closed:
            raise StoreError(f"the store {self._name} is closed; open it again with open_store()")

    def stats(self) -> StoreStats:
        """The traffic; how much the server keeps is not asked.

        Raises:
            StoreError: The store is closed.
        """
        self.check_open()
        with self._lock:
            return StoreStats(None, None, None, self._hits, self._misses, self._puts, 0, self._failures)

    def close(self) -> None:
        """Stop; requests under way are let go. Closing twice is fine."""
        self._closed = True
        for pool in (self._readers, self._askers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _read_ahead(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        self.check_open()
        patience, late = self._deadline_s, 0
        upcoming = iter(keys)
        waiting: deque[_Request] = deque()
        try:
            for key in keys:
                self.check_open()
                if patience > 0:
                    waiting.extend(map(self._submit, islice(upcoming, _READ_AHEAD - len(waiting))))
                data, failed = None, True
                if waiting:
                    started = time.monotonic()
                    data, failed = self._wait(waiting.popleft(), patience)
                    patience -= time.monotonic() - started
                late += failed and patience <= 0
                self._count(hits=data is not None, misses=data is None, failures=failed)
                yield key, data
                # Not to be alive while the next one is awaited.
                del data
        finally:
            for request in waiting:
                self._abandon(request)
            if late:
                _LOG.warning(
                    "%s: %d of %d blocks did not come within the deadline of %g s and count as missing",
                    self._name,
                    late,
                    len(keys),
                    self._deadline_s,
                )

    def _each(self, call: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
        self.check_open()
        rest = iter(items)
        while portion := list(islice(rest, _KEYS_AT_ONCE)):
            with self._may_close():
                yield from self._askers.map(call, portion)

    @contextmanager
    def _may_close(self) -> Iterator[None]:
        """Somebody may close the store meanwhile, which cancels what waits for a thread and refuses what comes."""
        try:
            yield
        except (concurrent.futures.CancelledError, RuntimeError):
            self.check_open()
            raise

    def _submit(self, key: str) -> _Request:
        request = _Request(key)
        with self._may_close():
            request.answer = self._readers.submit(self._read, request)
        return request

    def _read(self, request: _Request) -> tuple[memoryview | None, bool]:
        found, failed = self._attempt(lambda: self._fetch(request.key), request)
        if found is None:
            return None, failed
        data = memoryview(bytearray(found))
        if self._checked and (wrong := flaw(request.key, data)):
            _LOG.warning("%s: block %s... is damaged and counts as missing: %s", self._name, request.key[:12], wrong)
            with self._lock:
                if len(self._suspects) < _MOST_SUSPECTS:
                    self._suspects.add(request.key)
            return None, True
        return data, False

    def _attempt(self, call: Callable[[], T], request: _Request | None = None) -> tuple[T | None, bool]:
        """What a call returned and False, or None and True where it failed."""
        if not self._breaker.allows():
            return None, True
        try:
            result = call()
        except self._faults as error:
            # An abandoned request has been reported already.
            if request is None or not request.abandoned:
                explained = self._explain(error)
                self._report(failed=explained.unanswered)
                _LOG.warning("%s", explained.error)
            return None, True
        if request is None or not request.abandoned:
            self._breaker.succeeded()
        return result, False

    def _wait(self, request: _Request, patience: float) -> tuple[memoryview | None, bool]:
        try:
            with self._may_close():
                return request.answer.result(timeout=max(0.0, patience))
        except concurrent.futures.TimeoutError:
            if self._abandon(request):
                self._breaker.failed()
            return None, True

    def _abandon(self, request: _Request) -> bool:
        """Let go of a request; whether the server was at it."""
        request.abandoned = True
        return not request.answer.cancel() and not request.answer.done()

    def _report(self, *, failed: bool) -> None:
        if failed:
            self._breaker.failed()
        else:
            self._breaker.succeeded()

    def _count(self, *, hits: int = 0, misses: int = 0, failures: int = 0) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._failures += failures
