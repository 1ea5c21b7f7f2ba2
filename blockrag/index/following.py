"""The searchable vectors kept in step with the database: loaded, caught up, built anew, and written to their file.

It owns the stamps, which say what state of the database the vectors in memory and in the file are, and the lock under
which they change: searches run side by side and exclude only the moment in which a write lands. It knows no passages
and no encoder.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from blockrag.encoders.protocol import Vectors
from blockrag.errors import PassageIndexError
from blockrag.index.database import PassageDatabase
from blockrag.index.files import VECTOR_FILE, make_private
from blockrag.index.locks import ReadWriteLock
from blockrag.index.vectors import VectorFileError, VectorIndex

__all__ = ["FollowingVectors"]

_log = logging.getLogger(__name__)

_WORN = "most of what they were built from has changed"


class FollowingVectors:
    """Vectors that follow a database: taken from their file if they are those of the database, else made from it.

    Args:
        database: What they follow.
        index: An empty index, of the kind and dimension wanted.
        directory: Where the vector file is; None for an index in memory.

    Raises:
        PassageIndexError: The database is damaged.
    """

    def __init__(self, database: PassageDatabase, index: VectorIndex, directory: Path | None) -> None:
        self._database = database
        self._index = index
        self._file = None if directory is None else directory / VECTOR_FILE
        # The database state the vectors in memory are, and the one in the vector file; "" is neither.
        self._stamp = self._saved_stamp = ""
        self.lock = ReadWriteLock()
        self._load()

    @property
    def index(self) -> VectorIndex:
        """The vectors, to search while the lock is held for reading."""
        return self._index

    def _load(self) -> None:
        with self._database.connection.transaction(writing=False):
            stamp, rows = self._database.stamp, self._database.rows()
            if self._file is None:
                self._stamp = stamp
                return
            kind, dimension = self._index.kind, self._index.dimension
            try:
                make_private(self._file)
                self._index = VectorIndex.load(self._file, kind, dimension, stamp=stamp, rows=rows)
            except VectorFileError as error:
                level = logging.INFO if error.ordinary else logging.WARNING
                self._rebuild(f"{VECTOR_FILE} cannot be used: {error}", level)
            else:
                self._stamp = self._saved_stamp = stamp

    def _rebuild(self, reason: str, level: int = logging.WARNING) -> None:
        """Build the vectors from the database; the lock is held alone, or nobody else has the index yet."""
        self._stamp = ""
        with self._database.connection.transaction(writing=False):
            stamp, rows = self._database.stamp, self._database.rows()
            if len(rows):
                _log.log(level, "building the vectors of %d passages anew: %s", len(rows), reason)
            chunks = self._database.embedding_chunks(rows)
            self._index = VectorIndex(self._index.kind, self._index.dimension, chunks)
        self._stamp = stamp

    def catch_up(self) -> None:
        """Follow what was committed since the vectors were last in step, by this process or another.

        Raises:
            PassageIndexError: The database is damaged, locked or closed.
        """
        if self._database.stamp == self._stamp:
            return
        with self.lock.writing(), self._database.connection.transaction(writing=False):
            stamp, rows, known = self._database.stamp, self._database.rows(), self._index.rows
            if stamp == self._stamp:
                return
            if not self._stamp:
                self._rebuild("an earlier change did not complete")
                return
            self._stamp = ""
            self._index.remove(np.setdiff1d(known, rows))
            for some, vectors in self._database.embedding_chunks(np.setdiff1d(rows, known)):
                self._index.add(some, vectors)
            self._stamp = stamp
            if self._index.worn:
                self._rebuild(_WORN)

    def apply(self, before: str, after: str, *, gone: Sequence[int], new: Mapping[int, Vectors] | None = None) -> None:
        """Bring a committed write into the vectors; the lock is held alone.

        Args:
            before: The stamp of the database before the write.
            after: Its stamp now.
            gone: The rows that the write deleted.
            new: The vectors `[dimension]` float32 of the rows that it inserted.
        """
        if before != self._stamp:
            # Another process wrote before us: the next search catches up with both.
            return
        self._stamp = ""
        self._index.remove(np.array(gone, dtype=np.int64))
        if new:
            self._index.add(np.array(list(new), dtype=np.int64), np.stack(list(new.values())))
        self._stamp = after
        if self._index.worn:
            self._rebuild(_WORN)

    def save(self) -> None:
        """Write the vector file unless it is up to date; the caller keeps writers out, searches go on.

        Raises:
            PassageIndexError: The index is in memory only, or the file cannot be written (the index stays usable).
        """
        if self._file is None:
            raise PassageIndexError("this index is in memory only; open PassageIndex(encoder, path) to save one")
        self.catch_up()
        with self.lock.reading():
            if self._stamp == self._saved_stamp:
                return
            try:
                self._index.save(self._file, self._stamp)
            except OSError as error:
                raise PassageIndexError(
                    f"cannot write {self._file} ({error}); free the disk and call save() again. No passage is lost: "
                    "the file is rebuilt from the database"
                ) from error
            self._saved_stamp = self._stamp

    def distrust_file(self) -> None:
        """Have the next `save` write the file: it may be another one now."""
        self._saved_stamp = ""
