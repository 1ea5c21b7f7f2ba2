"""`BlockRAGDocumentEmbedder`: documents' embeddings by one of blockrag's encoders."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from haystack import Document, component, default_from_dict, default_to_dict

from haystack_integrations.common.blockrag import document_passage

if TYPE_CHECKING:
    from blockrag.encoders import Encoder

__all__ = ["BlockRAGDocumentEmbedder"]


@component
class BlockRAGDocumentEmbedder:
    """Embeds documents, with the title from their meta.

    Args:
        encoder: See `BlockRAGTextEmbedder`.
    """

    def __init__(self, encoder: str = "lexical") -> None:
        self.encoder = encoder

    @cached_property
    def _encoder(self) -> Encoder:
        from blockrag.encoders import open_encoder

        return open_encoder(self.encoder)

    def warm_up(self) -> None:
        """Load the encoder; the first `run` does it otherwise.

        Raises:
            ValueError: There is no such encoder.
        """
        _ = self._encoder

    async def warm_up_async(self) -> None:
        """`warm_up`, without blocking the event loop."""
        await asyncio.to_thread(self.warm_up)

    def to_dict(self) -> dict[str, Any]:
        """The component as plain values, for YAML."""
        return default_to_dict(self, encoder=self.encoder)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockRAGDocumentEmbedder:
        """The component from `to_dict`'s values."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Embed documents.

        Returns:
            `documents`, copies with embeddings, and `meta` with the encoder's name.

        Raises:
            ValueError: A document has no text.
        """
        vectors = self._encoder.encode_passages([document_passage(document) for document in documents])
        embedded = [
            replace(document, embedding=vector.tolist()) for document, vector in zip(documents, vectors, strict=True)
        ]
        return {"documents": embedded, "meta": {"model": self._encoder.name}}

    @component.output_types(documents=list[Document], meta=dict[str, Any])
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """`run`, on another thread: the event loop goes on."""
        return await asyncio.to_thread(self.run, documents)
