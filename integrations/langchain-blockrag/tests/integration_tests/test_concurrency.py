"""Many questions on one event loop: it never waits for the model, and answers are not mixed up."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest
from blockrag.demo import load_corpus, load_questions
from langchain_core.documents import Document

from langchain_blockrag import ChatBlockRAG, documents_to_blocks
from tests.conftest import QUESTION


def asked(documents: list[Document], question: str = QUESTION) -> list[Any]:
    return [documents_to_blocks(documents, question)]


async def streamed(llm: ChatBlockRAG, messages: list[Any], **per_call: Any) -> str:
    return "".join([chunk.text async for chunk in llm.astream(messages, **per_call)])


async def test_sixteen_at_once_answer_as_one_after_the_other(llm: ChatBlockRAG) -> None:
    passages = {passage.id: passage for passage in load_corpus()}
    prompts = []
    for question in load_questions()[::17][:16]:
        passage = passages[question.passage_id]
        document = Document(page_content=passage.text, metadata={"title": passage.title})
        prompts.append(asked([document], question.question))
    alone = [llm.invoke(prompt).text for prompt in prompts]
    assert len(set(alone)) > 12
    together = await asyncio.gather(
        *(llm.ainvoke(prompt) for prompt in prompts), *(streamed(llm, prompt) for prompt in prompts)
    )
    assert [answer.text for answer in together[:16]] == alone
    assert list(together[16:]) == alone


@pytest.mark.parametrize("method", ["ainvoke", "astream"])
async def test_the_event_loop_runs_while_the_model_does(
    llm: ChatBlockRAG, documents: list[Document], method: str
) -> None:
    ticks, waited = 0, []
    ticked = threading.Event()

    def wait_for_the_loop(*_: Any) -> None:
        # Each forward waits for the loop: were the loop waiting for the forward, both would wait in vain.
        ticked.clear()
        waited.append(ticked.wait(20))

    async def tick() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            ticked.set()
            await asyncio.sleep(0.001)

    model = llm.block_model()
    handle = model.model.register_forward_hook(wait_for_the_loop)
    ticking = asyncio.create_task(tick())
    try:
        prompts = [asked(documents), asked(documents[::-1])]
        if method == "ainvoke":
            answers = [answer.text for answer in await asyncio.gather(*(llm.ainvoke(one) for one in prompts))]
        else:
            answers = list(await asyncio.gather(*(streamed(llm, one) for one in prompts)))
    finally:
        ticking.cancel()
        handle.remove()
    assert answers == ["Thimphu", "Thimphu"]
    assert all(waited)
    assert ticks >= len(waited) > 4


@pytest.mark.parametrize("close", [True, False], ids=["closed", "dropped"])
async def test_an_abandoned_stream_frees_the_worker(llm: ChatBlockRAG, documents: list[Document], close: bool) -> None:
    forwards: list[None] = []
    model = llm.block_model()
    handle = model.model.register_forward_hook(lambda *_: forwards.append(None))
    try:
        stream = llm.astream(asked(documents), max_tokens=1500, ignore_eos=True)
        async for _ in stream:
            break
        if close:
            await stream.aclose()  # type: ignore[attr-defined]
        del stream
        await asyncio.sleep(0)
        assert (await llm.ainvoke(asked(documents))).text == "Thimphu"
    finally:
        handle.remove()
    assert len(forwards) < 750, "it went on to its end"
    assert model.prompt_memory().kept_prompts == 1


async def test_a_cancelled_request_frees_the_worker(llm: ChatBlockRAG, documents: list[Document]) -> None:
    forwards = 0
    running = asyncio.Event()
    loop = asyncio.get_running_loop()

    def count(*_: Any) -> None:
        nonlocal forwards
        forwards += 1
        loop.call_soon_threadsafe(running.set)

    model = llm.block_model()
    handle = model.model.register_forward_hook(count)
    try:
        request = asyncio.create_task(llm.ainvoke(asked(documents), max_tokens=1500, ignore_eos=True))
        await running.wait()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        assert (await llm.ainvoke(asked(documents))).text == "Thimphu"
    finally:
        handle.remove()
    assert forwards < 750, "it went on to its end"
    assert model.prompt_memory().kept_prompts == 1


async def test_events_are_told_token_by_token(llm: ChatBlockRAG, documents: list[Document]) -> None:
    said = [
        event["data"]["chunk"].text
        async for event in llm.astream_events(asked(documents), version="v2")
        if event["event"] == "on_chat_model_stream"
    ]
    assert "".join(said) == "Thimphu"
    assert len([piece for piece in said if piece]) > 1


def test_batches_run_in_threads(llm: ChatBlockRAG, documents: list[Document]) -> None:
    prompts = [asked(documents, f"What is the capital of {d.metadata['title']}?") for d in documents] * 4
    assert [answer.text for answer in llm.batch(prompts)] == ["Thimphu", "Nairobi", "Lima"] * 4
