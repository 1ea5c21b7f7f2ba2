"""`BlockRAGTextEmbedder`: a question's embedding by one of blockrag's encoders."""

from __future__ import annotations

import asyncio
from typing import Any

from haystack import component

from haystack_integrations.components.embedders.blockrag.encoder_component import EncoderComponent

__all__ = ["BlockRAGTextEmbedder"]


@component
class BlockRAGTextEmbedder(EncoderComponent):
    """Embeds questions, for documents that `BlockRAGDocumentEmbedder` embedded with the same encoder.

    Args:
        encoder: "lexical" (words, as BM25 weighs them, except that rare words count like common ones; no weights, no
            network), "contriever", or "st:<hub id or directory>" for a sentence-transformers model.
    """

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    def run(self, text: str) -> dict[str, Any]:
        """Embed a question.

        Returns:
            `embedding`, and `meta` with the encoder's name.

        Raises:
            ValueError: It is not a string.
        """
        if not isinstance(text, str):
            raise ValueError(f"text is a {type(text).__name__}; pass a string, or BlockRAGDocumentEmbedder documents")
        (vector,) = self._encoder.encode_queries([text])
        return {"embedding": vector.tolist(), "meta": {"model": self._encoder.name}}

    @component.output_types(embedding=list[float], meta=dict[str, Any])
    async def run_async(self, text: str) -> dict[str, Any]:
        """`run`, on another thread: the event loop goes on."""
        return await asyncio.to_thread(self.run, text)
