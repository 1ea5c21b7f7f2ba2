"""Contriever and the lexical encoder as LlamaIndex embedding models.

Both are compared by the inner product, without normalisation. LlamaIndex hands over text alone: a title counts where
it is part of the text (`MetadataMode.EMBED` puts metadata in front of it).
"""

from __future__ import annotations

import asyncio
import threading
from abc import abstractmethod
from typing import TYPE_CHECKING, Any

from llama_index.core.base.embeddings.base import BaseEmbedding, Embedding, SimilarityMode, similarity
from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.llms.blockrag.plain_fields import PlainFields

from blockrag.passage import Passage

if TYPE_CHECKING:
    from blockrag.encoders import Encoder

__all__ = ["ContrieverEmbedding", "LexicalEmbedding"]


class _EncoderEmbedding(PlainFields, BaseEmbedding):
    """An embedding model over a blockrag encoder, which is opened when it is first needed."""

    _encoder: Encoder | None = PrivateAttr(default=None)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    @abstractmethod
    def _open(self) -> Encoder:
        """The encoder these fields describe."""

    @property
    def encoder(self) -> Encoder:
        """The encoder; opened when first asked for.

        Raises:
            InputError: It cannot be loaded.
        """
        with self._lock:
            if self._encoder is None:
                self._encoder = self._open()
            return self._encoder

    @staticmethod
    def similarity(
        embedding1: Embedding, embedding2: Embedding, mode: SimilarityMode = SimilarityMode.DOT_PRODUCT
    ) -> float:
        """Similarity of two embeddings; by default the inner product."""
        return similarity(embedding1, embedding2, mode)

    def _get_query_embedding(self, query: str) -> Embedding:
        return _plain(self.encoder.encode_queries([query])[0])

    async def _aget_query_embedding(self, query: str) -> Embedding:
        return await asyncio.to_thread(self._get_query_embedding, query)

    def _get_text_embedding(self, text: str) -> Embedding:
        return self._get_text_embeddings([text])[0]

    async def _aget_text_embedding(self, text: str) -> Embedding:
        return await asyncio.to_thread(self._get_text_embedding, text)

    def _get_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        passages = [Passage(id=str(place), text=text) for place, text in enumerate(texts)]
        return [_plain(vector) for vector in self.encoder.encode_passages(passages)]

    async def _aget_text_embeddings(self, texts: list[str]) -> list[Embedding]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)


class ContrieverEmbedding(_EncoderEmbedding):
    """Contriever as it was trained: masked mean, no normalisation, inner product (arXiv 2112.09118).

    Args:
        model_name: A directory or hub id of Contriever, or of a BERT-like encoder to be used as it is.
        device: Torch device; "auto" takes a GPU where there is one.
        max_tokens: Longer texts are cut there.
    """

    model_name: str = Field(default="facebook/contriever-msmarco", description="Directory or hub id.")
    embed_batch_size: int = Field(default=32, gt=0, le=2048, description="Texts per forward pass.")
    device: str = Field(default="auto", description='Torch device, or "auto".')
    max_tokens: int = Field(default=512, gt=0, description="Where texts are cut.")

    @classmethod
    def class_name(cls) -> str:
        """The name this class is serialized under."""
        return "ContrieverEmbedding"

    def _open(self) -> Encoder:
        from blockrag.encoders import ContrieverEncoder

        return ContrieverEncoder(
            self.model_name, device=self.device, batch_size=self.embed_batch_size, max_tokens=self.max_tokens
        )


class LexicalEmbedding(_EncoderEmbedding):
    """Stemmed words hashed into a vector: no weights, no network; for tests, demonstrations and exact names.

    Without the corpus every word weighs the same. `BlockRAG` weighs words by how rare they are, and finds more.

    Args:
        dimension: Length of the vectors; None takes the encoder's own.
    """

    model_name: str = Field(default="blockrag-lexical", description="For reports.")
    dimension: int | None = Field(default=None, gt=0, description="Length of the vectors.")

    @classmethod
    def class_name(cls) -> str:
        """The name this class is serialized under."""
        return "LexicalEmbedding"

    def _open(self) -> Encoder:
        from blockrag.encoders import LexicalEncoder

        return LexicalEncoder() if self.dimension is None else LexicalEncoder(self.dimension)


def _plain(vector: Any) -> Embedding:
    floats: Embedding = vector.tolist()
    return floats
