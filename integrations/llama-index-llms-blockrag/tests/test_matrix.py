"""Every stock response mode, called in every way, keeps its passages; what the model reads stays what it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from conftest import QUESTION, Ear, Shelf
from llama_index.core import MockEmbedding, VectorStoreIndex
from llama_index.core.bridge.pydantic import PrivateAttr
from llama_index.core.chat_engine import CondensePlusContextChatEngine, ContextChatEngine
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.schema import NodeWithScore
from llama_index.llms.blockrag import BlockContextChatEngine, BlockRAGLLM, BlockSynthesizer

MakeLLM = Callable[..., BlockRAGLLM]

WHOLE = [(6, 1)]
"""One call: what precedes the passages, three passages and what separates them are reused, the question is computed."""
ONE_BY_ONE = [(2, 1)] * 3
"""One call per passage: what precedes it and the passage are reused."""

MODES = {
    "compact": WHOLE,
    "refine": ONE_BY_ONE,
    "tree_summarize": WHOLE,
    "accumulate": ONE_BY_ONE,
    "compact_accumulate": WHOLE,
    # llama-index-core 0.14 formats a list into the prompt, in which no passage stands whole.
    "simple_summarize": [(0, 1)],
    "blocks": WHOLE,
}
WAYS = ("sync", "stream", "async", "async_stream")
ENGINES = {
    "context": ContextChatEngine,
    "condense_plus_context": CondensePlusContextChatEngine,
    "blocks": BlockContextChatEngine,
}
RAG_PREFIX = "Answer the question using the documents.\n"
# Stock modes that stream in no way.
UNSTREAMED = {"accumulate", "compact_accumulate"}


def query_engine(llm: BlockRAGLLM, shelf: Shelf, mode: str, *, streaming: bool) -> RetrieverQueryEngine:
    if mode == "blocks":
        return RetrieverQueryEngine(shelf, response_synthesizer=BlockSynthesizer(llm, streaming=streaming))
    return RetrieverQueryEngine.from_args(shelf, llm=llm, response_mode=mode, streaming=streaming)


async def answer(llm: BlockRAGLLM, shelf: Shelf, mode: str, way: str) -> str:
    engine = query_engine(llm, shelf, mode, streaming=way.endswith("stream"))
    if way.startswith("async"):
        response: Any = await engine.aquery(QUESTION)
        if way == "async_stream":
            return "".join([token async for token in response.async_response_gen()])
    else:
        response = engine.query(QUESTION)
        if way == "stream":
            return "".join(response.response_gen)
    return str(response.response)


async def conversation(llm: BlockRAGLLM, shelf: Shelf, kind: str, way: str) -> list[str]:
    """The answers to two questions, the second one with the first in its history."""
    engine = ENGINES[kind].from_defaults(shelf, llm=llm)
    answers = []
    for question in (QUESTION, "And of Peru?"):
        if way == "sync":
            answers.append(engine.chat(question).response)
        elif way == "async":
            answers.append((await engine.achat(question)).response)
        elif way == "stream":
            answers.append("".join(engine.stream_chat(question).response_gen))
        else:
            response = await engine.astream_chat(question)
            answers.append("".join([token async for token in response.async_response_gen()]))
    return answers


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
async def test_query_engine_reads_the_same_text_in_full_attention(
    mode: str, way: str, shelf: Shelf, make_llm: MakeLLM
) -> None:
    if mode in UNSTREAMED and way.endswith("stream"):
        with pytest.raises(ValueError, match="stream"):
            query_engine(make_llm(), shelf, mode, streaming=True).query(QUESTION)
        return
    tracking = make_llm(attention="full", namespace="matrix")
    plain = make_llm(attention="full", namespace="matrix", track_passages=False)
    expected = await answer(plain, shelf, "compact" if mode == "blocks" else mode, way)
    assert await answer(tracking, shelf, mode, way) == expected
    assert expected
    assert (tracking.tracking_counts["found"] > 0) is (mode != "simple_summarize")
    assert plain.tracking_counts["found"] == 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("mode", MODES)
async def test_query_engine_reuses_every_local_block(
    mode: str, way: str, shelf: Shelf, make_llm: MakeLLM, ear: Ear
) -> None:
    if mode in UNSTREAMED and way.endswith("stream"):
        with pytest.raises(ValueError, match="stream"):
            query_engine(make_llm(), shelf, mode, streaming=True).query(QUESTION)
        return
    llm = make_llm()
    first = await answer(llm, shelf, mode, way)
    assert sum(computed for _, computed in ear.blocks()) > len(MODES[mode]) or mode == "simple_summarize"
    assert await answer(llm, shelf, mode, way) == first
    assert ear.blocks() == MODES[mode]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ENGINES)
async def test_chat_engine_reads_the_same_text_in_full_attention(
    kind: str, way: str, shelf: Shelf, make_llm: MakeLLM
) -> None:
    tracking = make_llm(attention="full", namespace="matrix")
    plain = make_llm(attention="full", namespace="matrix", track_passages=False)
    expected = await conversation(plain, shelf, "context" if kind == "blocks" else kind, way)
    assert await conversation(tracking, shelf, kind, way) == expected
    assert tracking.tracking_counts["found"] == 6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ENGINES)
async def test_chat_engine_reuses_every_local_block(
    kind: str, way: str, shelf: Shelf, make_llm: MakeLLM, ear: Ear
) -> None:
    llm = make_llm()
    await conversation(llm, shelf, kind, way)
    ear.events.clear()
    await conversation(llm, shelf, kind, way)
    condensing = [(0, 1)] if kind == "condense_plus_context" else []
    assert ear.blocks() == [*WHOLE, *condensing, *WHOLE]


def test_tree_summarize_with_use_async_keeps_its_passages(shelf: Shelf, llm: BlockRAGLLM, ear: Ear) -> None:
    engine = RetrieverQueryEngine.from_args(shelf, llm=llm, response_mode="tree_summarize", use_async=True)
    engine.query(QUESTION)
    ear.events.clear()
    engine.query(QUESTION)
    assert ear.blocks() == WHOLE


@pytest.mark.parametrize("mode", ["compact", "tree_summarize", "compact_accumulate", "blocks"])
async def test_the_rag_form_answers(mode: str, shelf: Shelf, make_llm: MakeLLM, ear: Ear) -> None:
    llm = make_llm(prompt_form="rag")
    for way in ("sync", "async") if mode in UNSTREAMED else WAYS:
        assert "Thimphu" in await answer(llm, shelf, mode, way)
    # The prefix and three passages, without separators.
    assert ear.blocks()[-1] == (4, 1)


@pytest.mark.parametrize("kind", ENGINES)
async def test_the_rag_form_answers_in_conversations(kind: str, shelf: Shelf, make_llm: MakeLLM) -> None:
    engine = ENGINES[kind].from_defaults(shelf, llm=make_llm(prompt_form="rag"), system_prompt="Be brief.")
    assert engine.chat(QUESTION).response == "Thimphu"
    assert (await engine.achat("What is the capital of Kenya?")).response == "Nairobi"


class Listening(BlockRAGLLM):
    """Remembers what it answered, without the marker that blocks follow, which not every model has."""

    _texts: list[str] = PrivateAttr(default_factory=list)

    def _prepare(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare(*args, **kwargs)
        self._texts.append(prepared.prompt.as_full().text)
        return prepared


async def test_steps_that_refine_keep_the_chat_form(shelf: Shelf) -> None:
    llm = Listening(prompt_form="rag", max_new_tokens=8)
    for way in WAYS:
        llm._texts.clear()
        await answer(llm, shelf, "refine", way)
        first, *refining = llm._texts
        assert first.startswith(f"{llm.tokenizer.bos_token}{RAG_PREFIX}Title: Bhutan")
        assert [text.count("Original Answer:") for text in refining] == [1, 1]


@pytest.mark.parametrize("streaming", [False, True])
def test_one_changed_line(hits: list[NodeWithScore], make_llm: MakeLLM, streaming: bool) -> None:
    """The pipeline of LlamaIndex's own first example, with our language model."""
    index = VectorStoreIndex([hit.node for hit in hits], embed_model=MockEmbedding(embed_dim=4))
    llm = make_llm(prompt_form="rag")
    engine = index.as_query_engine(llm=llm, similarity_top_k=3, streaming=streaming)
    assert str(engine.query(QUESTION)) == "Thimphu"
    chat_engine = index.as_chat_engine(chat_mode="condense_plus_context", llm=llm, similarity_top_k=3)
    assert chat_engine.chat("What is the capital of Peru?").response == "Lima"
    assert llm.tracking_counts == {"found": 6, "missing": 0, "in_question": 0, "no_passages": 0}
