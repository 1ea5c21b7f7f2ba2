"""What the package says it is: names, weight, fields, values that travel."""

from __future__ import annotations

import pickle
import subprocess
import sys

import pytest
from pydantic import ValidationError

import langchain_blockrag
from langchain_blockrag import BlockRAGEmbeddings, ChatBlockRAG

HEAVY = ("torch", "transformers", "sentence_transformers", "faiss", "llama_index")


@pytest.mark.parametrize(
    "statement",
    [
        "import langchain_blockrag",
        "from langchain_blockrag import ChatBlockRAG; ChatBlockRAG(model='demo')",
        "from langchain_blockrag import documents_to_blocks; documents_to_blocks(['text'], 'question')",
        "from langchain_blockrag import BlockRAGEmbeddings; BlockRAGEmbeddings()",
    ],
)
def test_importing_and_configuring_loads_no_heavy_library(statement: str) -> None:
    code = f"import sys; {statement}; print([name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


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
