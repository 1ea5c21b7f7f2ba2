"""Bringing a prompt's blocks to where they are wanted: out of the store, out of another request's hands, or computed.

Blocks in the store are read, verified and placed by several threads, each block by one of them, so that its bytes are
still in the processor's cache from step to step. A stored copy that fails verification is a miss: it is recomputed,
replaced, counted and logged; so are blocks that the store fails to read. What another request is just loading or
computing is waited for. Nothing here knows where a block goes: it is handed to the caller's function.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Protocol

from blockrag import codec
from blockrag.errors import DamagedBlockError, StoreError, UnsafeStoreError
from blockrag.model.readers import Dealer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from blockrag.kv import KVLayout
    from blockrag.model.inflight import FlightKey, InFlight
    from blockrag.model.readers import Readers
    from blockrag.model.usage import GenerationTimings, Usage
    from blockrag.quantize import StoredKV
    from blockrag.stores.protocol import BlockStore

__all__ = ["Fetch", "Place", "PlacePooled"]

logger = logging.getLogger(__name__)

# Waking a thread takes as long as placing some hundred kilobytes.
_BYTES_PER_THREAD = 1 << 20


class Place(Protocol):
    """Takes one block; called once per distinct block, from several threads if the fetch may use them."""

    def __call__(
        self, places: Sequence[int], kv: StoredKV, layers: range | None = None, *, key: str | None = None
    ) -> None:
        """Put the block of a key to its places, as indices into the prompt's blocks; some layers, or all of them."""
        ...


class PlacePooled(Protocol):
    """Takes one block that need not be fetched."""

    def __call__(self, places: Sequence[int], key: str) -> bool:
        """Put the block to its places, if it lies where it is wanted already; False if not."""
        ...


@dataclass(slots=True)
class _Share:
    """What one thread found and how long it took."""

    missing: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    failures: list[StoreError] = field(default_factory=list)
    load_s: float = 0.0
    check_s: float = 0.0
    place_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Fetch:
    """One run of blocks of one prompt.

    Args:
        places: Block key to its places in the run, in the order of the run.
        tokens: Block key to its number of tokens.
        store: Where blocks are kept.
        fingerprint: The model's.
        layout: The model's.
        flights: What other requests are doing.
        readers: The threads to use; None where `place` must be called from the calling thread.
        place: Takes the blocks.
        place_pooled: Takes those that need not be fetched.
        usage: Counts are added to it.
        timings: Seconds are added to it.
        damaged: Gets the keys of stored copies that failed verification.
    """

    places: dict[str, list[int]]
    tokens: dict[str, int]
    store: BlockStore
    fingerprint: str
    layout: KVLayout
    flights: InFlight
    readers: Readers | None
    place: Place
    place_pooled: PlacePooled
    usage: Usage
    timings: GenerationTimings
    damaged: list[str] = field(default_factory=list)

    def run(self, compute: Callable[[Sequence[str]], Iterator[tuple[str, StoredKV, int]]]) -> None:
        """Place every block.

        Args:
            compute: Computes and stores the blocks of some keys; yields key, KV states and bytes at rest.
        """
        wanted = [key for key in self.places if not self._take_pooled(key)]
        while wanted:
            mine, others = self.flights.board((id(self.store), key) for key in wanted)
            unlanded = set(mine)
            try:
                missing = self._load([key for _, key in mine], unlanded)
                self._compute(compute(missing) if missing else iter(()), unlanded)
            finally:
                for flight in unlanded:
                    self.flights.land(flight, None)
            wanted = [key for (_, key), flight in others.items() if not self._take(key, flight.wait)]

    def _load(self, keys: Sequence[str], unlanded: set[FlightKey]) -> list[str]:
        """Place what the store has; returns the keys it has not."""
        if not keys:
            return []
        count = self._threads(keys)
        shares = [_Share() for _ in range(min(count, len(keys)))]
        dealer = Dealer(keys, len(shares))
        started = time.perf_counter()
        split = count if len(keys) < count else 1
        tasks = [partial(self._load_share, dealer, share, split, unlanded) for share in shares]
        if self.readers is None or len(tasks) == 1:
            tasks[0]()
        else:
            self.readers.run(tasks)
        self._count(shares, time.perf_counter() - started)
        return [key for share in shares for key in share.missing]

    def _load_share(self, dealer: Dealer[str], share: _Share, threads_per_block: int, unlanded: set[FlightKey]) -> None:
        while keys := dealer.take():
            found: Iterator[tuple[str, memoryview | None]] | None = None
            answered = 0
            while True:
                started = time.perf_counter()
                try:
                    found = self.store.get_many(keys) if found is None else found
                    entry = next(found, None)
                except UnsafeStoreError:
                    raise
                except StoreError as error:
                    # Whatever it has not answered counts as not there.
                    share.missing += keys[answered:]
                    share.failures += [error] * (len(keys) - answered)
                    break
                answered += 1
                loaded = time.perf_counter()
                share.load_s += loaded - started
                if entry is None:
                    break
                key, data = entry
                # Not to be alive when the next one is read: its memory is used again.
                del entry
                kv = None if data is None else self._verified(key, data, share)
                checked = time.perf_counter()
                share.check_s += checked - loaded
                if kv is None:
                    share.missing.append(key)
                    continue
                self._place_in_layers(key, kv, threads_per_block)
                share.reused.append(key)
                self._land(key, kv, unlanded)
                share.place_s += time.perf_counter() - checked
                del kv, data

    def _place_in_layers(self, key: str, kv: StoredKV, threads: int) -> None:
        """A few large blocks keep all threads busy only if each is placed by several."""
        num_layers = self.layout.num_layers
        if threads == 1 or num_layers < threads or self.readers is None:
            self.place(self.places[key], kv, key=key)
            return
        borders = [num_layers * i // threads for i in range(threads + 1)]
        pieces = [range(first, last) for first, last in pairwise(borders)]
        self.readers.run([partial(self.place, self.places[key], kv, layers, key=key) for layers in pieces])

    def _compute(self, computed: Iterator[tuple[str, StoredKV, int]], unlanded: set[FlightKey]) -> None:
        while True:
            started = time.perf_counter()
            result = next(computed, None)
            done = time.perf_counter()
            self.timings.block_prefill_s += done - started
            if result is None:
                return
            key, kv, _ = result
            self.place(self.places[key], kv, key=key)
            self.usage.blocks_computed += len(self.places[key])
            self.usage.tokens_computed += self.tokens[key] * len(self.places[key])
            self._land(key, kv, unlanded)
            self.timings.compose_s += time.perf_counter() - done

    def _take(self, key: str, wait: Callable[[], StoredKV | None]) -> bool:
        """Place what another request brings; False when it gave up."""
        started = time.perf_counter()
        kv = wait()
        arrived = time.perf_counter()
        self.timings.load_s += arrived - started
        if kv is None:
            return False
        self.place(self.places[key], kv, key=key)
        self._reuse(key)
        self.timings.compose_s += time.perf_counter() - arrived
        return True

    def _take_pooled(self, key: str) -> bool:
        if not self.place_pooled(self.places[key], key):
            return False
        self._reuse(key)
        return True

    def _land(self, key: str, kv: StoredKV, unlanded: set[FlightKey]) -> None:
        flight = (id(self.store), key)
        unlanded.discard(flight)
        self.flights.land(flight, kv)

    def _threads(self, keys: Sequence[str]) -> int:
        if self.readers is None:
            return 1
        nbytes = self.layout.nbytes(sum(self.tokens[key] * len(self.places[key]) for key in keys), 4)
        return max(1, min(self.readers.count, nbytes // _BYTES_PER_THREAD))

    def _verified(self, key: str, data: memoryview, share: _Share) -> StoredKV | None:
        try:
            return codec.decode(data, key=key, fingerprint=self.fingerprint, layout=self.layout)
        except DamagedBlockError as error:
            share.damaged.append(key)
            logger.warning("block %s... is recomputed: %s", key[:12], error)
            return None

    def _count(self, shares: Sequence[_Share], wall_s: float) -> None:
        """Threads work at the same time: the time that passed is divided as their own times are."""
        failures = [failure for share in shares for failure in share.failures]
        if failures and not self.usage.store_failures:
            logger.warning("%d blocks are computed, because the store cannot read them: %s", len(failures), failures[0])
        self.usage.store_failures += len(failures)
        for share in shares:
            self.damaged.extend(share.damaged)
            self.usage.blocks_damaged += len(share.damaged)
            for key in share.reused:
                self._reuse(key)
        parts = [sum(getattr(share, name) for share in shares) for name in ("load_s", "check_s", "place_s")]
        scale = wall_s / max(sum(parts), 1e-12)
        self.timings.load_s += parts[0] * scale
        self.timings.check_s += parts[1] * scale
        self.timings.compose_s += parts[2] * scale

    def _reuse(self, key: str) -> None:
        self.usage.blocks_reused += len(self.places[key])
        self.usage.tokens_reused += self.tokens[key] * len(self.places[key])
