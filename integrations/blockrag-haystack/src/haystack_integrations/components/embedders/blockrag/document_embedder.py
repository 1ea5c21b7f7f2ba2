"""`BlockRAGDocumentEmbedder`: documents' embeddings by one of blockrag's encoders."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

from haystack import Document, component

from haystack_integrations.common.blockrag import document_passage
from haystack_integrations.components.embedders.blockrag.encoder_component import EncoderComponent

__all__ = ["BlockRAGDocumentEmbedder"]


@component
class BlockRAGDocumentEmbedder(EncoderComponent):
    """Embeds documents, with the title from their meta.

    Args:
        encoder: See `BlockRAGTextEmbedder`.
    """

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents.

        Returns:
            `documents`, copies with embeddings, and `meta` with the encoder's name.

        Raises:
            ValueError: They are no documents, or one has no text.
        """
        if not isinstance(documents, list) or any(not isinstance(document, Document) for document in documents):
            raise ValueError(f"documents is {documents!r:.60}; pass a list of Document, or BlockRAGTextEmbedder a text")
        vectors = self._encoder.encode_passages([document_passage(document) for document in documents])
        embedded = [
            replace(document, embedding=vector.tolist()) for document, vector in zip(documents, vectors, strict=True)
        ]
        return {"documents": embedded, "meta": {"model": self._encoder.name}}

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """`run`, on another thread: the event loop goes on."""
        return await asyncio.to_thread(self.run, documents)
