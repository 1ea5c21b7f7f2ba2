"""The document store that keeps documents' KV states as long as the documents."""

from haystack_integrations.document_stores.blockrag.document_store import BlockRAGDocumentStore

__all__ = ["BlockRAGDocumentStore"]
