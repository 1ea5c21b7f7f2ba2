"""LangChain's own unit tests of what an integration must be."""

from __future__ import annotations

from typing import Any

from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_tests.unit_tests import ChatModelUnitTests, EmbeddingsUnitTests

from langchain_blockrag import BlockRAGEmbeddings, ChatBlockRAG


class TestChatBlockRAG(ChatModelUnitTests):
    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatBlockRAG

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": "demo"}


class TestBlockRAGEmbeddings(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return BlockRAGEmbeddings
