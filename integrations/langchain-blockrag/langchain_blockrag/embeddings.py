"""`BlockRAGEmbeddings`: blockrag's encoders as LangChain embeddings."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from blockrag.errors import InputError
from blockrag.passage import Passage
from langchain_core.embeddings import Embeddings
from pydantic import BaseModel, ConfigDict

from langchain_blockrag.errors import langchain_errors

if TYPE_CHECKING:
    from blockrag.encoders import Encoder

__all__ = ["BlockRAGEmbeddings"]

_LOCK = threading.RLock()
_ENCODERS: dict[str, Encoder] = {}


class BlockRAGEmbeddings(BaseModel, Embeddings):
    """Vectors whose inner product is similarity; not normalized, because Contriever was trained without.

    The encoder opens at the first text, once per process. "lexical" needs no weights; it matches words. A text is
    embedded as it is given: nothing of a document's metadata is added to it.

    The asynchronous methods are those of `Embeddings`: they run in a thread.

    Args:
        encoder: What `blockrag.open_encoder` takes: "lexical", "lexical:2048", "contriever", "contriever:ID_OR_PATH"
            or "st:ID_OR_PATH" for a sentence-transformers model.

    Raises:
        ValueError: What is to be embedded is no string; at the first text: the encoder does not exist or cannot be
            loaded.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder: str = "lexical"

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """One vector per text; all have the same length."""
        passages = [Passage(id=str(number), text=_checked(text)) for number, text in enumerate(texts, 1)]
        with langchain_errors():
            return [[float(x) for x in row] for row in self._opened().encode_passages(passages)]

    def embed_query(self, text: str) -> list[float]:
        """The vector of a question."""
        with langchain_errors():
            return [float(x) for x in self._opened().encode_queries([_checked(text)])[0]]

    def _opened(self) -> Encoder:
        from blockrag.encoders import open_encoder

        with _LOCK:
            if self.encoder not in _ENCODERS:
                _ENCODERS[self.encoder] = open_encoder(self.encoder)
            return _ENCODERS[self.encoder]


def _checked(text: str) -> str:
    # The usual mistake is a retriever that is handed the chain's whole input.
    if not isinstance(text, str):
        raise InputError(f"a text to embed must be a string, got {type(text).__name__} {text!r:.60}")
    return text
