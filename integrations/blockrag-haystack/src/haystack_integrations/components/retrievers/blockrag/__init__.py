"""The retriever of `BlockRAGDocumentStore`."""

from haystack_integrations.components.retrievers.blockrag.embedding_retriever import BlockRAGEmbeddingRetriever

__all__ = ["BlockRAGEmbeddingRetriever"]
