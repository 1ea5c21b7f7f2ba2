"""`PassageStore`: passages whose vectors somebody else makes, together with the KV states of their blocks.

What the vector stores of all frameworks share. It joins a `PassageIndex` of given vectors with a model's block store:
which blocks a passage has is recorded with it, and what is deleted takes along the blocks that no other passage has.
The index opens at the first vector, whose length is its dimension.

Nothing here knows a framework, how text is embedded, or what a prompt looks like.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from numpy.typing import ArrayLike

from blockrag.encoders.given import GivenVectors, as_vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.index import Change, DocumentInfo, PassageIndex
from blockrag.ingest.prebuild import encode_blocks, prebuild_blocks
from blockrag.passage import Hit, Passage

if TYPE_CHECKING:
    from blockrag.encoders.protocol import Vectors
    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block

__all__ = ["PassageStore", "PassageStoreStats"]

_log = logging.getLogger(__name__)

# Hits that a predicate may drop are fetched in growing numbers; beyond this many all passages are asked first.
_MOST_FETCHED = 4096


@dataclass(frozen=True, slots=True)
class PassageStoreStats:
    """Sizes of a store.

    Args:
        passages: Passages in it.
        documents: Documents they belong to.
        dimension: Length of their vectors; None before the first.
        without_kv: Passages added since it was opened whose KV states could not be computed or stored.
    """

    passages: int
    documents: int
    dimension: int | None
    without_kv: int


@dataclass(slots=True, eq=False)
class _Replacing:
    """A replacement in progress: the documents it marked."""

    store: PassageStore
    marked: set[str] = field(default_factory=set)


# Those of the current thread or task: a delete elsewhere means what it says.
_IN_PROGRESS: ContextVar[tuple[_Replacing, ...]] = ContextVar("blockrag_replacing", default=())


class PassageStore:
    """Passages with given vectors; the KV states of their blocks live and die with them.

    Safe to use from several threads, and from several processes on one directory.

    Args:
        path: The index's directory, made at the first add; None keeps everything in memory.
        name: Names what makes the vectors; a directory opens only under the name it was built with.
        kind: See `PassageIndex`.
        model: Whose KV states are tracked, in its own block store. None tracks none.
        blocks_of: The block of each passage, one each and in order; by default the model's template's.
        prebuild: Whether `add` also computes and stores the blocks, rather than leaving it to the first question.

    Raises:
        InputError: `prebuild` or `blocks_of` is given without a model.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        name: str = "given",
        kind: Literal["flat", "hnsw", "ivf"] = "flat",
        model: BlockModel | None = None,
        blocks_of: Callable[[Sequence[Passage]], list[Block]] | None = None,
        prebuild: bool = False,
    ) -> None:
        if model is None and (prebuild or blocks_of is not None):
            raise InputError("prebuild and blocks_of need a model; pass PassageStore(model=...) as well")
        self._path = Path(path) if path is not None else None
        self._name = name
        self._kind = kind
        self._model = model
        self._blocks_of = blocks_of
        self._prebuild = prebuild
        self._index: PassageIndex | None = None
        self._closed = False
        self._without_kv = 0
        self._opening = threading.Lock()
        # One write at a time: what one deletes must not be what the other is computing.
        self._writing = threading.RLock()

    # -- writing ------------------------------------------------------------------------------------------------------

    def add(self, passages: Sequence[Passage], vectors: ArrayLike) -> Change:
        """Add passages, in one transaction; one whose id is there already is replaced.

        A document marked by `replacing` has only these passages afterwards. A passage whose KV states cannot be
        computed or stored is kept without them, counted in `stats` and logged: its first question computes them.

        Args:
            passages: The passages, of any documents.
            vectors: `[len(passages), dimension]`, finite; kept as float32.

        Raises:
            InputError: The vectors have another shape, are no numbers or not finite, a passage id occurs twice, or
                metadata is not JSON-serialisable. Nothing is changed.
            PassageIndexError: The index is damaged, locked, closed, deleted, or of another name. Nothing is changed.
        """
        matrix = as_vectors(vectors)
        if not passages and not matrix.size:
            return Change()
        if matrix.ndim != 2 or not matrix.shape[1]:
            raise InputError(
                f"vectors have shape {matrix.shape} for {len(passages)} passages; pass one vector for each"
            )
        index = self._opened(matrix.shape[1])
        with self._writing:
            blocks = self._blocks(passages)
            change = index.add(passages, vectors=matrix, block_keys=self._keys(blocks), fingerprint=self._fingerprint)
            self._settle(change)
            if self._prebuild:
                self._compute(blocks)
        return change

    def delete(self, passage_ids: Collection[str]) -> Change:
        """Delete passages, and the documents whose last passage goes; unknown ids are ignored."""
        return self._removing(lambda index: index.delete_passages(passage_ids))

    def delete_document(self, document_id: str) -> Change:
        """Delete a document; within `replacing` it answers until its next version is added.

        An unknown document is no error and changes nothing.
        """
        replacing = next((one for one in reversed(_IN_PROGRESS.get()) if one.store is self), None)
        if replacing is None:
            return self._removing(lambda index: index.delete_document(document_id))
        index = self._existing()
        if index is not None and index.mark_superseded(document_id):
            replacing.marked.add(document_id)
        return Change()

    def clear(self) -> Change:
        """Delete everything."""
        return self._removing(PassageIndex.clear)

    @contextmanager
    def replacing(self, *, sweep: bool = False) -> Iterator[None]:
        """Within this context `delete_document` announces a new version: the old one answers until that is added.

        Documents that were announced and not added are deleted when the block ends well. When it ends by an
        exception, or with the process, they stay and answer, marked durably: whenever a new version is added, it
        takes the place of the old.

        Holds for the thread or task that enters it (and what it awaits); elsewhere `delete_document` deletes at once.

        Args:
            sweep: At a good end also delete what earlier replacements that did not end well left marked: for callers
                that name everything they want to keep. Not while another replacement runs.
        """
        mine = _Replacing(self)
        _IN_PROGRESS.set((*_IN_PROGRESS.get(), mine))
        try:
            yield
        finally:
            # Not by a token: an asynchronous caller may end in another context than it began in.
            _IN_PROGRESS.set(tuple(one for one in _IN_PROGRESS.get() if one is not mine))
        if sweep or mine.marked:
            self._removing(lambda index: index.drop_superseded(None if sweep else mine.marked))

    # -- looking up ---------------------------------------------------------------------------------------------------

    def search(
        self,
        query: ArrayLike,
        k: int,
        *,
        keep: Callable[[Passage], bool] | None = None,
        where: Mapping[str, object] | None = None,
        passage_ids: Collection[str] | None = None,
    ) -> list[Hit]:
        """The `k` passages of greatest inner product with a query vector, best first.

        Args:
            query: `[dimension]`.
            k: How many; fewer are returned when there are fewer.
            keep: Whether a passage may be found. Asked for as many as it takes; `where` is faster where it will do.
            where: Metadata that hits must have, by equality; see `PassageIndex.search`.
            passage_ids: Only these passages.

        Raises:
            InputError: `k` is less than 1, or the vector has another length or is not finite.
            PassageIndexError: The index is damaged, locked or closed.
        """
        index = self._existing()
        if index is None:
            return []
        queries = as_vectors(query, what="the query vector's values")[None]
        if keep is None:
            return _first(index.search_vectors(queries, k, where=where, passage_ids=passage_ids))
        narrowed = bool(where) or passage_ids is not None
        fetch = 4 * k
        while fetch <= max(_MOST_FETCHED, 4 * k):
            hits = _first(index.search_vectors(queries, fetch, where=where, passage_ids=passage_ids))
            kept = [hit for hit in hits if keep(hit.passage)]
            # Approximate kinds may have more than they found, unless they were narrowed down.
            if len(kept) >= k or (len(hits) < fetch and (narrowed or self._kind == "flat")):
                return kept[:k]
            fetch *= 4
        among = None if passage_ids is None else set(passage_ids)
        allowed = [p.id for p in index.passages() if (among is None or p.id in among) and keep(p)]
        return _first(index.search_vectors(queries, k, where=where, passage_ids=allowed))

    def get(self, passage_ids: Sequence[str]) -> list[Passage]:
        """Those of these passages that are there, in the order asked for."""
        index = self._existing()
        found = [] if index is None else [index.get(passage_id) for passage_id in passage_ids]
        return [passage for passage in found if passage is not None]

    def passages(self, document_id: str | None = None) -> Iterator[Passage]:
        """A document's passages in the order they were added, or all."""
        index = self._existing()
        return iter(()) if index is None else index.passages(document_id)

    @property
    def documents(self) -> list[DocumentInfo]:
        """All documents, by id."""
        index = self._existing()
        return [] if index is None else index.documents()

    def vectors_of(self, passage_ids: Collection[str]) -> dict[str, Vectors]:
        """The vector `[dimension]` float32 of each of these passages that is there."""
        index = self._existing()
        return {} if index is None else index.vectors_of(passage_ids)

    def stats(self) -> PassageStoreStats:
        """Sizes of the store."""
        index = self._existing()
        if index is None:
            return PassageStoreStats(0, 0, None, self._without_kv)
        stats = index.stats()
        return PassageStoreStats(stats.passages, stats.documents, stats.dimension, self._without_kv)

    def __len__(self) -> int:
        index = self._existing()
        return 0 if index is None else len(index)

    # -- opening and closing ------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write the vector file, so that the next opening need not rebuild it; passages are durable without it.

        Raises:
            PassageIndexError: The store is in memory only, or the file cannot be written.
        """
        if self._path is None:
            raise PassageIndexError("this store is in memory only; call copy_to(path), or open PassageStore(path)")
        index = self._existing()
        if index is not None:
            index.save()

    def copy_to(self, path: str | Path) -> None:
        """Make `path` a copy of this store's passages and vectors; what it held is replaced.

        Raises:
            PassageIndexError: `path` is this store's own directory, is in use, or cannot be written.
        """
        index = self._existing()
        if index is not None:
            index.copy_to(path)
            return
        with PassageStore(path, name=self._name, kind=self._kind) as other:
            other.clear()

    def close(self) -> None:
        """Save and close; closing again does nothing. The model and its block store stay open."""
        with self._opening:
            self._closed = True
            if self._index is not None:
                self._index.close()

    def __enter__(self) -> PassageStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _existing(self) -> PassageIndex | None:
        """The index, or None when nobody has added anything yet."""
        with self._opening:
            self._refuse_closed()
            if self._index is None and self._path is not None:
                origin = PassageIndex.peek(self._path)
                if origin is not None:
                    self._index = self._open(origin.dimension)
            return self._index

    def _opened(self, dimension: int) -> PassageIndex:
        """The index; a new one has this dimension."""
        index = self._existing()
        with self._opening:
            self._refuse_closed()
            if self._index is None:
                self._index = index or self._open(dimension)
            return self._index

    def _open(self, dimension: int) -> PassageIndex:
        return PassageIndex(GivenVectors(self._name, dimension), self._path, kind=self._kind)

    def _refuse_closed(self) -> None:
        if self._closed:
            raise PassageIndexError("this passage store is closed; open another")

    # -- blocks -------------------------------------------------------------------------------------------------------

    @property
    def _fingerprint(self) -> str:
        return "" if self._model is None or self._model.profile is None else self._model.fingerprint.digest

    def _blocks(self, passages: Sequence[Passage]) -> dict[str, Block]:
        """The block of each passage that has one, by passage id."""
        model = self._model
        if model is None or model.profile is None or not passages:
            return {}
        default = partial(model.template.passage_blocks, model.tokenizer)
        blocks, failures = encode_blocks(passages, self._blocks_of or default)
        self._count_failures({passages[place].id: error for place, error in failures.items()}, of=len(passages))
        return {passages[place].id: block for place, block in blocks.items()}

    def _keys(self, blocks: Mapping[str, Block]) -> dict[str, list[str]]:
        if self._model is None:
            return {}
        return {passage_id: [self._model.block_key(block.token_ids)] for passage_id, block in blocks.items()}

    def _compute(self, blocks: Mapping[str, Block]) -> None:
        """Store the blocks' KV states; a block that fails keeps its key, which a question may fill later."""
        if self._model is None or not blocks:
            return
        ids = list(blocks)
        failures = prebuild_blocks(self._model, list(blocks.values())).failures
        self._count_failures({ids[place]: error for place, error in failures.items()}, of=len(ids))

    def _count_failures(self, failures: Mapping[str, Exception], *, of: int) -> None:
        self._without_kv += len(failures)
        for passage_id, error in list(failures.items())[:1]:
            _log.warning(
                "%d of %d passages are stored without KV states; the first is %r: %s",
                len(failures),
                of,
                passage_id,
                error,
            )

    def _removing(self, remove: Callable[[PassageIndex], Change]) -> Change:
        with self._writing:
            index = self._existing()
            change = Change() if index is None else remove(index)
            self._settle(change)
        return change

    def _settle(self, change: Change) -> None:
        """What was removed must not stay in the block store, nor in memory."""
        if self._model is None:
            return
        if change.orphaned_block_keys:
            self._model.store.delete_many(change.orphaned_block_keys)
        if change.removed:
            self._model.forget_kept()


def _first(hits: Sequence[list[Hit]]) -> list[Hit]:
    """The hits of the only query; none for a vector without length."""
    return hits[0] if hits else []
