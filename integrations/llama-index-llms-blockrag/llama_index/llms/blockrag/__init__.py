"""LlamaIndex on blockrag: the language model, and everything that keeps retrieved passages whole on their way to it.

    from llama_index.llms.blockrag import BlockRAGLLM

    query_engine = index.as_query_engine(llm=BlockRAGLLM(model_name="demo"))

Names are imported when they are used, so that importing this package loads no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

_HOMES = {
    "BlockCacheEvent": "events",
    "BlockContextChatEngine": "chat_engine",
    "BlockKVTransform": "transform",
    "BlockRAGLLM": "base",
    "BlockRAGVectorStore": "vector_store",
    "BlockSynthesizer": "synthesizer",
    "ContrieverEmbedding": "embedding",
    "LexicalEmbedding": "embedding",
    "PassageBlock": "blocks",
    "track_passages": "tracking",
}

if TYPE_CHECKING:
    from llama_index.llms.blockrag.base import BlockRAGLLM
    from llama_index.llms.blockrag.blocks import PassageBlock
    from llama_index.llms.blockrag.chat_engine import BlockContextChatEngine
    from llama_index.llms.blockrag.embedding import ContrieverEmbedding, LexicalEmbedding
    from llama_index.llms.blockrag.events import BlockCacheEvent
    from llama_index.llms.blockrag.synthesizer import BlockSynthesizer
    from llama_index.llms.blockrag.tracking import track_passages
    from llama_index.llms.blockrag.transform import BlockKVTransform
    from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore

__all__ = [
    "BlockCacheEvent",
    "BlockContextChatEngine",
    "BlockKVTransform",
    "BlockRAGLLM",
    "BlockRAGVectorStore",
    "BlockSynthesizer",
    "ContrieverEmbedding",
    "LexicalEmbedding",
    "PassageBlock",
    "track_passages",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
