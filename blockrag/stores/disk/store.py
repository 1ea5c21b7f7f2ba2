"""`DiskStore`: what every store does, by way of the index and the value files.

Under a byte budget, blocks are evicted in the transaction that adds the new row: the bytes of all rows never exceed
the budget, whichever process writes. Writers under a budget take turns from the first byte of a value file until the
files of what was evicted are gone, so that the files never exceed it by more than the block that is being written.
Reads take no lock; what they used is noted in memory and written with the next put, or at close.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.fingerprint import check_key
from blockrag.stores.arguments import byte_view, check_distinct
from blockrag.stores.disk.directory import MARKER, claim, only_writer
from blockrag.stores.disk.eviction import make_room
from blockrag.stores.disk.failures import FAILURES, translated
from blockrag.stores.disk.fingerprint_files import FingerprintFiles
from blockrag.stores.disk.gate import Gate
from blockrag.stores.disk.index import Discard, Index, check_schema, chunks, marks
from blockrag.stores.disk.rebuilding import rebuild_index
from blockrag.stores.disk.rows import COLUMNS, Row
from blockrag.stores.disk.sweeping import strays
from blockrag.stores.disk.values import Buffer, NewValue, OpenValue
from blockrag.stores.files import StoreFiles
from blockrag.stores.pins import Pins
from blockrag.stores.protocol import StoreStats

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from blockrag.fingerprint import Fingerprint
    from blockrag.stores.report import StoreReport

__all__ = ["DiskStore"]

_LOG = logging.getLogger(__name__)

_SWEEP_EVERY_S: Final = 86400.0
_READ_AHEAD: Final = 4
_MAX_NOTED_USES: Final = 16384


class DiskStore:
    """A directory of encoded blocks. Implements `BlockStore`; threads and processes may share it.

    Args:
        path: The directory; created with its parents if it is not there. An existing one must be empty, or a store.
        max_bytes: Budget for the blocks' bytes; None for no limit. Each opener brings its own, the smallest rules.
        files: The calls that may fail; for tests.

    Raises:
        InputError: `max_bytes` is less than 1.
        StoreError: The directory is not a store, cannot be written, or its index is damaged.
        UnsafeStoreError: The directory's index holds what blockrag never puts there.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, max_bytes: int | None = None, files: StoreFiles | None = None
    ) -> None:
        if max_bytes is not None and max_bytes < 1:
            raise InputError(f"max_bytes is {max_bytes}; pass at least 1, or None for no limit")
        self._max_bytes = max_bytes
        self._files = files or StoreFiles()
        self._renew_locks()
        self._gate = Gate()
        self._gate.after_forks_in_child(self._renew_locks)
        self._used: OrderedDict[str, float] = OrderedDict()
        self._hits = self._misses = self._puts = self._evictions = 0
        self._closed = False
        self._root = claim(Path(path), self._files)
        self._fingerprints = FingerprintFiles(self._root, self._files)
        self._index = self._open_index()

    @property
    def url(self) -> str:
        """Where the store is, as an absolute `disk://` URL with its budget."""
        budget = "" if self._max_bytes is None else f"?max_bytes={self._max_bytes}"
        return f"disk://{quote(self._root)}{budget}"

    def get(self, key: str) -> memoryview | None:
        """The encoded block over a fresh buffer, or None; a value file that is missing or short counts as missing.

        Raises:
            InputError: A malformed key.
            UnsafeStoreError: The row is one blockrag never writes.
            StoreError: The store is closed, or its index is damaged.
        """
        check_key(key)
        previous: Row | None = None
        while True:
            row = self._rows([key]).get(key)
            if row is None or row == previous:
                return self._count(key, row, None)
            value = self._index.values.load(row, row.size)
            if value is not None:
                return self._count(key, row, value)
            # Between the lookup and the read another process may have replaced the block, and its file with it.
            previous = row

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each of the distinct `keys` with its block or None, in order; the kernel reads up to four files ahead.

        Raises:
            InputError: A key comes twice or is malformed.
            UnsafeStoreError: A row is one blockrag never writes.
            StoreError: The store is closed, or its index is damaged.
        """
        check_distinct(keys)
        for key in keys:
            check_key(key)
        return self._read_ahead(keys)

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        """Store one encoded block, replacing the one under the same key, evicting just enough to keep the budget.

        Raises:
            InputError: A malformed key, or `data` is not bytes.
            StoreFullError: `data` exceeds the budget, alone or beside the pinned blocks, or the disk is full; what was
                stored before stays.
            StoreError: The store is closed, cannot be written, or its index is damaged.
        """
        check_key(key)
        view = byte_view(data)
        if self._max_bytes is not None and len(view) > self._max_bytes:
            raise StoreFullError(f"a block of {len(view)} bytes exceeds max_bytes={self._max_bytes}; raise max_bytes")
        turn: AbstractContextManager[None] = contextlib.nullcontext() if self._max_bytes is None else self._alone()
        with self._working("write to"), turn:
            new = self._index.values.write(view)
            try:
                evicted = self._commit(key, new)
            except BaseException:
                self._take_back(new)
                raise
            finally:
                new.release()
        with self._lock:
            self._puts += 1
            self._evictions += evicted

    def contains_many(self, keys: Iterable[str]) -> set[str]:
        """The subset of `keys` that is stored; reads no block and does not count as a use.

        A block whose value file is gone or has another length is not stored: who asks in order to compute what is
        missing (ingestion) then replaces it.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed, or its index is damaged.
        """
        found: set[str] = set()
        with self._working("read"):
            for chunk in chunks({check_key(key) for key in keys}):
                query = f"SELECT key, size, filename FROM Cache WHERE raw = 1 AND key IN ({marks(chunk)})"
                for key, size, filename in self._index.fetch(query, chunk):
                    if filename is None or self._index.values.length(filename) == size:
                        found.add(key)
        return found

    def delete_many(self, keys: Iterable[str]) -> int:
        """Remove blocks and their files; returns how many there were.

        Raises:
            InputError: A malformed key.
            StoreError: The store is closed, cannot be written, or its index is damaged.
        """
        with self._working("write to"), self._alone():
            some = chunks({check_key(key) for key in keys})
            return sum(self._delete(f"key IN ({marks(chunk)})", chunk) for chunk in some)

    def keys(self) -> Iterator[str]:
        """All keys in the index, each once, in the order in which they were first stored.

        Raises:
            UnsafeStoreError: A row is one blockrag never writes.
            StoreError: The store is closed, or its index is damaged.
        """
        every = self._index.every(COLUMNS)
        # A block that is deleted and written again meanwhile is met twice.
        seen: set[str] = set()
        while True:
            with self._working("read"):
                rows = next(every, None)
            if rows is None:
                return
            for _, *columns in rows:
                key = Row(*columns).checked().key
                if key not in seen:
                    seen.add(key)
                    yield key

    def stats(self) -> StoreStats:
        """Counters: contents as all processes see them, traffic of this object.

        Raises:
            StoreError: The store is closed, or its index is damaged.
        """
        with self._working("read"):
            blocks, total = self._index.total("count"), self._index.total("size")
        with self._lock:
            return StoreStats(
                blocks=blocks,
                bytes=total,
                max_bytes=self._max_bytes,
                hits=self._hits,
                misses=self._misses,
                puts=self._puts,
                evictions=self._evictions,
            )

    def pinned(self, keys: Iterable[str]) -> AbstractContextManager[None]:
        """Until the context ends, no `put` of this object evicts any of these blocks; other processes may."""
        return self._pins.held(keys)

    def remember_fingerprint(self, fingerprint: Fingerprint) -> None:
        """Note that blocks of this fingerprint are written here, in a file of its own.

        Raises:
            StoreError: The store is closed, or cannot be written.
        """
        with self._working("write to"):
            self._fingerprints.remember(fingerprint)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """The remembered fingerprints by digest; one that cannot be read is left out and logged.

        Raises:
            StoreError: The store is closed, or its directory cannot be read.
        """
        with self._working("read"):
            return self._fingerprints.read()

    def verify(self, *, fix: bool = False) -> StoreReport:
        """Check every block, the index and its rows, totals, files that belong to nobody, and permissions.

        Blocks that other processes replace or evict meanwhile are no faults, nor are the files they are writing.

        Args:
            fix: Remove damaged blocks, foreign rows and files of killed writers; set totals and permissions right;
                write a damaged index anew from the value files. What blockrag never wrote stays, as a fault.

        Raises:
            StoreError: The store is closed, or its index cannot be read; `rebuild_index` makes a new one.
        """
        from blockrag.stores.disk.checking import Checked, index_faults, verify
        from blockrag.stores.report import merged

        with self._translated("check"):
            faults = index_faults(self._index, self._transaction, fix=fix)
            if fix and not all(fault.fixed for fault in faults):
                self._renew_index()
                faults = [replace(fault, fixed=True) for fault in faults]
            checked = Checked(self, self._root, self._index, self._fingerprints, self._files, self._write, self._drop)
            return merged(verify(checked, fix=fix), faults)

    def sweep(self, *, older_than_s: float = 3600.0) -> int:
        """Remove value files that no row names, as killed writers leave them; runs at open, once a day at most.

        Args:
            older_than_s: Grace period. A younger file may belong to a writer that has not locked it yet; one that a
                writer has locked stays, however old it is.

        Returns:
            How many files were removed.

        Raises:
            StoreError: The store is closed, or its index is damaged.
        """
        before = time.time() - older_than_s
        with self._translated("read"):
            found = strays(self._root, self._index, self._files, before=before, remove=True)
            for name in list(self._fingerprints.unfinished(before)):
                self._fingerprints.remove(name)
                found.append(name)
        if found:
            _LOG.info("removed %d files of unfinished writes from %s", len(found), self._root)
        return len(found)

    def close(self) -> None:
        """Write down what was used, and close, once other threads are done; closing twice is fine."""
        if self._closed:
            return
        try:
            if self._used:
                with self._write():
                    pass
        except FAILURES as error:
            _LOG.warning("the order of use was not saved to %s (%s)", self._root, error)
        finally:
            self._closed = True
            self._index.close_for_good()

    def _renew_locks(self) -> None:
        """Have locks and pins that no thread holds: a child has not the threads of its parent."""
        self._lock, self._turn, self._write_lock = threading.Lock(), threading.RLock(), threading.RLock()
        self._pins = Pins()

    def _open_index(self) -> Index:
        """Open the index and bring it in order: its totals, the budget, files of killed writers."""
        with self._translated("open"):
            # Not one that somebody is about to replace.
            with self._alone():
                check_schema(self._root, self._files, self._gate)
                self._index = Index(self._root, self._files, self._gate)
                try:
                    with self._write() as discard:
                        self._index.execute("CREATE INDEX IF NOT EXISTS Cache_use ON Cache (access_time, size)")
                        self._index.count_again()
                        self._evictions += self._make_room(discard, "", 0)
                except BaseException:
                    self._index.close()
                    raise
            try:
                marker = f"{self._root}/{MARKER}"
                if time.time() - self._files.status_of(marker).st_mtime > _SWEEP_EVERY_S:
                    self._files.touch(marker)
                    self._sweep_or_say()
            except BaseException:
                self._index.close()
                raise
        return self._index

    def _renew_index(self) -> None:
        """Have the index written anew from the value files; writers wait, in whichever thread or process."""
        with self._gate.at_work(), self._turn, self._write_lock:
            rebuild_index(self._root, files=self._files)
            # The connections to the damaged one are closed when those who still use them are done.
            self._open_index()

    def _sweep_or_say(self) -> None:
        """A store whose housekeeping fails can be used all the same."""
        try:
            self.sweep()
        except StoreError as error:
            _LOG.warning("files of killed writers stay: %s", error)

    def _rows(self, keys: Sequence[str]) -> dict[str, Row]:
        with self._working("read"):
            return self._index.rows(keys)

    def _read_ahead(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        pending: deque[tuple[str, Row | None, OpenValue | None]] = deque()
        buffer = Buffer()
        try:
            for chunk in chunks(keys, with_values=True):
                rows = self._rows(chunk)
                for key in chunk:
                    row, opened = rows.get(key), None
                    if row is not None and row.filename is not None:
                        opened = self._index.values.open(row.filename, row.size)
                        _announce(opened)
                    pending.append((key, row, opened))
                    if len(pending) > _READ_AHEAD:
                        yield self._settle(*pending.popleft(), buffer)
            while pending:
                yield self._settle(*pending.popleft(), buffer)
        finally:
            for _, _, opened in pending:
                if opened is not None:
                    os.close(opened.handle)

    def _settle(
        self, key: str, row: Row | None, opened: OpenValue | None, buffer: Buffer
    ) -> tuple[str, memoryview | None]:
        if row is None:
            return key, self._count(key, None, None)
        values = self._index.values
        value = values.load(row, row.size) if opened is None else values.read(opened, buffer)
        return key, self.get(key) if value is None else self._count(key, row, value)

    def _count(self, key: str, row: Row | None, value: memoryview | None) -> memoryview | None:
        """Note a hit or a miss; `row` without `value` is a damaged block."""
        if row is not None and value is None:
            _LOG.warning("block %s: its value is gone or short; the block counts as missing", key)
        with self._lock:
            if value is None:
                self._misses += 1
                return None
            self._hits += 1
            self._used[key] = time.time()
            self._used.move_to_end(key)
            if len(self._used) > _MAX_NOTED_USES:
                self._used.popitem(last=False)
            return value

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """This thread's turn, of all threads and processes, to change which value files there are."""
        with self._gate.at_work(), self._turn, only_writer(self._root, self._files):
            yield

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Discard]:
        """A write transaction; one thread of this process at a time."""
        with self._gate.at_work(), self._write_lock, self._index.write() as discard:
            yield discard

    @contextlib.contextmanager
    def _write(self) -> Iterator[Discard]:
        """A `_transaction` that first notes what was used."""
        with self._gate.at_work(), self._write_lock:
            with self._lock:
                used, self._used = self._used, OrderedDict()
            try:
                with self._transaction() as discard:
                    self._index.note_uses(used)
                    yield discard
            except BaseException:
                with self._lock:
                    self._used = OrderedDict({**used, **self._used})
                raise

    def _commit(self, key: str, new: NewValue) -> int:
        """Put a written value's row in place of the one of its key; returns the number of blocks evicted for it."""
        with self._write() as discard:
            evicted = self._make_room(discard, key, new.size)
            for (old,) in self._index.fetch("SELECT filename FROM Cache WHERE key = ? AND raw = 1", (key,)):
                # A new index may name the file already: it was complete when that was written.
                if old != new.filename:
                    discard(old)
            self._index.put(Row(key, 1, new.mode, new.size, new.filename, None), new.value, time.time())
        return evicted

    def _take_back(self, new: NewValue) -> None:
        """Remove a written file unless its row was committed after all; one that stays is swept."""
        if new.filename is not None:
            with contextlib.suppress(sqlite3.Error):
                if not self._index.named([new.filename]):
                    self._index.values.remove(new.filename)

    def _make_room(self, discard: Discard, key: str, size: int) -> int:
        if self._max_bytes is None:
            return 0
        return make_room(self._index, discard, key, size, max_bytes=self._max_bytes, pins=self._pins)

    def _drop(self, row: Row) -> None:
        """Delete the block of a row, unless it was replaced since that was read."""
        which = "key = ? AND mode = ? AND size = ? AND filename IS ? AND value IS ?"
        with self._alone():
            self._delete(which, (row.key, row.mode, row.size, row.filename, row.value))

    def _delete(self, which: str, values: Sequence[object]) -> int:
        """Delete the rows that a condition holds for, with their files; it is the caller's turn."""
        query = f"SELECT rowid, filename FROM Cache WHERE raw = 1 AND {which}"
        try:
            with self._write() as discard:
                rows = self._index.fetch(query, values)
                self._index.drop(rows, discard)
            return len(rows)
        except FAILURES as error:
            if not isinstance(translated(error, self._root, "write to"), StoreFullError):
                raise
        # On a full disk the transaction has no room either. Removing the files first makes some; should it fail again,
        # their rows read as missing blocks.
        for _, filename in self._index.fetch(query, values):
            if filename is not None:
                self._index.values.remove(filename)
        with self._write() as discard:
            rows = self._index.fetch(query, values)
            self._index.drop(rows, discard)
        return len(rows)

    @contextlib.contextmanager
    def _translated(self, doing: str) -> Iterator[None]:
        """Turn what SQLite, diskcache and the file system raise into the store's own errors."""
        self._refuse_closed()
        try:
            yield
        except FAILURES as error:
            self._refuse_closed()
            raise translated(error, self._root, doing) from error

    @contextlib.contextmanager
    def _working(self, doing: str) -> Iterator[None]:
        """The same for what is done in a moment: who closes the store, or forks, waits for its end."""
        with self._gate.at_work(), self._translated(doing):
            yield

    def _refuse_closed(self) -> None:
        if self._closed:
            raise StoreError(f"the store {self.url} is closed; open it again with open_store()")


def _announce(opened: OpenValue | None) -> None:
    """Have the kernel start reading a file that is wanted soon.

    Reading ahead in threads measured slower where files are in the page cache (3.5 against 2.0 ms for 16 MB: memory
    is faulted in by one thread and used by another), no faster where they are not, and holds several blocks.
    """
    if opened is not None and hasattr(os, "posix_fadvise"):
        os.posix_fadvise(opened.handle, 0, 0, os.POSIX_FADV_WILLNEED)
