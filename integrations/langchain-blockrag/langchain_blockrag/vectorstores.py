"""`BlockRAGVectorStore`: documents with the vectors of any LangChain embeddings, and the KV states of their blocks."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from blockrag.errors import InputError
from langchain_core.documents import Document
from langchain_core.vectorstores import VectorStore
from langchain_core.vectorstores.utils import maximal_marginal_relevance

from langchain_blockrag.documents import document_of, passage_of, shown
from langchain_blockrag.errors import langchain_errors

if TYPE_CHECKING:
    from blockrag.ingest import PassageStore
    from blockrag.model.block_model import BlockModel
    from blockrag.passage import Hit, Passage
    from blockrag.prompt import Block
    from langchain_core.embeddings import Embeddings

    from langchain_blockrag.chat_models import ChatBlockRAG

__all__ = ["BlockRAGVectorStore", "Filter"]

Filter = Mapping[str, Any] | Callable[[Document], bool]
"""Metadata that documents must have, by equality, or a function that says whether a document may be found."""


class BlockRAGVectorStore(VectorStore):
    """Documents that are found by their vectors, and whose KV states wait in a chat model's block store.

    With a chat model, the blocks of documents are computed when the documents are added, in exactly the form its
    prompts have them, and dropped when the last document that has them is deleted or replaced. (The last of this
    store: should another one share the block store and the text, its next question computes the block again.) Without
    a chat model it is a vector store like any other.

    Safe to use from several threads, and from several processes on one path.

    Args:
        embedding: Embeds `page_content` and questions.
        path: Directory of the documents and vectors, made at the first add; None keeps them in memory.
        llm: The chat model that will be asked about the documents.
        prebuild: Compute blocks when documents are added, rather than when one is first asked about. A document whose
            block cannot be computed is logged and kept without it.
        similarity: "dot", what Contriever and the lexical encoder are made for, or "cosine". They agree for embeddings
            that are normalized, as most are.
        kind: "flat" compares all vectors; "hnsw" and "ivf" are approximate indexes for large collections.
        name: Names what makes the vectors; a path opens only under the name it was built with.

    Raises:
        ValueError: `similarity` is neither; at the first use: the path holds something else, or the chat model cannot
            be loaded.
    """

    def __init__(
        self,
        embedding: Embeddings,
        *,
        path: str | Path | None = None,
        llm: ChatBlockRAG | None = None,
        prebuild: bool = True,
        similarity: Literal["dot", "cosine"] = "dot",
        kind: Literal["flat", "hnsw", "ivf"] = "flat",
        name: str = "given",
    ) -> None:
        if similarity not in ("dot", "cosine"):
            raise InputError(f'similarity={similarity!r} is neither "dot" nor "cosine"')
        self._embedding = embedding
        self._path = path
        self._llm = llm
        self._prebuild = prebuild
        self._similarity = similarity
        self._kind: Literal["flat", "hnsw", "ivf"] = kind
        self._name = name
        self._opening = threading.Lock()
        self._opened: PassageStore | None = None

    @property
    def embeddings(self) -> Embeddings:
        """What embeds documents and questions."""
        return self._embedding

    # -- adding and deleting ------------------------------------------------------------------------------------------

    def add_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Embed and add documents, all or none; one whose id is there already is replaced.

        Args:
            documents: The documents. `metadata` must be JSON-serialisable; `metadata["title"]` is shown to the model.
            ids: Their ids, before those they have; a new one is made for each that has none.
            batch_size: Documents to embed and add at once; all or none then holds for each batch.
            **kwargs: None are known.

        Returns:
            The ids.

        Raises:
            ValueError: An id comes twice, there are more or fewer ids than documents, or metadata cannot be stored.
        """
        with langchain_errors():
            _refuse(kwargs)
            passages = _passages(documents, ids)
            for batch in _batches(passages, batch_size):
                self._add(batch, self._embedding.embed_documents([one.text for one in batch]))
            return [passage.id for passage in passages]

    async def aadd_documents(
        self,
        documents: list[Document],
        *,
        ids: Sequence[str | None] | None = None,
        batch_size: int | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """`add_documents`, beside the event loop."""
        with langchain_errors():
            _refuse(kwargs)
            passages = _passages(documents, ids)
            for batch in _batches(passages, batch_size):
                vectors = await self._embedding.aembed_documents([one.text for one in batch])
                await asyncio.to_thread(self._add, batch, vectors)
            return [passage.id for passage in passages]

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """Delete documents, and the KV states nobody else uses; unknown ids are ignored.

        Args:
            ids: Which; None for all.
            **kwargs: None are known.
        """
        with langchain_errors():
            _refuse(kwargs)
            if ids is None:
                self._store.clear()
            else:
                self._store.delete(ids)
        return True

    async def adelete(self, ids: list[str] | None = None, **kwargs: Any) -> bool:
        """`delete`, beside the event loop."""
        return await asyncio.to_thread(self.delete, ids, **kwargs)

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """Those of these documents that are there, in the order asked for."""
        with langchain_errors():
            return [document_of(passage) for passage in self._store.get(ids)]

    async def aget_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """`get_by_ids`, beside the event loop."""
        return await asyncio.to_thread(self.get_by_ids, ids)

    # -- searching ----------------------------------------------------------------------------------------------------

    def similarity_search_with_score_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The documents closest to a vector, best first, with their similarity: higher is better.

        Args:
            embedding: The vector.
            k: How many; fewer are returned when there are fewer.
            filter: See `Filter`.
            **kwargs: None are known.

        Raises:
            ValueError: `k` is less than 1, the vector has another length than those stored, or the filter is neither.
        """
        with langchain_errors():
            return [(document_of(hit.passage), hit.score) for hit in self._hits(embedding, k, filter, kwargs)]

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """`similarity_search_with_score_by_vector`, without the scores."""
        found = self.similarity_search_with_score_by_vector(embedding, k, filter=filter, **kwargs)
        return [document for document, _ in found]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The documents closest to a question; see `similarity_search_with_score_by_vector`."""
        vector = self._embedding.embed_query(query)
        return self.similarity_search_with_score_by_vector(vector, k, filter=filter, **kwargs)

    def similarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """`similarity_search_with_score`, without the scores."""
        return [document for document, _ in self.similarity_search_with_score(query, k, filter=filter, **kwargs)]

    def max_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """Documents close to a vector and unlike each other, in the order they were chosen.

        Args:
            embedding: The vector.
            k: How many.
            fetch_k: How many of the closest to choose from.
            lambda_mult: 1 for closeness alone, 0 for difference alone.
            filter: See `Filter`.
            **kwargs: None are known.

        Raises:
            ValueError: As `similarity_search_with_score_by_vector`.
        """
        with langchain_errors():
            hits = self._hits(embedding, max(k, fetch_k), filter, kwargs)
            vectors = self._store.vectors_of([hit.passage.id for hit in hits])
            hits = [hit for hit in hits if hit.passage.id in vectors]
            stored = [vectors[hit.passage.id].tolist() for hit in hits]
            chosen = maximal_marginal_relevance(np.array(embedding), stored, lambda_mult=lambda_mult, k=k)
            return [document_of(hits[place].passage) for place in chosen]

    def max_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`max_marginal_relevance_search_by_vector`, for a question."""
        vector = self._embedding.embed_query(query)
        return self.max_marginal_relevance_search_by_vector(vector, k, fetch_k, lambda_mult, filter=filter, **kwargs)

    async def asimilarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """`similarity_search_with_score`, beside the event loop."""
        vector = await self._embedding.aembed_query(query)
        return await asyncio.to_thread(self.similarity_search_with_score_by_vector, vector, k, filter=filter, **kwargs)

    async def asimilarity_search(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """`similarity_search`, beside the event loop."""
        found = await self.asimilarity_search_with_score(query, k, filter=filter, **kwargs)
        return [document for document, _ in found]

    async def asimilarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """`similarity_search_by_vector`, beside the event loop."""
        return await asyncio.to_thread(self.similarity_search_by_vector, embedding, k, filter=filter, **kwargs)

    async def amax_marginal_relevance_search_by_vector(
        self,
        embedding: list[float],
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`max_marginal_relevance_search_by_vector`, beside the event loop."""
        search = self.max_marginal_relevance_search_by_vector
        return await asyncio.to_thread(search, embedding, k, fetch_k, lambda_mult, filter=filter, **kwargs)

    async def amax_marginal_relevance_search(
        self,
        query: str,
        k: int = 4,
        fetch_k: int = 20,
        lambda_mult: float = 0.5,
        *,
        filter: Filter | None = None,
        **kwargs: Any,
    ) -> list[Document]:
        """`max_marginal_relevance_search`, beside the event loop."""
        vector = await self._embedding.aembed_query(query)
        search = self.amax_marginal_relevance_search_by_vector
        return await search(vector, k, fetch_k, lambda_mult, filter=filter, **kwargs)

    def _select_relevance_score_fn(self) -> Callable[[float], float]:
        if self._similarity != "cosine":
            raise InputError(
                "an inner product has no upper bound, so there are no relevance scores between 0 and 1; "
                'make the store with similarity="cosine"'
            )
        return lambda score: min(1.0, max(0.0, score))

    # -- making, saving, closing --------------------------------------------------------------------------------------

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> BlockRAGVectorStore:
        """A store with these texts in it; `from_documents` is the same for documents.

        Args:
            texts: The texts.
            embedding: Embeds them.
            metadatas: Their metadata.
            ids: Their ids.
            **kwargs: The constructor's own.
        """
        store = cls(embedding, **kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def save_local(self, folder_path: str | Path) -> None:
        """Make a directory a copy of this store, without KV states; not needed for a store that has a `path`.

        Args:
            folder_path: The directory; a store it holds is replaced.

        Raises:
            ValueError: It is this store's own path, is in use, or cannot be written.
        """
        with langchain_errors():
            self._store.copy_to(folder_path)

    @classmethod
    def load_local(cls, folder_path: str | Path, embeddings: Embeddings, **kwargs: Any) -> BlockRAGVectorStore:
        """Open what `save_local` wrote, or the `path` of another store; what is added later goes there as well.

        Args:
            folder_path: The directory.
            embeddings: What its vectors were made with.
            **kwargs: The constructor's other arguments.

        Raises:
            ValueError: There is no store.
        """
        from blockrag.index import PassageIndex

        with langchain_errors():
            if PassageIndex.peek(folder_path) is None:
                raise InputError(f"there is no vector store in {str(folder_path)!r}; save one there, or pass path=")
        return cls(embeddings, path=folder_path, **kwargs)

    def close(self) -> None:
        """Write and release files; the store must not be used afterwards. The chat model stays as it is."""
        with langchain_errors(), self._opening:
            if self._opened is not None:
                self._opened.close()

    def __enter__(self) -> BlockRAGVectorStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- the passages -------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> PassageStore:
        from blockrag.ingest import PassageStore

        with self._opening:
            if self._opened is None:
                # In full attention nothing is taken from the block store.
                llm = self._llm if self._llm is not None and self._llm.attention == "block" else None
                model = None if llm is None else llm.block_model()
                self._opened = PassageStore(
                    self._path,
                    name=self._name,
                    kind=self._kind,
                    model=model,
                    blocks_of=None if model is None else self._shown_blocks(model),
                    prebuild=self._prebuild and model is not None,
                )
            return self._opened

    def _shown_blocks(self, model: BlockModel) -> Callable[[Sequence[Passage]], list[Block]] | None:
        """The blocks of passages in the chat model's prompts; None for those of its template."""
        from blockrag.prompt import excerpt_blocks

        if self._llm is None or self._llm.prompt_form != "chat":
            return None
        return lambda passages: excerpt_blocks(model.tokenizer, [shown(passage) for passage in passages])

    def _add(self, passages: Sequence[Passage], vectors: list[list[float]]) -> None:
        self._store.add(passages, self._scaled(vectors))

    def _hits(self, embedding: Sequence[float], k: int, filter: Filter | None, kwargs: Mapping[str, Any]) -> list[Hit]:
        _refuse(kwargs)
        (query,) = self._scaled([list(embedding)])
        if filter is None or isinstance(filter, Mapping):
            return self._store.search(query, k, where=_checked(filter))
        if not callable(filter):
            raise InputError(f"a filter must be a mapping or a function, got {type(filter).__name__} {filter!r:.60}")
        return self._store.search(query, k, keep=lambda passage: filter(document_of(passage)))

    def _scaled(self, vectors: list[list[float]]) -> Any:
        matrix = np.asarray(vectors, dtype=np.float32)
        if self._similarity == "dot":
            return matrix
        lengths = np.linalg.norm(matrix, axis=-1, keepdims=True)
        return matrix / np.where(lengths == 0, 1, lengths)


def _passages(documents: Sequence[Document], ids: Sequence[str | None] | None) -> list[Passage]:
    given = [None] * len(documents) if ids is None else ids
    if len(given) != len(documents):
        raise InputError(f"got {len(given)} ids for {len(documents)} documents; pass one id for each")
    for document in documents:
        if not isinstance(document, Document):
            raise InputError(f"add_documents takes Document objects, got {document!r:.60}; pass strings to add_texts")
    return [
        passage_of(document if id is None else document.model_copy(update={"id": id}), id=str(uuid.uuid4()))
        for document, id in zip(documents, given, strict=True)
    ]


def _batches(passages: Sequence[Passage], size: int | None) -> Iterator[Sequence[Passage]]:
    if size is not None and size < 1:
        raise InputError(f"batch_size={size} is less than 1; leave it out to add all at once")
    step = size or max(1, len(passages))
    return (passages[start : start + step] for start in range(0, len(passages), step))


def _checked(where: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    for name, value in (where or {}).items():
        asked = [name, *value] if isinstance(value, Mapping) else [name]
        if any(str(key).startswith("$") for key in asked):
            raise InputError(
                f"a filter compares by equality, and does not know { ({name: value})!r:.80}; "
                "pass a function that takes the document"
            )
    return where


def _refuse(kwargs: Mapping[str, Any]) -> None:
    if kwargs:
        raise InputError(f"unknown arguments {sorted(kwargs)}; see BlockRAGVectorStore")
