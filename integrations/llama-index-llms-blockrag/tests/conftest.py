"""What the tests share: the demo model, a few passages, a retriever of just these, and an ear for events."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import llama_index.core
import llama_index.core.instrumentation as instrument
import pytest
import torch
from llama_index.core import Settings
from llama_index.core.base.base_retriever import BaseRetriever
from llama_index.core.bridge.pydantic import Field
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.core.schema import NodeWithScore, QueryBundle, TextNode
from llama_index.llms.blockrag import BlockCacheEvent, BlockRAGLLM

from blockrag.model.running import RunningPrompt

CAPITALS = {"Bhutan": "Thimphu", "Peru": "Lima", "Kenya": "Nairobi"}
QUESTION = "What is the capital of Bhutan?"

_NAMESPACES = itertools.count()


def nodes_of(capitals: dict[str, str] = CAPITALS) -> list[NodeWithScore]:
    """One node per country, with its name as title, the first one with the highest score."""
    return [
        NodeWithScore(
            node=TextNode(id_=country, text=f"The capital of {country} is {city}.", metadata={"title": country}),
            score=1.0 - place / 10,
        )
        for place, (country, city) in enumerate(capitals.items())
    ]


class Shelf(BaseRetriever):
    """Retrieves all it has."""

    def __init__(self, hits: Sequence[NodeWithScore]) -> None:
        self._hits = list(hits)
        super().__init__()

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return self._hits


class Ear(BaseEventHandler):
    """Keeps every event."""

    events: list[Any] = Field(default_factory=list)

    @classmethod
    def class_name(cls) -> str:
        return "Ear"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        self.events.append(event)

    def of(self, kind: type[BaseEvent]) -> list[Any]:
        """The events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]

    def blocks(self) -> list[tuple[int, int]]:
        """Blocks reused and computed by each call since the last time, in order."""
        found = [(event.blocks_reused, event.blocks_computed) for event in self.of(BlockCacheEvent)]
        self.events.clear()
        return found


@pytest.fixture
def ear() -> Iterator[Ear]:
    root = instrument.get_dispatcher()
    ear = Ear()
    root.add_event_handler(ear)
    yield ear
    root.event_handlers.remove(ear)


@pytest.fixture
def hits() -> list[NodeWithScore]:
    return nodes_of()


@pytest.fixture
def shelf(hits: list[NodeWithScore]) -> Shelf:
    return Shelf(hits)


@pytest.fixture
def make_llm() -> Callable[..., BlockRAGLLM]:
    """Language models over the demo model that find nothing of each other's blocks, unless told a namespace."""

    def make(**fields: Any) -> BlockRAGLLM:
        return BlockRAGLLM(**{"max_new_tokens": 8, "namespace": f"test-{next(_NAMESPACES)}", **fields})

    return make


@pytest.fixture
def llm(make_llm: Callable[..., BlockRAGLLM]) -> BlockRAGLLM:
    return make_llm()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _settings() -> Iterator[None]:
    """LlamaIndex counts with the model's tokenizer, as the documentation says to; nothing else is set."""
    Settings.tokenizer = BlockRAGLLM().tokenizer.encode
    yield
    llama_index.core.global_tokenizer = None


def prompts_in_progress() -> int:
    """Running prompts that hold a cache."""
    gc.collect()
    # By type(): isinstance() would ask modules for attributes that they warn about.
    running = [thing for thing in gc.get_objects() if type(thing) is RunningPrompt]
    return sum(prompt.cache is not None for prompt in running)
