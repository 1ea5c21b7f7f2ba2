"""`BlockRAGEmbeddingRetriever`: the documents nearest to a question's embedding."""

from __future__ import annotations

from typing import Any

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.document_stores.types import FilterPolicy
from haystack.document_stores.types.filter_policy import apply_filter_policy

from haystack_integrations.document_stores.blockrag import BlockRAGDocumentStore

__all__ = ["BlockRAGEmbeddingRetriever"]


@component
class BlockRAGEmbeddingRetriever:
    """Finds the documents of a `BlockRAGDocumentStore` whose embeddings are nearest to the question's.

    Args:
        document_store: Where to search.
        filters: Metadata filters of every search.
        top_k: Most documents to return.
        filter_policy: Whether filters given at run time take the place of those given here, or are added to them.
        return_embedding: Whether documents come with their embeddings.

    Raises:
        TypeError: It is another document store.
        ValueError: `top_k` is less than 1.
    """

    def __init__(
        self,
        document_store: BlockRAGDocumentStore,
        *,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        filter_policy: FilterPolicy | str = FilterPolicy.REPLACE,
        return_embedding: bool = False,
    ) -> None:
        if not isinstance(document_store, BlockRAGDocumentStore):
            raise TypeError(f"document_store is a {type(document_store).__name__}; pass a BlockRAGDocumentStore")
        if top_k < 1:
            raise ValueError(f"top_k={top_k} is less than 1; pass how many documents to return")
        self.document_store = document_store
        self.filters = filters
        self.top_k = top_k
        self.filter_policy = FilterPolicy.from_str(filter_policy) if isinstance(filter_policy, str) else filter_policy
        self.return_embedding = return_embedding

    def to_dict(self) -> dict[str, Any]:
        """The component as plain values, for YAML."""
        return default_to_dict(
            self,
            document_store=self.document_store.to_dict(),
            filters=self.filters,
            top_k=self.top_k,
            filter_policy=self.filter_policy.value,
            return_embedding=self.return_embedding,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockRAGEmbeddingRetriever:
        """The component from `to_dict`'s values."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document])
    def run(
        self, query_embedding: list[float], filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """Search.

        Args:
            query_embedding: The question's embedding.
            filters: Metadata filters of this search; see `filter_policy`.
            top_k: Most documents to return; by default the component's.

        Returns:
            `documents`, best first, with their scores.

        Raises:
            ValueError: `top_k` is less than 1, or the embedding has another length than the store's.
            haystack.errors.FilterError: The filters are malformed.
        """
        return {"documents": self.document_store.embedding_retrieval(**self._search(query_embedding, filters, top_k))}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query_embedding: list[float], filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """`run`, on another thread: the event loop goes on."""
        search = self._search(query_embedding, filters, top_k)
        return {"documents": await self.document_store.embedding_retrieval_async(**search)}

    def _search(
        self, query_embedding: list[float], filters: dict[str, Any] | None, top_k: int | None
    ) -> dict[str, Any]:
        return {
            "query_embedding": query_embedding,
            "filters": apply_filter_policy(self.filter_policy, self.filters, filters),
            "top_k": self.top_k if top_k is None else top_k,
            "return_embedding": self.return_embedding,
        }
