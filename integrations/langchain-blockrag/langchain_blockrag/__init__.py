"""LangChain components for blockrag: passages stay blocks, from the retriever to the model.

    ChatBlockRAG          a chat model that reuses the KV states of passages
    documents_to_blocks   retrieved documents and a question to the message it reads them from
    BlockRAGVectorStore   documents with their vectors, and the KV states of their blocks
    BlockRAGEmbeddings    blockrag's encoders, Contriever among them
    BlockKVByteStore      a block store as a key-value store of bytes

Names are imported when they are used, so that `import langchain_blockrag` loads no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "BlockKVByteStore": "langchain_blockrag.stores",
    "BlockRAGEmbeddings": "langchain_blockrag.embeddings",
    "BlockRAGVectorStore": "langchain_blockrag.vectorstores",
    "ChatBlockRAG": "langchain_blockrag.chat_models",
    "documents_to_blocks": "langchain_blockrag.documents",
}

if TYPE_CHECKING:
    from langchain_blockrag.chat_models import ChatBlockRAG
    from langchain_blockrag.documents import documents_to_blocks
    from langchain_blockrag.embeddings import BlockRAGEmbeddings
    from langchain_blockrag.stores import BlockKVByteStore
    from langchain_blockrag.vectorstores import BlockRAGVectorStore

__all__ = [
    "BlockKVByteStore",
    "BlockRAGEmbeddings",
    "BlockRAGVectorStore",
    "ChatBlockRAG",
    "documents_to_blocks",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'langchain_blockrag' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
