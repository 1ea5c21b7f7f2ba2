"""The language model's endpoints: what they answer, what they report, and that they stay out of the way."""

from __future__ import annotations

import asyncio
import copy
import gc
import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from conftest import QUESTION, Ear, nodes_of, prompts_in_progress
from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.callbacks import CallbackManager, CBEventType, LlamaDebugHandler, TokenCountingHandler
from llama_index.core.instrumentation.events.exception import ExceptionEvent
from llama_index.core.instrumentation.events.llm import (
    LLMChatEndEvent,
    LLMChatInProgressEvent,
    LLMChatStartEvent,
    LLMCompletionEndEvent,
    LLMCompletionStartEvent,
)
from llama_index.core.llms import ChatMessage, MessageRole, TextBlock
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.llms.blockrag import BlockCacheEvent, BlockRAGLLM, PassageBlock
from llama_index.llms.blockrag.base import _without_credentials

from blockrag import BlockModel, NotBlockFineTunedWarning
from blockrag.model.config import ModelConfig
from blockrag.model.shared import shared_model

MakeLLM = Callable[..., BlockRAGLLM]

PASSAGES = [PassageBlock.from_node(hit) for hit in nodes_of()]
ASKED = [ChatMessage(role="user", blocks=[*PASSAGES, TextBlock(text=QUESTION)])]


def asked(country: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", blocks=[*PASSAGES, TextBlock(text=f"What is the capital of {country}?")])]


@pytest.fixture
def rag(make_llm: MakeLLM) -> BlockRAGLLM:
    return make_llm(prompt_form="rag")


# -- answers --------------------------------------------------------------------------------------------------------


async def test_all_endpoints_say_the_same(llm: BlockRAGLLM) -> None:
    prompt = "The river runs from the lake"
    # Sampled, so that there are several pieces to stream, whatever this model finds most likely here.
    options: dict[str, Any] = {"ignore_eos": True, "temperature": 2.0, "seed": 7}
    chat = [ChatMessage(role="user", content=prompt)]
    expected = llm.chat(chat, **options).message.content
    assert expected
    assert (await llm.achat(chat, **options)).message.content == expected
    assert llm.complete(prompt, **options).text == expected
    assert llm.complete(prompt, formatted=True, **options).text == expected
    assert (await llm.acomplete(prompt, **options)).text == expected
    chats = [list(llm.stream_chat(chat, **options))]
    chats.append([piece async for piece in await llm.astream_chat(chat, **options)])
    completions = [list(llm.stream_complete(prompt, **options))]
    completions.append([piece async for piece in await llm.astream_complete(prompt, **options)])
    streams = [([piece.message.content for piece in pieces], [piece.delta for piece in pieces]) for pieces in chats]
    streams += [([piece.text for piece in pieces], [piece.delta for piece in pieces]) for pieces in completions]
    for texts, deltas in streams:
        assert len(texts) > 2
        assert texts == ["".join(deltas[: count + 1]) for count in range(len(deltas))]
        assert texts[-1] == expected


@pytest.mark.parametrize("text", ["The river", "Which? ", "What is the capital of Peru?"])
def test_answers_carry_no_white_space_at_their_ends(text: str, llm: BlockRAGLLM) -> None:
    answer = llm.complete(text, max_tokens=6, ignore_eos=True).text
    assert (
        answer == answer.strip() == "".join(r.delta for r in llm.stream_complete(text, max_tokens=6, ignore_eos=True))
    )


async def test_the_rag_form_answers_right(rag: BlockRAGLLM, make_llm: MakeLLM) -> None:
    assert make_llm(prompt_form="rag", attention="full").chat(ASKED).message.content == "Thimphu"
    assert rag.chat(ASKED).message.content == "Thimphu"
    assert (await rag.achat(asked("Kenya"))).message.content == "Nairobi"
    assert "".join(r.delta for r in rag.stream_chat(asked("Peru"))) == "Lima"


def test_usage_counts_what_was_reused(rag: BlockRAGLLM) -> None:
    first, second = rag.chat(ASKED), rag.chat(ASKED)
    prompt = rag.block_model.template.segment(
        rag.tokenizer, passages=[block.excerpt().passage for block in PASSAGES], question=QUESTION
    )
    local = sum(len(block) for block in prompt.local_blocks)
    for response, cached in ((first, 0), (second, local)):
        usage = response.raw["usage"]
        assert usage == response.additional_kwargs
        assert usage["prompt_tokens"] == prompt.num_tokens
        assert usage["prompt_tokens_details"] == {"cached_tokens": cached}
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert response.raw["finish_reason"] == "stop"
    *pieces, last = rag.stream_chat(ASKED)
    assert last.raw["usage"] == second.raw["usage"]
    assert all(piece.raw is None for piece in pieces)
    assert rag.complete("x").additional_kwargs["completion_tokens"] > 0
    assert rag.count_prompt_tokens(ASKED) == prompt.num_tokens


async def test_options_of_one_call(llm: BlockRAGLLM) -> None:
    def tokens(**options: Any) -> int:
        return llm.complete("The river", ignore_eos=True, **options).raw["usage"]["completion_tokens"]

    assert (tokens(), tokens(max_tokens=3), tokens(max_new_tokens=2), tokens(max_tokens=None)) == (8, 3, 2, 8)
    whole = llm.complete("The river", ignore_eos=True).text
    assert llm.complete("The river", ignore_eos=True, stop=whole[3:5]).text == whole[: whole.index(whole[3:5])].strip()
    sampled = {llm.complete("The", temperature=2.0, seed=seed, ignore_eos=True).text for seed in (1, 1, 2, 3)}
    assert len(sampled) == 3
    assert llm.complete("The river", max_tokens=3, ignore_eos=True).raw["finish_reason"] == "length"


def test_options_of_the_fields(make_llm: MakeLLM) -> None:
    llm = make_llm(temperature=2.0, seed=7, stop=["e"], max_new_tokens=5)
    first, again = (llm.complete("The river").text for _ in range(2))
    assert first == again
    assert "e" not in first


def test_metadata_is_the_models(llm: BlockRAGLLM, make_llm: MakeLLM) -> None:
    assert llm.metadata.context_window == llm.block_model.context_window == 2048
    assert (llm.metadata.num_output, llm.metadata.is_chat_model) == (8, True)
    assert llm.metadata.is_function_calling_model is False
    assert llm.metadata.model_name == "demo"
    assert make_llm(context_window=512).metadata.context_window == 512
    assert llm.tokenizer is llm.block_model.tokenizer


# -- events and callbacks -------------------------------------------------------------------------------------------


async def test_instrumentation(llm: BlockRAGLLM, ear: Ear) -> None:
    llm.chat(ASKED)
    first = ear.of(BlockCacheEvent)[0]
    assert (first.blocks_reused, first.passages_found, first.passages_missed) == (0, 3, 0)
    assert first.tokens_computed > first.tokens_reused == 0
    assert first.ttft_s > 0

    async def achat() -> bool:
        await llm.achat(ASKED)
        return False

    async def astream() -> bool:
        return bool([piece async for piece in await llm.astream_chat(ASKED)])

    for way in (lambda: bool(llm.chat(ASKED)) and False, lambda: bool(list(llm.stream_chat(ASKED))), achat, astream):
        ear.events.clear()
        streams = way()
        if asyncio.iscoroutine(streams):
            streams = await streams
        (start,), (end,), (cache,) = (ear.of(k) for k in (LLMChatStartEvent, LLMChatEndEvent, BlockCacheEvent))
        assert start.messages[0].blocks[0] is PASSAGES[0]
        assert end.response.message.content
        assert bool(ear.of(LLMChatInProgressEvent)) is streams
        assert (cache.blocks_reused, cache.blocks_computed) == (6, 1)
        assert cache.span_id == start.span_id
        assert cache.model_dump()["class_name"] == "BlockCacheEvent"
    ear.events.clear()
    llm.complete("x")
    await llm.acomplete("x")
    assert len(ear.of(LLMCompletionStartEvent)) == len(ear.of(LLMCompletionEndEvent)) == 2
    # A completion is one call, not a completion and a chat.
    assert not ear.of(LLMChatStartEvent)


def test_callbacks(make_llm: MakeLLM) -> None:
    debug, counter = LlamaDebugHandler(print_trace_on_end=False), TokenCountingHandler(tokenizer=str.split)
    llm = make_llm(callback_manager=CallbackManager([debug, counter]))
    usage = llm.chat(ASKED).raw["usage"]
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 1
    assert counter.prompt_llm_token_count == usage["prompt_tokens"]
    assert counter.completion_llm_token_count == usage["completion_tokens"]
    list(llm.stream_chat(ASKED))
    assert len(debug.get_event_pairs(CBEventType.LLM)) == 2


# -- the loop never blocks, and nobody waits for answers nobody reads -------------------------------------------------


async def test_sixteen_at_once_while_the_loop_goes_on(rag: BlockRAGLLM) -> None:
    countries = {"Bhutan": "Thimphu", "Peru": "Lima", "Kenya": "Nairobi"}
    questions = [list(countries)[number % 3] for number in range(16)]
    loop_thread, ticks = threading.get_ident(), 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    async def streamed(country: str) -> str:
        return "".join([r.delta async for r in await rag.astream_chat(asked(country))])

    async def whole(country: str) -> str:
        return (await rag.achat(asked(country))).message.content or ""

    ticking = asyncio.create_task(tick())
    answers = await asyncio.gather(*[(streamed if i % 2 else whole)(name) for i, name in enumerate(questions)])
    ticking.cancel()
    assert answers == [countries[name] for name in questions]
    # Each answer takes several steps of the model, none of them on this thread.
    assert ticks > 100
    assert threading.get_ident() == loop_thread


async def test_an_abandoned_stream_frees_the_worker(llm: BlockRAGLLM, ear: Ear) -> None:
    stream = await llm.astream_chat(ASKED, max_tokens=1500, ignore_eos=True)
    async for piece in stream:
        if len(piece.message.content or "") > 3:
            break
    assert prompts_in_progress() == 1
    await stream.aclose()
    assert (await llm.achat(ASKED)).message.content
    assert prompts_in_progress() == 0
    # As every language model of LlamaIndex: an answer that was not read to its end is an exception to instrumentation.
    assert len(ear.of(ExceptionEvent)) == 1
    assert len(ear.of(LLMChatEndEvent)) == len(ear.of(BlockCacheEvent)) == 1


async def test_a_cancelled_request_frees_the_worker(llm: BlockRAGLLM) -> None:
    begun = asyncio.create_task(llm.achat(ASKED, max_tokens=1500, ignore_eos=True))
    while prompts_in_progress() == 0:
        await asyncio.sleep(0.01)
    begun.cancel()
    with pytest.raises(asyncio.CancelledError):
        await begun
    assert (await llm.achat(ASKED)).message.content
    assert prompts_in_progress() == 0


async def test_a_stream_that_is_only_dropped_frees_the_worker(llm: BlockRAGLLM) -> None:
    stream = await llm.astream_chat(ASKED, max_tokens=1500, ignore_eos=True)
    await anext(stream)
    del stream
    gc.collect()
    await asyncio.sleep(0)
    assert (await llm.achat(ASKED)).message.content
    assert prompts_in_progress() == 0


def test_a_closed_stream_ends_the_answer(llm: BlockRAGLLM) -> None:
    stream = llm.stream_chat(ASKED, max_tokens=1500, ignore_eos=True)
    next(stream)
    assert prompts_in_progress() == 1
    stream.close()
    assert prompts_in_progress() == 0


# -- plain configuration --------------------------------------------------------------------------------------------


def test_it_is_a_language_model_of_llama_index() -> None:
    names = [base.__name__ for base in BlockRAGLLM.__mro__]
    assert BaseLLM.__name__ in names
    assert FunctionCallingLLM.__name__ in names
    assert BlockRAGLLM.class_name() == "BlockRAGLLM"


def test_copies_share_the_model(llm: BlockRAGLLM) -> None:
    text = llm.complete("The river").text
    for again in (
        pickle.loads(pickle.dumps(llm)),
        copy.deepcopy(llm),
        BlockRAGLLM.from_dict(llm.to_dict()),
        BlockRAGLLM.from_json(llm.to_json()),
    ):
        assert again.shared_config == llm.shared_config
        assert hash(again.shared_config) == hash(llm.shared_config)
        assert again.block_model is llm.block_model
        assert again.complete("The river").text == text
        assert again.tracking_counts["no_passages"] == 1


def test_an_unloaded_model_travels_to_another_process(tmp_path: Any, llm: BlockRAGLLM) -> None:
    (tmp_path / "llm").write_bytes(pickle.dumps(llm))
    script = "import pickle, sys; print(pickle.load(open(sys.argv[1], 'rb')).complete('The river').text)"
    run = subprocess.run([sys.executable, "-c", script, tmp_path / "llm"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == llm.complete("The river").text


def test_from_model_uses_a_loaded_model(llm: BlockRAGLLM) -> None:
    model = BlockModel.from_pretrained("demo")
    given = BlockRAGLLM.from_model(model, max_new_tokens=8)
    assert given.block_model is model
    assert copy.deepcopy(given).block_model is model
    assert given.complete("The river").text == llm.complete("The river").text


def test_from_model_takes_nothing_that_describes_the_model(llm: BlockRAGLLM) -> None:
    with pytest.raises(ValueError, match="attention, namespace cannot be given beside a model"):
        BlockRAGLLM.from_model(llm.block_model, namespace="x", attention="full", seed=1)


def test_from_model_keeps_the_configuration_of_a_shared_model() -> None:
    model = shared_model(ModelConfig(device="cpu", namespace="tenant", precision="float32"))
    given = BlockRAGLLM.from_model(model)
    assert given.block_model is model
    assert (given.device, given.namespace, given.precision) == ("cpu", "tenant", "float32")


def test_what_is_told_of_it_holds_no_secrets() -> None:
    llm = BlockRAGLLM(store_url="s3://key:secret@host/bucket?a=b")
    assert "secret" not in json.dumps(llm.to_dict())
    assert llm.to_dict()["store_url"] == "s3://host/bucket?a=b"
    for local in ("memory://?max_bytes=2GiB", "disk://blocks@v2/x?max_bytes=2GiB", "disk://[x"):
        assert _without_credentials(local) == local


@pytest.mark.parametrize("name", ["BlockRAGLLM", "PassageBlock", "track_passages"])
def test_names_are_there_when_they_are_asked_for(name: str) -> None:
    import llama_index.llms.blockrag as package

    assert name in dir(package)
    assert getattr(package, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        package.nothing  # noqa: B018


def test_importing_the_package_is_light() -> None:
    script = (
        "import sys, llama_index.llms.blockrag; "
        "print(sorted({'torch', 'transformers', 'faiss', 'numpy', 'sentence_transformers'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"max_token": 5}, "max_token"),
        ({"temperature": -1}, "temperature"),
        ({"prompt_form": "xml"}, "prompt_form"),
        ({"attention": "half"}, "attention"),
        ({"precision": "int2"}, "precision"),
    ],
)
def test_fields_that_make_no_sense(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        BlockRAGLLM(**fields)


async def test_options_that_make_no_sense(llm: BlockRAGLLM) -> None:
    with pytest.raises(ValueError, match="there is no option 'max_toknes'; known are"):
        llm.chat(ASKED, max_toknes=3)
    with pytest.raises(ValueError, match="temperature=-1"):
        await llm.achat(ASKED, temperature=-1)
    # Known when the call is made, not when the first piece is read.
    with pytest.raises(ValueError, match="no option 'best_of'"):
        llm.stream_chat(ASKED, best_of=2)


async def test_a_prompt_longer_than_the_window(llm: BlockRAGLLM) -> None:
    with pytest.raises(ValueError, match="2048"):
        llm.complete("river " * 3000)
    with pytest.raises(ValueError, match="2048"):
        async for _ in await llm.astream_complete("river " * 3000):
            pass


def test_a_model_there_is_not(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match=str(tmp_path / "nothing")):
        BlockRAGLLM(model_name=str(tmp_path / "nothing")).complete("x")


def test_a_closed_store_costs_reuse_and_no_answer(
    llm: BlockRAGLLM, tmp_path: Any, caplog: pytest.LogCaptureFixture
) -> None:
    on_disk = BlockRAGLLM(store_url=f"disk://{tmp_path}/store", max_new_tokens=4)
    assert on_disk.chat(ASKED).message.content
    on_disk.block_model.store.close()
    fresh = [ChatMessage(role="user", blocks=[PassageBlock(text="The river runs."), TextBlock(text="Where?")])]
    assert on_disk.chat(fresh).message.content
    assert "closed" in caplog.text


def test_a_model_that_is_not_fine_tuned_says_so(tmp_path: Any, llm: BlockRAGLLM) -> None:
    llm.block_model.model.save_pretrained(tmp_path)
    llm.tokenizer.save_pretrained(tmp_path)
    with pytest.warns(NotBlockFineTunedWarning):
        shared_model(BlockRAGLLM(model_name=str(tmp_path)).shared_config)
    # No warning, which would be an error here.
    for fields in ({"block_fine_tuned": True}, {"attention": "full"}):
        assert BlockRAGLLM(model_name=str(tmp_path), **fields).complete("The river").raw["usage"]["prompt_tokens"] > 0


def test_no_tool_was_called(llm: BlockRAGLLM) -> None:
    response = llm.complete("x")
    message = ChatMessage(role=MessageRole.ASSISTANT, content=response.text)
    chat = type(llm.chat(ASKED))(message=message)
    assert llm.get_tool_calls_from_response(chat, error_on_no_tool_call=False) == []
    with pytest.raises(ValueError, match="called no tool"):
        llm.get_tool_calls_from_response(chat)
