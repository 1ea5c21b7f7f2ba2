"""LangChain's own integration tests, on the demo model and real stores."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from blockrag.stores import MemoryStore, open_store
from langchain_core.embeddings import Embeddings
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage
from langchain_core.retrievers import BaseRetriever
from langchain_core.stores import BaseStore
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import (
    BaseStoreAsyncTests,
    BaseStoreSyncTests,
    ChatModelIntegrationTests,
    EmbeddingsIntegrationTests,
    RetrieversIntegrationTests,
    VectorStoreIntegrationTests,
)

from langchain_blockrag import (
    BlockKVByteStore,
    BlockRAGEmbeddings,
    BlockRAGVectorStore,
    ChatBlockRAG,
    documents_to_blocks,
)


@pytest.fixture(scope="module", autouse=True)
def _checkpoints(wordy_checkpoint: str, second_checkpoint: str) -> None:
    TestChatBlockRAG.first, TestChatBlockRAG.second = wordy_checkpoint, second_checkpoint


class TestChatBlockRAG(ChatModelIntegrationTests):
    first = second = ""

    @property
    def chat_model_class(self) -> type[BaseChatModel]:
        return ChatBlockRAG

    @property
    def chat_model_params(self) -> dict[str, Any]:
        return {"model": self.first, "max_tokens": 20}

    @property
    def model_override_value(self) -> str:
        return self.second

    @property
    def supported_usage_metadata_details(self) -> Any:
        return {"invoke": ["cache_read_input"], "stream": ["cache_read_input"]}

    def invoke_with_cache_read_input(self, *, stream: bool = False) -> AIMessage:
        model = ChatBlockRAG(model=self.first, max_tokens=16)
        asked = [documents_to_blocks(["The capital of Bhutan is Thimphu."], "What is the capital of Bhutan?")]
        model.invoke(asked)
        if not stream:
            return model.invoke(asked)
        first, *rest = model.stream(asked)
        return sum(rest, first)  # type: ignore[return-value]


class TestBlockRAGEmbeddings(EmbeddingsIntegrationTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return BlockRAGEmbeddings


class TestInMemory(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self) -> Iterator[VectorStore]:
        with BlockRAGVectorStore(self.get_embeddings()) as store:
            yield store


class TestOnDiskWithModel(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, llm: ChatBlockRAG, tmp_path: Path) -> Iterator[VectorStore]:
        path = tmp_path / "documents"
        with BlockRAGVectorStore(self.get_embeddings(), path=path, llm=llm, similarity="cosine") as store:
            yield store


def as_retriever(k: int) -> BaseRetriever:
    texts = [f"{country} is a country." for country in ("Bhutan", "Kenya", "Peru", "Chad", "Mali")]
    return BlockRAGVectorStore.from_texts(texts, BlockRAGEmbeddings()).as_retriever(search_kwargs={"k": k})


class TestRetriever(RetrieversIntegrationTests):
    @property
    def retriever_constructor(self) -> Any:
        return as_retriever

    @property
    def retriever_constructor_params(self) -> dict[str, Any]:
        return {"k": 2}

    @property
    def retriever_query_example(self) -> str:
        return "Bhutan"


@pytest.fixture(params=["memory", "disk"])
def byte_store(request: pytest.FixtureRequest, tmp_path: Path) -> BaseStore[str, bytes]:
    return BlockKVByteStore(MemoryStore() if request.param == "memory" else open_store(f"disk://{tmp_path}/kv"))


class TestByteStore(BaseStoreSyncTests[bytes]):
    @pytest.fixture
    def kv_store(self, byte_store: BaseStore[str, bytes]) -> BaseStore[str, bytes]:
        return byte_store

    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return b"one", b"", bytes(range(256)) * 300


class TestByteStoreAsync(BaseStoreAsyncTests[bytes]):
    @pytest.fixture
    async def kv_store(self, byte_store: BaseStore[str, bytes]) -> BaseStore[str, bytes]:
        return byte_store

    @pytest.fixture
    def three_values(self) -> tuple[bytes, bytes, bytes]:
        return b"one", b"", bytes(range(256)) * 300
