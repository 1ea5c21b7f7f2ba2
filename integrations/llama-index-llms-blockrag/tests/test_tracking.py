"""Tracking: on by default, off where it is told to be, gone when the query is, and never somebody else's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import llama_index.core.instrumentation as instrument
import pytest
from conftest import QUESTION, Ear, Shelf, nodes_of
from llama_index.core.base.response.schema import StreamingResponse
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.prompts import PromptTemplate
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import BaseSynthesizer, get_response_synthesizer
from llama_index.core.schema import NodeWithScore, TextNode
from llama_index.llms.blockrag import BlockCacheEvent, BlockRAGLLM, tracking
from llama_index.llms.blockrag.tracking import PassageSpanHandler, Tracked, track_passages

from blockrag.prompt import SegmentedPrompt

MakeLLM = Callable[..., BlockRAGLLM]


def engine(llm: BlockRAGLLM, shelf: Shelf, *, streaming: bool = False) -> RetrieverQueryEngine:
    return RetrieverQueryEngine.from_args(shelf, llm=llm, streaming=streaming)


def handlers() -> list[PassageSpanHandler]:
    return [h for h in instrument.get_dispatcher().span_handlers if isinstance(h, PassageSpanHandler)]


def test_one_handler_however_many_models(make_llm: MakeLLM) -> None:
    for _ in range(3):
        make_llm()
    assert len(handlers()) == 1


def test_no_handler_before_a_model_wants_one() -> None:
    root = instrument.get_dispatcher()
    kept = handlers()
    root.span_handlers = [handler for handler in root.span_handlers if handler not in kept]
    BlockRAGLLM(track_passages=False)
    assert handlers() == []
    with track_passages(True):
        assert len(handlers()) == 1
    BlockRAGLLM()
    assert len(handlers()) == 1


def test_off_per_model(make_llm: MakeLLM, shelf: Shelf, ear: Ear) -> None:
    llm = make_llm(track_passages=False)
    engine(llm, shelf).query(QUESTION)
    assert ear.blocks() == [(0, 1)]
    assert llm.tracking_counts == {"found": 0, "missing": 0, "in_question": 0, "no_passages": 1}
    with track_passages(True):
        engine(llm, shelf).query(QUESTION)
    assert ear.blocks() == [(0, 7)]


async def test_off_in_a_context(llm: BlockRAGLLM, shelf: Shelf, ear: Ear) -> None:
    with track_passages(False):
        engine(llm, shelf).query(QUESTION)
        await engine(llm, shelf).aquery(QUESTION)
        with track_passages(True):
            engine(llm, shelf).query(QUESTION)
    engine(llm, shelf).query(QUESTION)
    assert ear.blocks() == [(0, 1), (0, 1), (0, 7), (6, 1)]


@pytest.mark.parametrize("streaming", [False, True])
async def test_nothing_is_left_behind(streaming: bool, llm: BlockRAGLLM, shelf: Shelf) -> None:
    response = engine(llm, shelf, streaming=streaming).query(QUESTION)
    assert tracking.current(enabled=True) is None
    assert str(response)
    response = await engine(llm, shelf, streaming=streaming).aquery(QUESTION)
    assert tracking.current(enabled=True) is None
    if streaming:
        async for _ in response.async_response_gen():
            assert tracking.current(enabled=True) is None
    assert all(not handler.open_spans and not handler.completed_spans for handler in handlers())


def test_nothing_is_left_behind_by_a_query_that_fails(make_llm: MakeLLM, shelf: Shelf) -> None:
    llm = make_llm()
    template = PromptTemplate("{context_str} " + "river " * 3000)
    synthesizer = get_response_synthesizer(llm=llm, response_mode="simple_summarize", text_qa_template=template)
    with pytest.raises(ValueError):
        synthesizer.synthesize(QUESTION, nodes_of())
    assert tracking.current(enabled=True) is None
    assert all(not handler.open_spans for handler in handlers())


def test_a_stream_read_in_another_thread_keeps_its_passages(llm: BlockRAGLLM, shelf: Shelf, ear: Ear) -> None:
    response = engine(llm, shelf, streaming=True).query(QUESTION)
    pieces: list[str] = []
    reader = threading.Thread(target=lambda: pieces.extend(response.response_gen))
    reader.start()
    reader.join()
    assert "".join(pieces)
    assert ear.of(BlockCacheEvent)[0].passages_found == 3


def test_streams_that_are_read_in_turn_keep_their_own(make_llm: MakeLLM) -> None:
    llm = make_llm(prompt_form="rag")
    capitals = {"Chad": "N'Djamena", "Peru": "Lima", "Kenya": "Nairobi", "Bhutan": "Thimphu"}
    streams = {
        country: engine(llm, Shelf(nodes_of({country: city})), streaming=True)
        .query(f"What is the capital of {country}?")
        .response_gen
        for country, city in capitals.items()
    }
    answers = dict.fromkeys(streams, "")
    while streams:
        for country in list(streams):
            piece = next(streams[country], None)
            if piece is None:
                del streams[country]
            else:
                answers[country] += piece
    assert {country: answers[country] for country in ("Peru", "Kenya", "Bhutan")} == {
        "Peru": "Lima",
        "Kenya": "Nairobi",
        "Bhutan": "Thimphu",
    }
    assert llm.tracking_counts["found"] == 4


async def test_sixteen_queries_at_once_do_not_mix(make_llm: MakeLLM, ear: Ear) -> None:
    llm = make_llm(prompt_form="rag")
    capitals = {"Bhutan": "Thimphu", "Peru": "Lima", "Kenya": "Nairobi"}

    async def ask(number: int) -> tuple[str, str]:
        country = list(capitals)[number % 3]
        # Every request knows one country only, the wrong one for the others.
        own = engine(llm, Shelf(nodes_of({country: capitals[country]})), streaming=number % 2 == 0)
        response = await own.aquery(f"What is the capital of {country}?")
        if number % 2:
            return country, str(response)
        return country, "".join([piece async for piece in response.async_response_gen()])

    answers = await asyncio.gather(*map(ask, range(16)))
    assert [answer for _, answer in answers] == [capitals[country] for country, _ in answers]
    events = ear.of(BlockCacheEvent)
    assert [(event.passages_found, event.passages_missed) for event in events] == [(1, 0)] * 16


def test_split_passages_are_counted_and_prefilled_plainly(make_llm: MakeLLM, ear: Ear) -> None:
    long = " ".join(f"The {word} runs from the lake to the sea." for word in ("river", "road", "wall") * 24)
    hits = nodes_of({"Bhutan": "Thimphu"})
    hits[0].node.text = long
    llm = make_llm(context_window=1400)
    engine(llm, Shelf(hits)).query("Where does the river run?")
    calls = ear.of(BlockCacheEvent)
    assert len(calls) > 1
    assert {(call.blocks_reused, call.blocks_computed, call.passages_found) for call in calls} == {(0, 1, 0)}
    assert llm.tracking_counts["missing"] > 0
    assert llm.tracking_counts["found"] == 0


def test_a_question_that_quotes_a_passage_is_prefilled_plainly(llm: BlockRAGLLM, shelf: Shelf, ear: Ear) -> None:
    quoted = f"Is this true?\n{shelf._hits[0].node.get_content(metadata_mode='llm')}"
    engine(llm, shelf).query(quoted)
    (call,) = ear.of(BlockCacheEvent)
    assert (call.passages_found, call.passages_missed) == (2, 1)
    assert llm.tracking_counts == {"found": 2, "missing": 0, "in_question": 1, "no_passages": 0}


@pytest.mark.parametrize("mode", ["compact", "refine", "tree_summarize", "accumulate"])
def test_passages_that_are_words_of_the_template_cut_nothing_else(mode: str, llm: BlockRAGLLM, shelf: Shelf) -> None:
    labels = [NodeWithScore(node=TextNode(id_=text, text=text)) for text in ("Answer:", "and", "Query:")]
    engine_of = RetrieverQueryEngine.from_args(Shelf([*shelf._hits[:1], *labels]), llm=llm, response_mode=mode)
    prompts: list[SegmentedPrompt] = []
    stream = llm.block_model.stream

    def listening(prompt: SegmentedPrompt, *args: Any, **kwargs: Any) -> Any:
        prompts.append(prompt)
        return stream(prompt, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.block_model, "stream", listening)
        engine_of.query(QUESTION)
    assert all(not block.local for prompt in prompts for block in prompt.blocks if QUESTION in block.text)
    if mode in ("compact", "tree_summarize"):
        (prompt,) = prompts
        assert sum(block.kind == "passage" for block in prompt.blocks) == 4
        assert QUESTION in prompt.blocks[-1].text
    assert llm.tracking_counts["missing"] == 0


def test_no_passages_and_calls_without_retrieval(llm: BlockRAGLLM, ear: Ear) -> None:
    assert str(engine(llm, Shelf([])).query(QUESTION)) == "Empty Response"
    assert ear.of(BlockCacheEvent) == []
    llm.chat([ChatMessage(role="user", content="Hello")])
    assert llm.tracking_counts["no_passages"] == 1


class Given(BaseSynthesizer):
    """A synthesizer that streams what it has, without a generator."""

    def get_response(self, query_str: str, text_chunks: Any, **kwargs: Any) -> Any:
        raise AssertionError("synthesize() is its own")

    async def aget_response(self, query_str: str, text_chunks: Any, **kwargs: Any) -> Any:
        raise AssertionError("synthesize() is its own")

    def synthesize(self, query: Any, nodes: Any, **kwargs: Any) -> StreamingResponse:
        return StreamingResponse(iter(["as ", "given"]), source_nodes=nodes)

    def _get_prompts(self) -> dict[str, Any]:
        return {}

    def _update_prompts(self, prompts: Any) -> None:
        pass


def test_streams_that_are_no_generators_are_left_alone(llm: BlockRAGLLM, shelf: Shelf) -> None:
    response = RetrieverQueryEngine(shelf, response_synthesizer=Given(llm)).query(QUESTION)
    assert "".join(response.response_gen) == "as given"


def test_a_prompt_within_a_prompt_is_known_by_the_outer_one(llm: BlockRAGLLM) -> None:
    told: list[Tracked | None] = []

    def listen(**_: Any) -> str:
        told.append(tracking.current(enabled=True))
        return "x"

    inner = PromptTemplate("{x}", function_mappings={"x": listen})
    outer = PromptTemplate(
        "{context_str} {existing_answer} {y} {x}", function_mappings={"y": lambda **_: llm.predict(inner), "x": listen}
    )
    with tracking.asking(QUESTION):
        llm.predict(outer, context_str="p", existing_answer="a")
        listen()
    assert [(one.pasted, one.refines) for one in told if one] == [(("p",), True), (("p",), True), ((), False)]


def test_other_language_models_get_what_they_always_got(llm: BlockRAGLLM, shelf: Shelf) -> None:
    """The handler is there, and a stock model beside ours answers as before (it repeats its prompt)."""
    untouched = str(RetrieverQueryEngine.from_args(shelf, llm=MockLLM()).query(QUESTION))
    for hit in shelf._hits:
        assert hit.node.get_content(metadata_mode="llm") in untouched
