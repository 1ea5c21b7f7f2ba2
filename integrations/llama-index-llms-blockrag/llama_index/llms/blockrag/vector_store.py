"""`BlockRAGVectorStore`: LlamaIndex's vector store over `PassageStore`, on whose deletes KV states go too.

The vector store is the only part of LlamaIndex that every delete, upsert and refresh reaches; that is why the life of
KV states hangs here. Fields are plain values, so that the store can be copied, pickled and rebuilt elsewhere; index and
model open when they are first needed.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.indices.query.embedding_utils import get_top_k_mmr_embeddings
from llama_index.core.schema import BaseNode
from llama_index.core.vector_stores.types import (
    DEFAULT_PERSIST_DIR,
    DEFAULT_PERSIST_FNAME,
    BasePydanticVectorStore,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
    VectorStoreQueryResult,
)
from llama_index.llms.blockrag import ingestion
from llama_index.llms.blockrag.filters import equalities, predicate
from llama_index.llms.blockrag.model_fields import ModelFields
from llama_index.llms.blockrag.nodes import facts_of, node_blocks, node_of, passage_of

from blockrag.errors import InputError, PassageIndexError
from blockrag.ingest import PassageStore
from blockrag.passage import Hit, Passage

if TYPE_CHECKING:
    import fsspec  # type: ignore[import-untyped]

    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block

__all__ = ["BlockRAGVectorStore"]

_DEFAULT_NAMESPACE = "default"
# Candidates of maximal marginal relevance, per node wanted.
_MMR_PREFETCH = 4.0


class BlockRAGVectorStore(ModelFields, BasePydanticVectorStore):
    """A vector store that keeps nodes, their vectors, and the KV states of their blocks in step.

    Similarity is the inner product of the vectors as they are given: normalise them for the cosine. Nodes come back
    equal to those added, without their embedding; nothing is written into their metadata.

    Args:
        persist_path: The index's directory, made at the first add; None keeps it in memory.
        model_name: The language model whose KV states live and die with the nodes; None tracks none. It and the other
            fields of the model must be those of the `BlockRAGLLM` that answers.
        prebuild: Whether adding nodes also computes their KV states, rather than leaving it to the first question (or
            to a `BlockKVTransform`). A node whose KV states cannot be computed is added all the same, and logged.
        kind: "flat" is exact; "hnsw" and "ivf" are approximate, and faster on millions of nodes.
        embedding_name: Names the embedding model; an existing directory opens only under the name it was made with.
    """

    stores_text: bool = True
    flat_metadata: bool = False
    persist_path: str | None = Field(default=None, description="Directory of the index; None keeps it in memory.")
    prebuild: bool = Field(default=False, description="Whether adding nodes also computes their KV states.")
    kind: Literal["flat", "hnsw", "ivf"] = Field(default="flat", description="How vectors are searched.")
    embedding_name: str = Field(default="given", description="Names the embedding model.")

    _passages: PassageStore | None = PrivateAttr(default=None)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        if self.prebuild and self.model_name is None:
            raise InputError("prebuild=True needs a model; pass model_name as well")
        ingestion.install()

    @classmethod
    def class_name(cls) -> str:
        """The name this class is serialized under."""
        return "BlockRAGVectorStore"

    @property
    def client(self) -> PassageStore:
        """The passages; opened when first asked for."""
        with self._lock:
            if self._passages is None:
                model = None if self.model_name is None else self.shared_model()
                self._passages = PassageStore(
                    self.persist_path,
                    name=self.embedding_name,
                    kind=self.kind,
                    model=model,
                    blocks_of=None if model is None else partial(self._blocks, model),
                    prebuild=self.prebuild,
                )
            return self._passages

    def _blocks(self, model: BlockModel, passages: Sequence[Passage]) -> list[Block]:
        return node_blocks(model, [node_of(passage) for passage in passages], self.prompt_form)

    # -- writing ------------------------------------------------------------------------------------------------------

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Add nodes with their embeddings, in one transaction; a node whose id is there already is replaced.

        Returns:
            The nodes' ids.

        Raises:
            ValueError: A node has no embedding, or one of another length than the index's, or metadata without a JSON
                form.
        """
        # A node that occurs twice counts once, as it would in a dictionary.
        distinct = {node.node_id: node for node in nodes}.values()
        self.client.add([passage_of(node) for node in distinct], [node.get_embedding() for node in distinct])
        return [node.node_id for node in nodes]

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """`add`, on another thread."""
        return await asyncio.to_thread(self.add, nodes)

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Delete the nodes of a document, and the KV states that only they had; an unknown one changes nothing.

        Within `replacing`, and in an `IngestionPipeline`, they answer until the new version is added.
        """
        self.client.delete_document(ref_doc_id)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """`delete`, on another thread."""
        await asyncio.to_thread(self.delete, ref_doc_id)

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Delete nodes by their ids, by their metadata, or by both.

        Raises:
            ValueError: Neither is given.
        """
        if node_ids is None and filters is None:
            raise InputError("pass node_ids, filters or both; clear() deletes every node")
        ids = node_ids if filters is None else [node.node_id for node in self.get_nodes(node_ids, filters)]
        self.client.delete(ids or [])

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """`delete_nodes`, on another thread."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    def clear(self) -> None:
        """Delete every node."""
        self.client.clear()

    async def aclear(self) -> None:
        """`clear`, on another thread."""
        await asyncio.to_thread(self.clear)

    @contextmanager
    def replacing(self, *, sweep: bool = False) -> Iterator[None]:
        """Within this context a deleted document answers until its new version is added.

        For `update_ref_doc` and `refresh_ref_docs`, which delete before they embed; an `IngestionPipeline` does it by
        itself. See `PassageStore.replacing`.
        """
        with self.client.replacing(sweep=sweep):
            yield

    # -- looking up ---------------------------------------------------------------------------------------------------

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes of these ids (by default all) whose metadata passes the filters."""
        passages = self.client.passages() if node_ids is None else self.client.get(node_ids)
        nodes = map(node_of, passages)
        if filters is None:
            return list(nodes)
        passes = predicate(filters)
        return [node for node in nodes if passes(node.metadata)]

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """`get_nodes`, on another thread."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The nodes nearest to a query embedding.

        Args:
            query: Modes DEFAULT and MMR; `filters`, `doc_ids` and `node_ids` restrict what may be found, unless empty.
            **kwargs: For MMR `mmr_threshold`, and `mmr_prefetch_factor` candidates (4) per node wanted.

        Raises:
            ValueError: The query has another mode, or no embedding, or one of another length than the index's.
        """
        if query.query_embedding is None:
            raise InputError("the query has no embedding; this store searches by vectors only")
        mode = VectorStoreQueryMode(query.mode)
        if mode is VectorStoreQueryMode.DEFAULT:
            hits = self._search(query, query.similarity_top_k)
        elif mode is VectorStoreQueryMode.MMR:
            hits = self._marginally_relevant(query, **kwargs)
        else:
            raise InputError(f"query mode {mode.value!r} is not supported; use 'default' or 'mmr'")
        return VectorStoreQueryResult(
            nodes=[node_of(hit.passage) for hit in hits],
            similarities=[hit.score for hit in hits],
            ids=[hit.passage.id for hit in hits],
        )

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """`query`, on another thread."""
        return await asyncio.to_thread(partial(self.query, query, **kwargs))

    def _search(self, query: VectorStoreQuery, k: int) -> list[Hit]:
        # Empty means any: that is what the retriever of an index whose store keeps the text asks with.
        ids = set(query.node_ids) if query.node_ids else None
        if query.doc_ids:
            among = {passage.id for document in query.doc_ids for passage in self.client.passages(document)}
            ids = among if ids is None else ids & among
        keep: Callable[[Passage], bool] | None = None
        where: dict[str, str] = {}
        if query.filters is not None:
            passes = predicate(query.filters)
            where = facts_of(equalities(query.filters))

            def keep(passage: Passage) -> bool:
                return passes(node_of(passage).metadata)

        return self.client.search(query.query_embedding or [], k, keep=keep, where=where, passage_ids=ids)

    def _marginally_relevant(
        self,
        query: VectorStoreQuery,
        *,
        mmr_threshold: float | None = None,
        mmr_prefetch_factor: float = _MMR_PREFETCH,
        **kwargs: Any,
    ) -> list[Hit]:
        k = query.similarity_top_k
        hits = {hit.passage.id: hit for hit in self._search(query, max(k, int(k * mmr_prefetch_factor)))}
        vectors = self.client.vectors_of(hits)
        ids = [passage_id for passage_id in hits if passage_id in vectors]
        if not ids:
            return []
        scores, chosen = get_top_k_mmr_embeddings(
            query.query_embedding or [],
            [vectors[passage_id].tolist() for passage_id in ids],
            similarity_fn=lambda one, other: float(np.dot(one, other)),
            similarity_top_k=k,
            embedding_ids=ids,
            mmr_threshold=query.mmr_threshold if mmr_threshold is None else mmr_threshold,
        )
        return [Hit(hits[passage_id].passage, score) for score, passage_id in zip(scores, chosen, strict=True)]

    # -- keeping ------------------------------------------------------------------------------------------------------

    def persist(self, persist_path: str, fs: fsspec.AbstractFileSystem | None = None) -> None:
        """Write everything to a directory, from which `from_persist_path` opens it; what it held is replaced.

        Args:
            persist_path: The directory. LlamaIndex passes a name ending in ".json"; the directory's ends in
                ".blockrag" instead, since it is no JSON file.
            fs: None, or the local file system.

        Raises:
            ValueError: The file system is not local.
            PassageIndexError: The directory cannot be written.
        """
        target = _directory(persist_path, fs)
        if self.persist_path is not None and Path(self.persist_path).resolve() == target.resolve():
            self.client.save()
            return
        try:
            target.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PassageIndexError(f"{str(target)!r} is no directory to persist to ({error}); pass another") from error
        self.client.copy_to(target)

    @classmethod
    def from_persist_path(
        cls, persist_path: str, fs: fsspec.AbstractFileSystem | None = None, **fields: Any
    ) -> BlockRAGVectorStore:
        """Open what `persist` wrote; from then on every change is written there.

        Args:
            persist_path: As given to `persist`.
            fs: None, or the local file system.
            **fields: The other fields.

        Raises:
            ValueError: There is no such directory, or the file system is not local.
        """
        directory = _directory(persist_path, fs)
        if not directory.is_dir():
            raise InputError(f"there is no vector store at {str(directory)!r}; persist one there first")
        return cls(persist_path=str(directory), **fields)

    @classmethod
    def from_persist_dir(
        cls,
        persist_dir: str = DEFAULT_PERSIST_DIR,
        namespace: str = _DEFAULT_NAMESPACE,
        fs: fsspec.AbstractFileSystem | None = None,
        *,
        block_namespace: str = "",
        **fields: Any,
    ) -> BlockRAGVectorStore:
        """Open what `StorageContext.persist(persist_dir)` wrote.

        Args:
            persist_dir: As given to `persist`.
            namespace: The name the store has in the storage context.
            fs: None, or the local file system.
            block_namespace: The field `namespace`.
            **fields: The other fields.

        Raises:
            ValueError: There is no such store, or the file system is not local.
        """
        path = Path(persist_dir) / f"{namespace}__{DEFAULT_PERSIST_FNAME}"
        return cls.from_persist_path(str(path), fs, namespace=block_namespace, **fields)

    def close(self) -> None:
        """Save and close the index; it opens again when it is next used, unless it is in memory."""
        with self._lock:
            if self._passages is not None:
                self._passages.close()
                if self.persist_path is not None:
                    self._passages = None

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            passages = self._passages
        if self.persist_path is None and passages is not None and len(passages):
            raise InputError(
                f"a vector store in memory cannot be pickled with its {len(passages)} nodes; pass persist_path, or "
                "persist it"
            )
        return super().__getstate__()


def _directory(persist_path: str, fs: fsspec.AbstractFileSystem | None) -> Path:
    from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]

    if fs is not None and not isinstance(fs, LocalFileSystem):
        raise InputError(
            f"the index needs a local directory, not a {type(fs).__name__}; persist locally and upload the directory"
        )
    path = Path(persist_path)
    return path.with_suffix(".blockrag") if path.suffix == ".json" else path
