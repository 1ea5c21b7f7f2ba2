"""`TieredStore`: a few stores behind each other, the fastest first, the durable one last.

A block is read from the first tier that has it, and what is found lower is put into the tiers above. A block is
written to all of them. The last tier is the store, the others are caches of it:

- `contains_many` says what the last tier has, since a block that lies only in memory is gone with the process, and one
  that lies only on this machine's disk is not shared. Whoever fills the store thereby fills the last tier.
- `blocks`, `bytes`, `max_bytes` and `evictions` of the statistics are those of the last tier; each tier's own are under
  `tiers`.
- An upper tier that refuses a block (it is full, its disk fails) costs only the reuse, and is logged. A block that the
  last tier refuses is an error, after the others have taken it.
- What is written goes to the last tier at the end, and what is deleted is deleted there first, so that two threads that
  do both leave nothing above that is not below. A block that is deleted while it is read is not put above, or taken
  back: it would be handed out for as long as it lies there.

A copy that comes from anything but memory is verified before it is handed on: one that is damaged is looked for in the
tiers below, and replaced by what is found there. That is one checksum more than the model's own, 0.02 ms a megabyte
where it was measured. What this process itself put into memory is left to the model's check.

A GPU's memory is not a tier of this store: blocks lie there placed and decoded, see `BlockModel(device_pool=...)`.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.fingerprint import check_key
from blockrag.stores.arguments import check_distinct
from blockrag.stores.memory import MemoryStore
from blockrag.stores.protocol import BlockStore, StoreStats
from blockrag.stores.remote import flaw
from blockrag.stores.report import StoreReport

if TYPE_CHECKING:
    from blockrag.fingerprint import Fingerprint

__all__ = ["TieredStore"]

_LOG = logging.getLogger(__name__)


class TieredStore:
    """Stores behind each other. Implements `BlockStore`; it owns its tiers and closes them.

    Args:
        tiers: The stores, the fastest first, at least one.

    Raises:
        InputError: No tiers, or one that is itself tiered.
    """

    def __init__(self, tiers: Sequence[BlockStore]) -> None:
        if not tiers or any(isinstance(tier, TieredStore) for tier in tiers):
            raise InputError(f"a tiered store is made of one or more plain stores, got {list(tiers)!r:.200}")
        self._tiers = tuple(tiers)
        self._last = len(tiers) - 1
        self._lock = threading.Lock()
        # Blocks that were looked for in a tier by `contains_many`, and are none of its own misses therefore.
        self._passed: Counter[int] = Counter()
        # For each running read the keys that were deleted since it began.
        self._reads: dict[int, set[str]] = {}
        self._hits = self._misses = self._puts = self._failures = 0

    @property
    def url(self) -> str:
        """The tiers' URLs, as `open_store` takes them together."""
        return "tiered:" + "|".join(tier.url for tier in self._tiers)

    def get(self, key: str) -> memoryview | None:
        """The encoded block of the first tier that has it sound, or None; the tiers above get it.

        Raises:
            InputError: A malformed key.
            StoreError: A tier is closed or unusable.
        """
        check_key(key)
        with self._reading() as deleted:
            data = self._get_from(0, key, deleted)
        self._count(hits=data is not None, misses=data is None)
        return data

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order, each tier reading ahead as it does.

        Raises:
            InputError: A key comes twice or is malformed.
            StoreError: A tier is closed or unusable.
        """
        check_distinct(keys)
        for key in keys:
            check_key(key)
        return self._in_order(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store one encoded block in all tiers, replacing the one under the same key.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: The last tier has no room for it.
            StoreError: The last tier could not write it.
        """
        self._put_above(self._last, key, data)
        self._tiers[-1].put(key, data)
        with self._lock:
            self._puts += 1

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that the last tier has.

        Raises:
            InputError: A malformed key.
            StoreError: The last tier is closed or unusable.
        """
        return self._tiers[-1].contains_many(keys)

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks from all tiers; returns how many there were in any.

        Raises:
            InputError: A malformed key.
            StoreError: A tier could not remove them; the others have.
        """
        wanted = {check_key(key) for key in keys}
        found: set[str] = set()

        def delete(tier: BlockStore) -> None:
            found.update(tier.contains_many(wanted))
            tier.delete_many(wanted)

        self._tell_reads(wanted)
        self._each(delete)
        return len(found)

    def keys(self) -> Iterator[str]:
        """The keys of all tiers, each once; those listed so far are kept in memory.

        Raises:
            StoreError: A tier is closed or cannot be listed.
        """
        listed = [tier.keys() for tier in self._tiers]

        def distinct() -> Iterator[str]:
            seen: set[str] = set()
            for names in listed:
                for key in names:
                    if key not in seen:
                        seen.add(key)
                        yield key

        return distinct()

    def stats(self) -> StoreStats:
        """The contents of the last tier, the traffic of this store, and each tier's own counters.

        Raises:
            StoreError: A tier is closed.
        """
        with self._lock:
            hits, misses, puts, failures = self._hits, self._misses, self._puts, self._failures
            passed = self._passed.copy()
        own = [tier.stats() for tier in self._tiers]
        own = [replace(stats, misses=stats.misses + passed[place]) for place, stats in enumerate(own)]
        return replace(
            own[-1],
            hits=hits,
            misses=misses,
            puts=puts,
            failures=failures + sum(stats.failures for stats in own),
            tiers=tuple((tier.url, stats) for tier, stats in zip(self._tiers, own, strict=True)),
        )

    @contextmanager
    def pinned(self, keys: Iterable[str]) -> Iterator[None]:
        """Until the context ends, no `put` makes any tier of this process evict these blocks."""
        wanted = set(keys)
        with ExitStack() as stack:
            for tier in self._tiers:
                stack.enter_context(tier.pinned(wanted))
            yield

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note in all tiers that blocks of this fingerprint are written here.

        Raises:
            StoreError: The last tier could not write it.
        """
        for tier in self._tiers[:-1]:
            _forgiven(tier, lambda tier: tier.remember_fingerprint(fingerprint))
        self._tiers[-1].remember_fingerprint(fingerprint)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The fingerprints that any tier remembers, by digest.

        Raises:
            StoreError: A tier is closed or cannot be read.
        """
        return {digest: found for tier in self._tiers for digest, found in tier.fingerprints().items()}

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Check every tier; blocks and bytes are the last tier's, each fault says where it is.

        Raises:
            StoreError: A tier cannot be read at all.
        """
        reports = [tier.verify(fix=fix) for tier in self._tiers]
        faults = (
            replace(fault, message=f"{report.url}: {fault.message}") for report in reports for fault in report.faults
        )
        return replace(reports[-1], url=self.url, faults=tuple(faults))

    def close(self) -> None:
        """Close all tiers."""
        self._each(lambda tier: tier.close())

    def _in_order(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        first = self._first_tiers(keys)
        by_tier = [[key for key in keys if first[key] == place] for place in range(len(self._tiers))]
        found = [tier.get_many(mine) for tier, mine in zip(self._tiers, by_tier, strict=True)]
        with ExitStack() as stack:
            deleted = stack.enter_context(self._reading())
            # Blocks from below must not push out those that are still to be read.
            for tier, mine in zip(self._tiers, by_tier, strict=True):
                stack.enter_context(tier.pinned(mine))
            for key in keys:
                place = first[key]
                _, data = next(found[place])
                data = self._accepted(place, key, data, deleted)
                if data is None and place < self._last:
                    data = self._get_from(place + 1, key, deleted)
                self._count(hits=data is not None, misses=data is None)
                yield key, data
                # Not to be alive when the next one is read: its memory is used again.
                del data

    def _first_tiers(self, keys: Sequence[str]) -> dict[str, int]:
        """For each key the first tier that says it has it; the last one need not."""
        first = dict.fromkeys(keys, self._last)
        rest = list(keys)
        for place, tier in enumerate(self._tiers[:-1]):
            there = tier.contains_many(rest) if rest else set()
            first.update(dict.fromkeys(there, place))
            rest = [key for key in rest if key not in there]
            with self._lock:
                self._passed[place] += len(rest)
        return first

    @contextmanager
    def _reading(self) -> Iterator[set[str]]:
        """For as long as something is read; what is deleted meanwhile is added to the set."""
        deleted: set[str] = set()
        with self._lock:
            self._reads[id(deleted)] = deleted
        try:
            yield deleted
        finally:
            with self._lock:
                del self._reads[id(deleted)]

    def _tell_reads(self, deleted: set[str]) -> None:
        with self._lock:
            for known in self._reads.values():
                known |= deleted

    def _get_from(self, first: int, key: str, deleted: set[str]) -> memoryview | None:
        for place in range(first, len(self._tiers)):
            data = self._accepted(place, key, self._tiers[place].get(key), deleted)
            if data is not None:
                return data
        return None

    def _accepted(self, place: int, key: str, data: memoryview | None, deleted: set[str]) -> memoryview | None:
        """A block that a tier has brought, if it is sound; the tiers above get it unless it was deleted meanwhile."""
        if data is None:
            return None
        tier = self._tiers[place]
        if not isinstance(tier, MemoryStore) and (wrong := flaw(key, data)):
            _LOG.warning("%s: block %s... is damaged: %s", tier.url, key[:12], wrong)
            self._count(failures=1)
            return None
        self._put_above(place, key, data)
        # Asked for afterwards: who deletes it from now on finds it above.
        if key in deleted:
            # Somebody may have found it there, and be about to put it higher.
            self._tell_reads({key})
            for above in self._tiers[:place]:
                _forgiven(above, lambda above: above.delete_many([key]))
        return data

    def _put_above(self, place: int, key: str, data: bytes | bytearray | memoryview) -> None:
        for tier in self._tiers[:place]:
            if not _forgiven(tier, lambda tier: tier.put(key, data)):
                # What it has under that key, if anything, is damaged or another.
                _forgiven(tier, lambda tier: tier.delete_many([key]))

    def _each(self, call: Callable[[BlockStore], object]) -> None:
        """Call for every tier, the last one first, and raise the first error when all have had their turn."""
        errors = []
        for tier in reversed(self._tiers):
            try:
                call(tier)
            except StoreError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def _count(self, *, hits: int = 0, misses: int = 0, failures: int = 0) -> None:
        with self._lock:
            self._hits += hits
            self._misses += misses
            self._failures += failures


def _forgiven(tier: BlockStore, call: Callable[[BlockStore], object]) -> bool:
    """Whether an upper tier did something."""
    try:
        call(tier)
    except StoreFullError as error:
        _LOG.debug("left to the tiers below: %s", error)
    except StoreError as error:
        _LOG.warning("left to the tiers below: %s", error)
    else:
        return True
    return False
