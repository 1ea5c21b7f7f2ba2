"""The searchable vectors: FAISS and what is kept of it; the only room that knows FAISS.

Everything here is derived from the database and may be thrown away: the file carries its own checksum, counts and the
stamp of the database state it was made from, and whatever does not fit is refused so that the caller rebuilds. FAISS
reads no file: half of all randomly damaged FAISS files load and search without an error, and others write where they
should not. What it holds is kept as plain arrays, and put together again once every number that it will use as an
address is known to be one.

Nothing here knows passages or SQLite: rows are 64-bit numbers that are never used twice. Callers exclude `add` and
`remove` from `search` (FAISS crashes otherwise).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from blockrag.errors import InputError
from blockrag.index.vector_file import VectorFile, VectorFileError, open_vector_file, write_vector_file

if TYPE_CHECKING:
    from blockrag.encoders.protocol import Vectors

__all__ = ["Kind", "Rows", "VectorFileError", "VectorIndex"]

Kind = Literal["flat", "hnsw", "ivf"]
Rows = NDArray[np.int64]
"""A `[n]` int64 array of passage rows."""

# Below this FAISS has too few points to train inverted lists (it asks for 39 a list), and a flat scan is instant.
_IVF_MIN_ROWS = 1024
_POINTS_PER_LIST = 39
_HNSW_LINKS = 32
_HNSW_BUILD_BREADTH = 128
_HNSW_SEARCH_BREADTH = 128


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
        header = {
            "kind": self.kind,
            "dimension": self.dimension,
            "rows": len(self._rows),
            "stamp": stamp,
            "entries": self._index.ntotal,
            "trained_on": self._trained_on,
            "lists": self._index.nlist if self._trained_on else 0,
            "entry_point": self._graph.entry_point if self.kind == "hnsw" else -1,
        }
        write_vector_file(path, header, self._lists() if self._trained_on else self._numbered())

    @property
    def _graph(self) -> Any:
        return _faiss().downcast_index(self._index.index).hnsw

    def vectors(self) -> Iterator[tuple[Rows, Vectors]]:
        """What it holds, in no particular order, as (rows, vectors `[n, dimension]` float32) pairs that must be copied.

        Rows that were removed and only marked are among them.
        """
        if self._trained_on:
            for number in range(self._index.nlist):
                yield self._list(number)
        elif self._index.ntotal:
            rows, *_, vectors = self._numbered()
            yield rows, vectors

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
        wanted = {"kind": kind, "dimension": dimension, "stamp": stamp, "rows": len(rows)}
        loaded = cls(kind, dimension)
        with open_vector_file(path, wanted) as file:
            loaded._trained_on = file.count("trained_on")
            if loaded._trained_on and kind != "ivf":
                raise VectorFileError(f"it has inverted lists, which {kind!r} has not")
            stored = loaded._read_lists(file) if loaded._trained_on else loaded._read_numbered(file)
            loaded._rows, loaded._dead = rows, np.setdiff1d(stored, rows)
            if len(loaded._dead) + len(rows) != len(stored) or (kind != "hnsw" and len(loaded._dead)):
                raise VectorFileError("its rows are not those of the database")
            file.check()
        return loaded

    # Flat and graph: rows in the order of addition, and for a graph the levels and neighbours of each; then vectors.

    def _numbered(self) -> Iterator[NDArray[Any]]:
        faiss = _faiss()
        entries = self._index.ntotal
        yield faiss.vector_to_array(self._index.id_map).astype("<i8", copy=False)
        storage = faiss.downcast_index(self._index.index)
        if self.kind == "hnsw":
            yield faiss.vector_to_array(storage.hnsw.levels).astype("<i4", copy=False)
            yield _floats_or_ints(storage.hnsw.neighbors.data(), storage.hnsw.neighbors.size(), "<i4")
            storage = faiss.downcast_index(storage.storage)
        yield _floats_or_ints(storage.get_xb(), entries * self.dimension, "<f4").reshape(entries, self.dimension)

    def _read_numbered(self, file: VectorFile) -> Rows:
        faiss = _faiss()
        entries = file.count("entries")
        rows: Rows = file.array("<i8", entries)
        if not (rows[1:] > rows[:-1]).all():
            raise VectorFileError("its rows are not in order")
        if self.kind != "hnsw":
            for start, vectors in file.matrix_chunks(entries, self.dimension):
                self._index.add_with_ids(vectors, rows[start : start + len(vectors)])
            return rows
        index = faiss.downcast_index(self._index.index)
        _read_graph(file, index.hnsw, entries)
        storage = faiss.downcast_index(index.storage)
        for _, vectors in file.matrix_chunks(entries, self.dimension):
            storage.add(vectors)
        index.ntotal = self._index.ntotal = entries
        faiss.copy_array_to_vector(rows, self._index.id_map)
        self._index.construct_rev_map()
        return rows

    # Inverted lists: rows list by list, the length of each list, centroids; then vectors, in the order of the rows.

    def _list(self, number: int) -> tuple[Rows, Vectors]:
        """One inverted list, over FAISS's own memory."""
        lists = self._index.invlists
        size = lists.list_size(number)
        if not size:
            return np.zeros(0, dtype="<i8"), np.zeros((0, self.dimension), dtype="<f4")
        faiss = _faiss()
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * self.dimension * 4)
        rows = faiss.rev_swig_ptr(lists.get_ids(number), size)
        return rows.astype("<i8", copy=False), codes.view("<f4").reshape(size, self.dimension)

    def _lists(self) -> Iterator[NDArray[Any]]:
        count = self._index.nlist
        yield np.array([self._index.invlists.list_size(number) for number in range(count)], dtype="<i8")
        centroids = _faiss().downcast_index(self._index.quantizer).get_xb()
        yield _floats_or_ints(centroids, count * self.dimension, "<f4")
        for number in range(count):
            yield self._list(number)[0]
        for number in range(count):
            yield self._list(number)[1]

    def _read_lists(self, file: VectorFile) -> Rows:
        faiss = _faiss()
        entries, count = file.count("entries"), file.count("lists")
        sizes = file.array("<i8", count)
        # Neither may be negative or wrap around when they are added up.
        if not count or ((sizes < 0) | (sizes > entries)).any() or sum(sizes.tolist()) != entries:
            raise VectorFileError(f"its {count} lists do not hold {entries} vectors")
        centroids = file.array("<f4", count, self.dimension)
        rows: Rows = file.array("<i8", entries)
        self._index = _empty_lists(self.dimension, count)
        faiss.downcast_index(self._index.quantizer).add(centroids)
        self._index.is_trained = True
        numbers = np.repeat(np.arange(count, dtype=np.int64), sizes)
        for start, vectors in file.matrix_chunks(entries, self.dimension):
            some = slice(start, start + len(vectors))
            pointers = map(faiss.swig_ptr, (vectors, rows[some], numbers[some]))
            self._index.add_core(len(vectors), *pointers)
        ascending = np.sort(rows)
        if not (ascending[1:] > ascending[:-1]).all():
            raise VectorFileError("it holds a row twice")
        return ascending

    def _open_lists(self, chunks: list[tuple[Rows, Vectors]]) -> list[tuple[Rows, Vectors]]:
        """Train inverted lists on `chunks` (kept in memory meanwhile), or stay flat while they are too few."""
        count = sum(len(rows) for rows, _ in chunks)
        if count < _IVF_MIN_ROWS:
            self._index = _empty_index("flat", self.dimension)
            return chunks
        lists = min(4 * math.isqrt(count), count // _POINTS_PER_LIST)
        self._index = _empty_lists(self.dimension, lists)
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


def _empty_lists(dimension: int, lists: int) -> Any:
    faiss = _faiss()

    return faiss.IndexIVFFlat(faiss.IndexFlatIP(dimension), dimension, lists, faiss.METRIC_INNER_PRODUCT)


def _lists_to_probe(lists: int) -> int:
    """An eighth of the lists, at least 16: sparse, high-dimensional text vectors cluster badly."""
    return max(16, lists // 8)


def _floats_or_ints(pointer: Any, count: int, dtype: str) -> NDArray[Any]:
    """An array over FAISS's memory; nothing, which has no address, is an empty one."""
    if not count:
        return np.zeros(0, dtype=dtype)
    array: NDArray[Any] = _faiss().rev_swig_ptr(pointer, count)
    return array.astype(dtype, copy=False)


def _read_graph(file: VectorFile, graph: Any, entries: int) -> None:
    """Fill an empty neighbour graph, once all its numbers are addresses within it.

    A node of level n has slots for neighbours on the layers below n, one after another; a search on a layer goes on
    from a neighbour to the slots which that has on the same layer.
    """
    faiss = _faiss()
    # Where the slots of each layer begin within a node's, and behind the last layer where they end.
    begins = faiss.vector_to_array(graph.cum_nneighbor_per_level).astype(np.int64)
    levels = file.array("<i4", entries)
    if entries and (levels.min() < 1 or levels.max() >= len(begins)):
        raise VectorFileError(f"its graph has levels from {levels.min()} to {levels.max()}")
    begin = file.header.get("entry_point")
    top = int(levels.max(initial=0))
    if entries and (type(begin) is not int or not 0 <= begin < entries or levels[begin] != top):
        raise VectorFileError(f"its graph begins at {begin!r:.40}, where it has not all {top} layers")
    ends = np.cumsum(begins[levels])
    neighbours = file.array("<i4", int(ends[-1]) if entries else 0)
    if len(neighbours) and (neighbours.min() < -1 or neighbours.max() >= entries):
        raise VectorFileError(f"its graph has {entries} nodes and neighbours beyond them")
    for layer in range(1, top):
        nodes = np.flatnonzero(levels > layer)
        slots = (ends - begins[levels])[nodes, None] + np.arange(begins[layer], begins[layer + 1])
        linked = neighbours[slots]
        if (levels[linked[linked >= 0]] <= layer).any():
            raise VectorFileError("its graph leads to a layer that a node has not")
    if not entries:
        return
    faiss.copy_array_to_vector(levels, graph.levels)
    graph.prepare_level_tab(entries, True)
    faiss.rev_swig_ptr(graph.neighbors.data(), len(neighbours))[:] = neighbours
    graph.max_level, graph.entry_point = top - 1, begin
