"""One process, offline, one thread: the demo model ships with blockrag."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import shutil

import pytest
import torch
from blockrag.demo import checkpoint_path
from blockrag.model.block_model import BlockModel
from blockrag.stores import MemoryStore
from langchain_core.documents import Document
from transformers import AutoConfig, AutoModelForCausalLM

from langchain_blockrag import ChatBlockRAG

# More threads than cores only adds noise.
torch.set_num_threads(1)

FACTS = {"Bhutan": "Thimphu", "Kenya": "Nairobi", "Peru": "Lima"}
QUESTION = "What is the capital of Bhutan?"


@pytest.fixture(scope="session")
def weights() -> BlockModel:
    """The demo model, loaded once; tests take it apart only to give it other stores."""
    return BlockModel.from_pretrained("demo")


@pytest.fixture
def model(weights: BlockModel) -> BlockModel:
    """The demo model with an empty store of its own."""
    return BlockModel(weights.model, weights.tokenizer, facts=weights.facts, store=MemoryStore())


@pytest.fixture
def llm(model: BlockModel) -> ChatBlockRAG:
    """A chat model around it."""
    return ChatBlockRAG.from_model(model, max_tokens=16)


@pytest.fixture
def documents() -> list[Document]:
    """Three documents with titles."""
    return [
        Document(id=country, page_content=f"The capital of {country} is {capital}.", metadata={"title": country})
        for country, capital in FACTS.items()
    ]


@pytest.fixture(scope="session")
def wordy_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model on disk that says something to everything: the demo's, with weights drawn at random."""
    path = tmp_path_factory.mktemp("models") / "wordy"
    shutil.copytree(checkpoint_path(), path)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def second_checkpoint(wordy_checkpoint: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The same under another name."""
    return str(shutil.copytree(wordy_checkpoint, tmp_path_factory.mktemp("models") / "second"))
