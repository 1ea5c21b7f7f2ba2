"""What the package says it is: names, weight, fields, values that travel."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import pytest
from pydantic import ValidationError

import langchain_blockrag
from langchain_blockrag import BlockRAGEmbeddings, ChatBlockRAG

HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "llama_index")


def heavy_after(statements: str) -> list[str]:
    code = f"import sys; {statements}; print(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def test_importing_loads_no_heavy_library() -> None:
    assert heavy_after("import langchain_blockrag") == []


def test_configuring_loads_no_heavy_library_that_langchain_does_not() -> None:
    own = heavy_after("from langchain_core.language_models import BaseChatModel")
    configured = heavy_after(
        "from langchain_blockrag import *; ChatBlockRAG(model='demo'); BlockRAGVectorStore(BlockRAGEmbeddings()); "
        "documents_to_blocks(['text'], 'question')"
    )
    assert configured == own


def test_every_public_name_is_there() -> None:
    for name in langchain_blockrag.__all__:
        assert getattr(langchain_blockrag, name) is not None
    assert dir(langchain_blockrag) == sorted(langchain_blockrag.__all__)
    with pytest.raises(AttributeError, match="no attribute 'ChatBlockRag'"):
        langchain_blockrag.ChatBlockRag  # noqa: B018


def test_models_and_embeddings_are_plain_values_that_pickle() -> None:
    llm = ChatBlockRAG(model="demo", store_url="memory://?max_bytes=1MB", max_tokens=3, stop=["x"])
    assert pickle.loads(pickle.dumps(llm)) == llm  # noqa: S301 - our own bytes
    assert llm._identifying_params["model_name"] == "demo"
    embeddings = BlockRAGEmbeddings(encoder="lexical:64")
    assert pickle.loads(pickle.dumps(embeddings)) == embeddings  # noqa: S301 - our own bytes


def test_settings_of_remote_models_are_accepted_and_typing_errors_are_not() -> None:
    assert ChatBlockRAG(api_key="key", timeout=3, max_retries=2, base_url="http://localhost").model_name == "demo"
    with pytest.raises(ValidationError, match="max_token"):
        ChatBlockRAG(max_token=3)
    with pytest.raises(ValidationError, match="encodr"):
        BlockRAGEmbeddings(encodr="lexical")


@pytest.mark.parametrize("text", [None, 7, {"question": "Why?"}])
def test_what_cannot_be_embedded_is_refused(text: Any) -> None:
    with pytest.raises(ValueError, match=f"must be a string, got {type(text).__name__}"):
        BlockRAGEmbeddings().embed_query(text)
    with pytest.raises(ValueError, match=f"must be a string, got {type(text).__name__}"):
        BlockRAGEmbeddings().embed_documents(["text", text])
