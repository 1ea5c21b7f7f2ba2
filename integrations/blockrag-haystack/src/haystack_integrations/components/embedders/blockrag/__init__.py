"""Embedders over blockrag's encoders."""

from haystack_integrations.components.embedders.blockrag.document_embedder import BlockRAGDocumentEmbedder
from haystack_integrations.components.embedders.blockrag.text_embedder import BlockRAGTextEmbedder

__all__ = ["BlockRAGDocumentEmbedder", "BlockRAGTextEmbedder"]
