"""`verify` of the disk store: the blocks, and what only this store keeps: rows, files, totals, permissions."""

from __future__ import annotations

import re
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from blockrag.stores.disk.directory import FINGERPRINTS, REBUILDING, SINGLE_FILES, only_writer
from blockrag.stores.disk.fingerprint_files import FingerprintFiles
from blockrag.stores.disk.index import DBNAME, Discard, Index, chunks
from blockrag.stores.disk.rebuilding import clear, is_abandoned
from blockrag.stores.disk.rows import COLUMNS, Row, is_value_name
from blockrag.stores.disk.sweeping import strays
from blockrag.stores.disk.values import Buffer
from blockrag.stores.files import StoreFiles
from blockrag.stores.report import Fault, StoreReport, check_blocks, merged

if TYPE_CHECKING:
    from blockrag.stores.protocol import BlockStore

__all__ = ["GRACE_S", "Checked", "index_faults", "verify"]

GRACE_S: Final = 3600.0
"""A value file without a row may belong to a writer for this long."""

_MOMENT_S: Final = 0.1
_FOLDER: Final = re.compile(r"[0-9a-f]{2}")
_FOREIGN: Final = "blockrag never writes it; keep it elsewhere if it is yours, delete it if it is not"


@dataclass(frozen=True, slots=True)
class Checked:
    """An open store, as its check needs it.

    Args:
        store: For its blocks.
        root: Its directory.
        index: Its rows and value files.
        fingerprints: What wrote into it.
        files: The calls that may fail.
        write: Opens a write transaction.
        drop: Deletes the block of a row, if that is its row still.
    """

    store: BlockStore
    root: str
    index: Index
    fingerprints: FingerprintFiles
    files: StoreFiles
    write: Callable[[], AbstractContextManager[Discard]]
    drop: Callable[[Row], None]


def verify(checked: Checked, *, fix: bool) -> StoreReport:
    """Everything but the soundness of SQLite's own pages, which `index_faults` checks first.

    Raises:
        OSError: The directory cannot be read.
        sqlite3.Error: The index cannot be read.
        StoreError: The same, from the check of the blocks.
    """
    foreign = _foreign_rows(checked)
    faults = [Fault("foreign", f"row {rowid}", message, fixed=fix) for rowid, _, message in foreign]
    if fix and foreign:
        with checked.write() as discard:
            # A block may have been written over it since, or in its place. What such a row names may be another row's
            # file; if it is nobody's, it is swept.
            left = [(rowid, None) for rowid, row, _ in foreign if checked.index.row_at(rowid) == row]
            checked.index.drop(left, discard)
    blocks = _SoundBlocks(checked)
    report = check_blocks(cast("BlockStore", blocks), fix=fix)
    faults += blocks.unreadable
    faults += _strays(checked, fix=fix)
    faults += _totals(checked, fix=fix)
    faults += _fingerprints(checked, fix=fix)
    faults += _foreign_files(checked)
    faults += _exposed(checked, fix=fix)
    return merged(report, faults)


def index_faults(index: Index, write: Callable[[], AbstractContextManager[Discard]], *, fix: bool) -> list[Fault]:
    """What SQLite finds wrong in its file; `fix` builds its look-up tables anew, which is all that can be done there.

    Args:
        index: It.
        write: Opens a write transaction of it.
        fix: Mend what can be mended.

    Raises:
        sqlite3.OperationalError: It cannot be read just now.
    """
    index.follow()
    found = _integrity(index)
    mended = False
    if fix and found:
        with suppress(sqlite3.DatabaseError), write():
            index.execute("REINDEX")
        mended = not _integrity(index)
    return [Fault("damaged", DBNAME, message, fixed=mended) for message in found]


def _integrity(index: Index) -> list[str]:
    try:
        messages = [str(text) for (text,) in index.fetch("PRAGMA integrity_check(10)")]
    except sqlite3.OperationalError:
        # Of the medium, a lock, or a full disk, not of the file.
        raise
    except sqlite3.DatabaseError as error:
        return [str(error)]
    return [] if messages == ["ok"] else messages


class _SoundBlocks:
    """The store's blocks for `check_blocks`, read without counting as used.

    What must not be judged, or deleted, as a block is left out. Rows that the store refuses to read, and value files
    that are there but cannot be read just now, have a line of their own in the report: too many open files are no
    reason to delete blocks. A block whose row is gone was evicted since it was listed, and has none.
    """

    def __init__(self, checked: Checked) -> None:
        self._index = checked.index
        self._drop = checked.drop
        self.url = checked.store.url
        self.unreadable: list[Fault] = []
        # The row that a block was last read from, for the one that is being judged and those that were gone.
        self._rows: dict[str, Row] = {}

    def delete_many(self, keys: Sequence[str]) -> int:
        """Delete blocks as they were read last: whoever met a damaged one may have replaced it since."""
        for key in keys:
            self._drop(self._rows[key])
        return len(keys)

    def get_many(self, keys: Sequence[str]) -> Iterator[tuple[str, memoryview | None]]:
        """Each key that has a row with its block, or None where the row's file is gone."""
        buffer = Buffer()
        for chunk in chunks(keys, with_values=True):
            rows = self._index.rows(chunk)
            for key in chunk:
                row, previous, value = rows.get(key), None, None
                while row is not None and row != previous and (value := self._read(row, buffer)) is None:
                    # Somebody may have replaced it, and removed its file, since the row was read.
                    row, previous = self._index.rows([key]).get(key), row
                if row is None:
                    continue
                if value is None and self._index.values.length(row.filename or "") == row.size:
                    self.unreadable.append(Fault("unreadable", key, f"{row.filename} cannot be read, see the log"))
                else:
                    self._rows[key] = row
                    yield key, value
                    if value is not None:
                        del self._rows[key]
                del value

    def _read(self, row: Row, buffer: Buffer) -> memoryview | None:
        if row.filename is None:
            return self._index.values.load(row, row.size)
        opened = self._index.values.open(row.filename, row.size)
        return None if opened is None else self._index.values.read(opened, buffer)

    def keys(self) -> Iterator[str]:
        """The keys of the rows that are sound, and whose key no unsound row has; each once."""
        # Somebody may write the index anew meanwhile; what is gone is then looked for in that one.
        self._index.follow()
        unsound: set[object] = set()
        # A block that is deleted and written again meanwhile comes twice.
        sound: dict[str, None] = {}
        for rows in self._index.every(COLUMNS):
            for _, *columns in rows:
                row = Row(*columns)
                if row.sound and (row.filename is None or self._index.values.is_safe(row.filename)):
                    sound[row.key] = None
                else:
                    unsound.add(row.key)
        return (key for key in sound if key not in unsound)


def _foreign_rows(checked: Checked) -> list[tuple[int, Row, str]]:
    """Id, content and fault of each row that the store would refuse, or that shares its file with another."""
    found: list[tuple[int, Row, str]] = []
    owners: dict[str, int] = {}
    for rows in checked.index.every(COLUMNS):
        for rowid, *columns in rows:
            row = Row(*columns)
            if not row.sound:
                found.append((rowid, row, f"blockrag never writes such a row: {row}"))
            elif row.filename is not None and not checked.index.values.is_safe(row.filename):
                found.append((rowid, row, f"names {row.filename}, which is not a regular file of this directory"))
            elif row.filename is not None and owners.setdefault(row.filename, rowid) != rowid:
                found.append((rowid, row, f"names the file of row {owners[row.filename]}, {row.filename}"))
    return found


def _strays(checked: Checked, *, fix: bool) -> Iterator[Fault]:
    before = time.time() - GRACE_S
    found = strays(checked.root, checked.index, checked.files, before=before, remove=False)
    if found:
        # A file whose block is evicted, deleted or replaced just now is gone once that is done, or in a moment: who has
        # no budget takes no turns.
        with only_writer(checked.root, checked.files):
            time.sleep(_MOMENT_S)
        again = strays(checked.root, checked.index, checked.files, before=before, remove=fix)
        for name in set(found).intersection(again):
            yield Fault("stray", name, "no row names it; its writer was killed", fixed=fix)
    for name in list(checked.fingerprints.unfinished(before)):
        if fix:
            checked.fingerprints.remove(name)
        yield Fault("stray", name, "its writer was killed", fixed=fix)
    if is_abandoned(checked.root, checked.files, before=before):
        if fix:
            with only_writer(checked.root, checked.files):
                # Somebody may have removed it, or begun another.
                if is_abandoned(checked.root, checked.files, before=before):
                    clear(f"{checked.root}/{REBUILDING}", checked.files)
        yield Fault("stray", REBUILDING, "an index that was not finished", fixed=fix)


def _totals(checked: Checked, *, fix: bool) -> list[Fault]:
    index = checked.index
    with checked.write():
        wrong = [(name, index.kept(name), index.counted(name)) for name in ("count", "size")]
        wrong = [(name, kept, counted) for name, kept, counted in wrong if kept != counted]
        if fix and wrong:
            index.count_again()
    return [
        Fault("totals", DBNAME, f"keeps a {name} of {kept!r:.40}, its rows make {counted}", fixed=fix)
        for name, kept, counted in wrong
    ]


def _fingerprints(checked: Checked, *, fix: bool) -> Iterator[Fault]:
    for name, message in list(checked.fingerprints.faults()):
        if fix:
            checked.fingerprints.remove_faulty(name)
        yield Fault("damaged", name, message, fixed=fix)


def _foreign_files(checked: Checked) -> Iterator[Fault]:
    for name in sorted(checked.files.names(checked.root)):
        path = f"{checked.root}/{name}"
        with suppress(FileNotFoundError):
            mode = checked.files.status_of(path).st_mode
            if name in SINGLE_FILES:
                known = stat.S_ISREG(mode)
            else:
                known = stat.S_ISDIR(mode) and (name in (FINGERPRINTS, REBUILDING) or _is_folder(name))
            if not known:
                yield Fault("foreign", name, _FOREIGN)
            elif _is_folder(name):
                yield from _foreign_values(checked, name)
    for name in checked.fingerprints.foreign():
        yield Fault("foreign", name, _FOREIGN)


def _foreign_values(checked: Checked, folder: str) -> Iterator[Fault]:
    for entry in sorted(checked.files.names(f"{checked.root}/{folder}")):
        name = f"{folder}/{entry}"
        with suppress(FileNotFoundError):
            regular = stat.S_ISREG(checked.files.status_of(f"{checked.root}/{name}").st_mode)
            if not regular or not is_value_name(name):
                yield Fault("foreign", name, _FOREIGN)


def _exposed(checked: Checked, *, fix: bool) -> Iterator[Fault]:
    for path, name in _everything(checked.root, checked.files):
        with suppress(FileNotFoundError):
            mode = checked.files.status_of(path).st_mode
            # What is neither is foreign, and has its line already.
            if mode & 0o077 and (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                if fix:
                    checked.files.permit(path, 0o700 if stat.S_ISDIR(mode) else 0o600)
                message = f"others than its owner may use it (mode {stat.S_IMODE(mode):04o})"
                yield Fault("exposed", name, message, fixed=fix)


def _everything(root: str, files: StoreFiles) -> Iterator[tuple[str, str]]:
    """Path and name within the store of all that is in it, to the depth that it has, the directory itself first."""
    yield root, "."
    for name in sorted(files.names(root)):
        yield f"{root}/{name}", name
        with suppress(NotADirectoryError, FileNotFoundError):
            if stat.S_ISDIR(files.status_of(f"{root}/{name}").st_mode):
                inner: Sequence[str] = sorted(files.names(f"{root}/{name}"))
                yield from ((f"{root}/{name}/{entry}", f"{name}/{entry}") for entry in inner)


def _is_folder(name: str) -> bool:
    return _FOLDER.fullmatch(name) is not None
