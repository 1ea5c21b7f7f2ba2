"""The check of a directory that ingestion made: its index, its block store, and each against the other.

A block that the index names and the store lacks is no fault: it was evicted, and is computed again when it is needed.
Nor is one that no passage names: prompts' first and last parts are stored too, and several indexes may share a store.
Both are counted.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from blockrag.errors import InputError, PassageIndexError, StoreError, UnsafeStoreError
from blockrag.fingerprint import check_key
from blockrag.index.checking import check_index
from blockrag.index.files import DATABASE_FILE
from blockrag.stores.report import Fault, StoreReport, merged

if TYPE_CHECKING:
    from blockrag.index.checking import IndexReport
    from blockrag.stores.protocol import BlockStore

__all__ = ["DirectoryReport", "check_directory", "check_store"]

_KEYS_AT_ONCE = 1024
# How every release's marker of a store's directory begins.
_STORE_MARKER = "blockrag-store-"

Watch = Callable[["BlockStore"], AbstractContextManager[object]]
"""Told the store whose blocks are read while the context lasts."""


@dataclass(frozen=True, slots=True)
class DirectoryReport:
    """What was found.

    Args:
        where: The directory, or the store's URL.
        index: The index; None where there is none, or it cannot be opened.
        store: The block store; likewise.
        unusable: Why an index or a store cannot be opened, and what to do.
        missing: Blocks that the index names and the store lacks.
        unused: Blocks that no passage of the index names, if there is an index.
        unused_bytes: Their bytes.
        deleted: How many of them were deleted.
    """

    where: str
    index: IndexReport | None = None
    store: StoreReport | None = None
    unusable: tuple[str, ...] = ()
    missing: int = 0
    unused: int = 0
    unused_bytes: int = 0
    deleted: int = 0

    @property
    def faults(self) -> tuple[Fault, ...]:
        """All that is or was wrong."""
        return (*(self.index.faults if self.index else ()), *(self.store.faults if self.store else ()))

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong any more."""
        return not self.unusable and all(fault.fixed for fault in self.faults)


def check_store(store: BlockStore, *, fix: bool = False, watch: Watch | None = None) -> DirectoryReport:
    """Check a block store alone.

    Args:
        store: It.
        fix: Remove what is damaged or belongs to nobody.
        watch: Told the store while its blocks are read.

    Raises:
        StoreError: The store cannot be read at all.
    """
    with watch(store) if watch is not None else nullcontext():
        return DirectoryReport(store.url, store=store.verify(fix=fix))


def check_directory(
    path: Path, *, fix: bool = False, delete_unused: bool = False, watch: Watch | None = None
) -> DirectoryReport:
    """Check everything in a directory; loads no model.

    Args:
        path: What `blockrag ingest` or `BlockRAG(path=...)` made, or the directory of an index or a store alone.
        fix: Remove damaged blocks and what belongs to nobody, and make again what follows from passages and blocks.
        delete_unused: Also delete the blocks that no passage of this index names. For a store of this index alone,
            while nothing is ingested: blocks whose documents are not committed yet are deleted as well.
        watch: Told the store while its blocks are read.

    Raises:
        InputError: There is none of these, or `delete_unused` is asked for and there is no index, or a faulty one.
        PassageIndexError: The index, which is asked again before anything is deleted, cannot be opened any more.
    """
    index_path, store_path = _parts(path)
    report = DirectoryReport(str(path))
    if index_path is not None:
        try:
            report = replace(report, index=_with_sound_keys(check_index(index_path, fix=fix)))
        except PassageIndexError as error:
            report = replace(report, unusable=(str(error),))
    if delete_unused and (report.index is None or not report.index.ok):
        raise InputError(
            f"{path} has no sound index that could say which blocks are unused; leave --delete-unused out, and see "
            "what is wrong with it"
        )
    if store_path is None:
        return report
    try:
        store, faults = _opened(store_path, fix=fix)
        with closing(store):
            checked = check_store(store, fix=fix, watch=watch).store
            if checked is not None:
                report = replace(report, store=merged(checked, faults))
            return _compared(report, store, delete_by=index_path if delete_unused else None)
    except StoreError as error:
        return replace(report, unusable=(*report.unusable, str(error)))


def _parts(path: Path) -> tuple[Path | None, Path | None]:
    """The directories of the index and of the store."""
    if not path.is_dir():
        raise InputError(f"there is no directory {path}; pass one that `blockrag ingest` made, or a store's")
    names = {entry.name for entry in path.iterdir()}
    if DATABASE_FILE in names:
        return path, None
    if any(name.startswith(_STORE_MARKER) for name in names):
        return None, path
    index, store = (path / name if (path / name).is_dir() else None for name in ("index", "kv"))
    if index is None and store is None:
        raise InputError(f"{path} holds neither an index nor a block store; pass a directory of `blockrag ingest`")
    return index, store


def _with_sound_keys(report: IndexReport) -> IndexReport:
    """The report, with faults for block keys that are none."""
    bad: dict[str, Fault] = {}
    for key in sorted(report.block_keys):
        try:
            check_key(key)
        except InputError as error:
            bad[key] = Fault("damaged", f"block key {key!r:.80}", f"{error}; ingest the documents again")
    return replace(report, block_keys=report.block_keys - bad.keys(), faults=(*report.faults, *bad.values()))


def _opened(path: Path, *, fix: bool) -> tuple[BlockStore, list[Fault]]:
    """The store in a directory, without a budget that would evict; and what had to be mended to open it.

    Raises:
        StoreError: It cannot be opened.
    """
    from blockrag.stores.disk import DiskStore
    from blockrag.stores.disk.rebuilding import rebuild_index

    try:
        return DiskStore(path), []
    except UnsafeStoreError:
        raise
    except StoreError as error:
        # What SQLite says of a damaged file; a lock or a full disk is one of its OperationalErrors.
        if not fix or type(error.__cause__) not in (sqlite3.DatabaseError, UnicodeDecodeError):
            raise
        blocks = rebuild_index(path)
        return DiskStore(path), [Fault("damaged", "index", f"{error}; made anew with {blocks} blocks", fixed=True)]


def _compared(report: DirectoryReport, store: BlockStore, *, delete_by: Path | None) -> DirectoryReport:
    """The report with what the index names and the store has; what the index at `delete_by` does not name is deleted.

    That index is asked after the store: blocks are stored before their documents are committed.
    """
    if report.index is None:
        return report
    stored = set(store.keys())
    named = report.index.block_keys if delete_by is None else check_index(delete_by).block_keys
    unused = sorted(stored - named)
    size = sum(len(data) for _, data in store.get_many(unused) if data is not None)
    deleted = 0
    if delete_by is not None:
        rest = iter(unused)
        while portion := list(islice(rest, _KEYS_AT_ONCE)):
            deleted += store.delete_many(portion)
    missing = len(named - stored)
    return replace(report, missing=missing, unused=len(unused), unused_bytes=size, deleted=deleted)
