"""`BlockRAGTextEmbedder`: a question's embedding by one of blockrag's encoders."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import TYPE_CHECKING, Any

from haystack import component, default_from_dict, default_to_dict

if TYPE_CHECKING:
    from blockrag.encoders import Encoder

__all__ = ["BlockRAGTextEmbedder"]


@component
class BlockRAGTextEmbedder:
    """Embeds questions, for documents that `BlockRAGDocumentEmbedder` embedded with the same encoder.

    Args:
        encoder: "lexical" (words, as BM25 weighs them, except that rare words count like common ones; no weights, no
            network), "contriever", or "st:<hub id or directory>" for a sentence-transformers model.
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
    def from_dict(cls, data: dict[str, Any]) -> BlockRAGTextEmbedder:
        """The component from `to_dict`'s values."""
        return default_from_dict(cls, data)

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
