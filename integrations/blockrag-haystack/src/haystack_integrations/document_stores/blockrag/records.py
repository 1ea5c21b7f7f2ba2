"""A document as the passage that is stored for it, and back: equal to the last bit of its embedding.

A passage's vector is float32. An embedding that is not (a list of Python floats that never was a tensor) is kept beside
it as float64.
"""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from haystack import Document
from numpy.typing import NDArray

from blockrag.passage import Passage
from haystack_integrations.common.blockrag import document_passage

__all__ = ["from_passage", "has_content", "is_embedded", "to_passage"]

_AS_VECTOR = "vector"


def to_passage(document: Document, dimension: int) -> tuple[Passage, NDArray[np.float32]]:
    """The passage of a document and its vector, `[dimension]`; zero without an embedding.

    Raises:
        ValueError: The embedding has another length, or a string cannot be stored as UTF-8.
    """
    record = document.to_dict(flatten=False)
    for kept_elsewhere in ("id", "content", "embedding"):
        del record[kept_elsewhere]
    vector = np.zeros(dimension, dtype=np.float32)
    if document.embedding is not None:
        exact = np.asarray(document.embedding, dtype=np.float64)
        if exact.shape != (dimension,):
            raise ValueError(
                f"document {document.id!r} has an embedding of {exact.size} numbers, this document store holds "
                f"{dimension}; embed it with the store's embedder, or make the store with embedding_dim={exact.size}"
            )
        with np.errstate(over="ignore"):  # The index refuses what is not finite, and says so.
            vector = exact.astype(np.float32)
        same = np.array_equal(vector.astype(np.float64), exact)
        record["embedding"] = _AS_VECTOR if same else base64.b64encode(exact.astype("<f8").tobytes()).decode()
    if document.content is None:
        return Passage(id=document.id, text="", metadata={"document": record}), vector
    shown = document_passage(document)
    metadata = {"document": record, "has_content": True}
    return Passage(id=shown.id, title=shown.title, text=shown.text, metadata=metadata), vector


def from_passage(passage: Passage, vector: NDArray[np.float32] | None) -> Document:
    """The document of a passage.

    Args:
        passage: From `to_passage`.
        vector: Its stored vector; None leaves the embedding out.
    """
    record = _record(passage)
    kept = record.pop("embedding", None)
    if vector is not None and kept is not None:
        exact = vector if kept == _AS_VECTOR else np.frombuffer(base64.b64decode(kept), dtype="<f8")
        record["embedding"] = exact.tolist()
    content = passage.text if has_content(passage) else None
    return Document.from_dict({**record, "id": passage.id, "content": content})


def has_content(passage: Passage) -> bool:
    """Whether the document has text."""
    return bool(passage.metadata.get("has_content"))


def is_embedded(passage: Passage) -> bool:
    """Whether the document has an embedding, and can be found by one."""
    return "embedding" in _record(passage)


def _record(passage: Passage) -> dict[str, Any]:
    record = passage.metadata["document"]
    if not isinstance(record, dict):
        raise AssertionError(f"the record of document {passage.id!r} is a {type(record).__name__}")
    return dict(record)
