"""The searchable vectors: FAISS and its file; the only room that knows FAISS.

Everything here is derived from the database and may be thrown away: the file carries its own checksum, counts and the
stamp of the database state it was made from, and whatever does not fit is refused so that the caller rebuilds. Half
of all randomly damaged FAISS files load and search without an error, so FAISS never sees bytes that were not checked.

Nothing here knows passages or SQLite: rows are 64-bit numbers that are never used twice. Callers exclude `add` and
`remove` from `search` (FAISS crashes otherwise).
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.encoders.protocol import Vectors

__all__ = ["Kind", "Rows", "VectorFileError", "VectorIndex"]

Kind = Literal["flat", "hnsw", "ivf"]
Rows = NDArray[np.int64]
"""A `[n]` int64 array of passage rows."""

_MAGIC = "blockrag vectors 1"
_HEADER_BYTES = 512
_CHUNK_BYTES = 1 << 20
# Below this FAISS has too few points to train inverted lists (it asks for 39 a list), and a flat scan is instant.
_IVF_MIN_ROWS = 1024
_POINTS_PER_LIST = 39
_HNSW_LINKS = 32
_HNSW_BUILD_BREADTH = 128
_HNSW_SEARCH_BREADTH = 128


class VectorFileError(Exception):
    """The vector file cannot be used; never leaves `blockrag.index`, where it means: rebuild.

    Attributes:
        ordinary: The file is missing or behind the database, as after a process that ended without close(): nothing
            is damaged.
    """

    def __init__(self, message: str, *, ordinary: bool = False) -> None:
        super().__init__(message)
        self.ordinary = ordinary


class VectorIndex:
    """Vectors by row number, searched by inner product.

    Args:
        kind: "flat" compares with every vector and is exact; "hnsw" walks a neighbour graph, and only marks removed
            rows; "ivf" looks into the nearest of many lists, and is flat until there are enough rows to train them.
        dimension: Length of every vector.
        chunks: The initial content, as (rows ascending, vectors `[n, dimension]` float32) pairs.

    Raises:
        InputError: The kind is none of the three.
    """

    def __init__(self, kind: Kind, dimension: int, chunks: Iterable[tuple[Rows, Vectors]] = ()) -> None:
        if kind not in ("flat", "hnsw", "ivf"):
            raise InputError(f"unknown index kind {kind!r}; pass 'flat' (exact), 'hnsw' or 'ivf'")
        self.kind = kind
        self.dimension = dimension
        self._rows: Rows = np.zeros(0, dtype=np.int64)
        self._dead: Rows = np.zeros(0, dtype=np.int64)
        self._trained_on = 0
        if kind == "ivf":
            chunks = self._open_lists(list(chunks))
        else:
            self._index = _empty_index(kind, dimension)
        for rows, vectors in chunks:
            self.add(rows, vectors)

    @property
    def rows(self) -> Rows:
        """The rows that can be found, ascending."""
        return self._rows

    @property
    def worn(self) -> bool:
        """Whether building anew would pay: mostly removed rows, or four times or a quarter of the rows trained on."""
        rows = len(self._rows)
        if self.kind == "hnsw":
            return len(self._dead) > max(rows, 64)
        if self._trained_on:
            return not self._trained_on < 4 * rows < 16 * self._trained_on
        return self.kind == "ivf" and rows >= _IVF_MIN_ROWS

    def add(self, rows: Rows, vectors: Vectors) -> None:
        """Add vectors `[n, dimension]` float32 under new rows, each larger than any row ever added."""
        if len(rows):
            self._index.add_with_ids(np.ascontiguousarray(vectors), np.ascontiguousarray(rows))
            self._rows = np.concatenate([self._rows, rows])

    def remove(self, rows: Rows) -> None:
        """Make rows unfindable; rows that are not there are ignored."""
        rows = np.intersect1d(rows, self._rows)
        if not len(rows):
            return
        if self.kind == "hnsw":
            self._dead = np.union1d(self._dead, rows)
        else:
            faiss = _faiss()

            self._index.remove_ids(faiss.IDSelectorBatch(rows))
        self._rows = np.setdiff1d(self._rows, rows)

    def search(self, queries: Vectors, k: int, allowed: Rows | None = None) -> tuple[Vectors, Rows]:
        """The best `k` rows of each query, best first.

        Args:
            queries: `[n, dimension]` float32.
            k: How many; at most `len(self.rows)`.
            allowed: Only these rows; None allows all. Use it with "flat" only: the others would miss rows.

        Returns:
            Scores `[n, k]` float32 and rows `[n, k]` int64; row -1 where an approximate kind found fewer.
        """
        faiss = _faiss()

        selector = None
        if allowed is not None:
            selector = faiss.IDSelectorBatch(allowed)
        elif len(self._dead):
            selector = faiss.IDSelectorNot(faiss.IDSelectorBatch(self._dead))
        if self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=max(_HNSW_SEARCH_BREADTH, 2 * k))
        elif self._trained_on:
            parameters = faiss.SearchParametersIVF(sel=selector, nprobe=_lists_to_probe(self._index.nlist))
        else:
            parameters = faiss.SearchParameters(sel=selector)
        scores, rows = self._index.search(np.ascontiguousarray(queries), k, params=parameters)
        return scores, rows

    def save(self, path: Path, stamp: str) -> None:
        """Write everything to `path` with its checksum, atomically: a crash leaves the old file.

        Args:
            path: The file; its directory exists.
            stamp: The database state these vectors are; `load` hands only equal stamps back.

        Raises:
            OSError: The file cannot be written.
        """
        partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("xb") as file:
                self._write(file, stamp)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def _write(self, file: IO[bytes], stamp: str) -> None:
        faiss = _faiss()
        import xxhash

        digest = xxhash.xxh3_128()
        failure: list[OSError] = []

        def write(data: bytes) -> int:
            digest.update(data)
            try:
                return 0 if failure else file.write(data)
            except OSError as error:
                failure.append(error)
                return 0

        file.write(bytes(_HEADER_BYTES))
        faiss.write_index(self._index, faiss.PyCallbackIOWriter(write, _CHUNK_BYTES))
        # FAISS goes on after a failed write and reports nothing.
        if failure:
            raise failure[0]
        header = {
            "magic": _MAGIC,
            "kind": self.kind,
            "dimension": self.dimension,
            "rows": len(self._rows),
            "entries": self._index.ntotal,
            "trained_on": self._trained_on,
            "stamp": stamp,
            "bytes": file.tell() - _HEADER_BYTES,
            "checksum": digest.hexdigest(),
        }
        file.seek(0)
        file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))

    @classmethod
    def load(cls, path: Path, kind: Kind, dimension: int, *, stamp: str, rows: Rows) -> VectorIndex:
        """Read a saved file back.

        Args:
            path: The file.
            kind: The kind wanted.
            dimension: The dimension wanted.
            stamp: The database state wanted.
            rows: The rows of that state, ascending.

        Raises:
            VectorFileError: The file is missing, damaged, or holds something else than wanted; says which.
        """
        wanted = {"magic": _MAGIC, "kind": kind, "dimension": dimension, "stamp": stamp, "rows": len(rows)}
        try:
            with path.open("rb") as file:
                header = _read_header(file)
                for name, value in wanted.items():
                    if header.get(name) != value:
                        raise VectorFileError(
                            f"{name} is {header.get(name)!r}, not {value!r}", ordinary=name == "stamp"
                        )
                _check_payload(file, header)
                index = _read_index(file)
        except FileNotFoundError:
            raise VectorFileError("there is none", ordinary=True) from None
        except OSError as error:
            raise VectorFileError(f"it cannot be read: {error}") from error
        vectors = cls(kind, dimension)
        vectors._adopt(index, header, rows)
        return vectors

    def _adopt(self, index: Any, header: dict[str, Any], rows: Rows) -> None:
        """Take over a loaded FAISS index after checking that it is what the header says."""
        faiss = _faiss()

        entries, trained_on = header.get("entries"), header.get("trained_on")
        if index.d != self.dimension or index.ntotal != entries or index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise VectorFileError(
                f"it holds {index.ntotal} vectors of {index.d} instead of {entries} of {self.dimension}"
            )
        if isinstance(index, faiss.IndexIVFFlat) != bool(trained_on) or not isinstance(trained_on, int):
            raise VectorFileError(f"it is a {type(index).__name__}")
        self._index, self._trained_on, self._rows = index, trained_on, rows
        if not trained_on:
            stored = faiss.vector_to_array(index.id_map)
            self._dead = np.setdiff1d(stored, rows)
            if len(self._dead) + len(rows) != len(stored) or (self.kind != "hnsw" and len(self._dead)):
                raise VectorFileError("its rows are not those of the database")

    def _open_lists(self, chunks: list[tuple[Rows, Vectors]]) -> list[tuple[Rows, Vectors]]:
        """Train inverted lists on `chunks` (kept in memory meanwhile), or stay flat while they are too few."""
        faiss = _faiss()

        count = sum(len(rows) for rows, _ in chunks)
        if count < _IVF_MIN_ROWS:
            self._index = _empty_index("flat", self.dimension)
            return chunks
        lists = min(4 * math.isqrt(count), count // _POINTS_PER_LIST)
        quantizer = faiss.IndexFlatIP(self.dimension)
        self._index = faiss.IndexIVFFlat(quantizer, self.dimension, lists, faiss.METRIC_INNER_PRODUCT)
        self._index.train(np.concatenate([vectors for _, vectors in chunks]))
        self._trained_on = count
        return chunks


def _faiss() -> Any:
    """FAISS, imported when it is first needed; untyped, since its stubs leave out half of what it has."""
    return import_module("faiss")


def _empty_index(kind: Kind, dimension: int) -> Any:
    faiss = _faiss()

    if kind == "flat":
        return faiss.IndexIDMap2(faiss.IndexFlatIP(dimension))
    graph = faiss.IndexHNSWFlat(dimension, _HNSW_LINKS, faiss.METRIC_INNER_PRODUCT)
    graph.hnsw.efConstruction = _HNSW_BUILD_BREADTH
    return faiss.IndexIDMap2(graph)


def _lists_to_probe(lists: int) -> int:
    """An eighth of the lists, at least 16: sparse, high-dimensional text vectors cluster badly."""
    return max(16, lists // 8)


def _read_header(file: IO[bytes]) -> dict[str, Any]:
    try:
        header = json.loads(file.read(_HEADER_BYTES))
    except (ValueError, RecursionError) as error:
        raise VectorFileError("its header is damaged") from error
    if not isinstance(header, dict):
        raise VectorFileError("its header is damaged")
    return header


def _check_payload(file: IO[bytes], header: dict[str, Any]) -> None:
    """Length and checksum of everything after the header, before FAISS reads a byte of it."""
    import xxhash

    digest = xxhash.xxh3_128()
    for chunk in _chunks(file):
        digest.update(chunk)
    length = file.tell() - _HEADER_BYTES
    if length != header.get("bytes"):
        raise VectorFileError(f"it is {length} bytes long instead of {header.get('bytes')}")
    if digest.hexdigest() != header.get("checksum"):
        raise VectorFileError("its checksum does not match")


def _chunks(file: IO[bytes]) -> Iterator[bytes]:
    while chunk := file.read(_CHUNK_BYTES):
        yield chunk


def _read_index(file: IO[bytes]) -> Any:
    faiss = _faiss()

    file.seek(_HEADER_BYTES)
    try:
        return faiss.read_index(faiss.PyCallbackIOReader(file.read, _CHUNK_BYTES))
    except (RuntimeError, MemoryError) as error:
        raise VectorFileError(f"FAISS cannot read it: {error}") from error
