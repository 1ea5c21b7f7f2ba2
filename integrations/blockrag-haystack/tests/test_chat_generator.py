"""The generator on the demo model: answers, reuse, streaming, async, tools, serialisation, errors."""

import asyncio
import copy
import pickle
import threading
from contextlib import contextmanager

import pytest
import torch
from haystack import Document, Pipeline
from haystack.components.builders import ChatPromptBuilder
from haystack.components.generators.utils import print_streaming_chunk
from haystack.dataclasses import ChatMessage
from transformers import AutoModelForCausalLM, AutoTokenizer

from blockrag.demo import checkpoint_path, load_questions
from blockrag.errors import UnsafeStoreError
from blockrag.model.config import ModelConfig
from blockrag.model.shared import shared_model
from blockrag.prompt.chat import segment_chat
from blockrag.prompt.message import Message
from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator

QUESTION = [ChatMessage.from_user("What is the capital of Bhutan?")]
BHUTAN = [Document(id="bt", content="The capital of Bhutan is Thimphu.", meta={"title": "Bhutan"})]
LONG = {"max_tokens": 400, "ignore_eos": True}


@pytest.fixture
def generator(model_arguments):
    return BlockRAGChatGenerator(**model_arguments, generation_kwargs={"max_tokens": 24})


def _cached(result):
    return result["replies"][0].meta["usage"]["prompt_tokens_details"]["cached_tokens"]


@contextmanager
def _forwards_counted(model_arguments):
    """How often the model ran, as a list of one number."""
    count = [0]

    def note(*_):
        count[0] += 1

    model = shared_model(ModelConfig(**model_arguments))
    hook = model.model.register_forward_hook(note)
    try:
        yield count
    finally:
        hook.remove()


# -- answers ----------------------------------------------------------------------------------------------------------


def test_it_answers_from_the_documents_and_reuses_them(generator):
    first = generator.run(QUESTION, documents=BHUTAN)
    (reply,) = first["replies"]
    assert reply.text == "Thimphu"
    assert reply.meta == {
        "model": "demo",
        "index": 0,
        "finish_reason": "stop",
        "usage": reply.meta["usage"],
        "document_ids": ["bt"],
    }
    usage = reply.meta["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert _cached(first) == 0
    second = generator.run(QUESTION, documents=BHUTAN)
    assert second["replies"][0].text == "Thimphu"
    model = generator._model.load()
    prompt = model.template.segment(model.tokenizer, passages=[], question="?")
    passage = model.template.passage_block(
        model.tokenizer, generator._request(QUESTION, BHUTAN, None, None).messages[0].passages[0]
    )
    assert _cached(second) == len(prompt.blocks[0]) + len(passage)


def test_documents_are_reused_in_any_order_and_company(generator, corpus):
    generator.run(QUESTION, documents=corpus[:4])
    result = generator.run(QUESTION, documents=[corpus[3], BHUTAN[0], corpus[1]])
    assert result["replies"][0].text == "Thimphu"
    assert result["replies"][0].meta["document_ids"] == [corpus[3].id, "bt", corpus[1].id]
    usage = result["replies"][0].meta["usage"]
    assert 0 < _cached(result) < usage["prompt_tokens"]


def test_a_conversation_goes_on(generator):
    messages = [*QUESTION, ChatMessage.from_assistant("Thimphu"), ChatMessage.from_user("What is its currency?")]
    assert generator.run(messages, documents=BHUTAN)["replies"][0].text
    assert generator.run([], documents=BHUTAN) == {"replies": []}
    assert generator.run(QUESTION, documents=[])["replies"][0].meta["document_ids"] == []
    greeted = [ChatMessage.from_assistant("Hello! How can I help?"), *QUESTION]
    assert generator.run(greeted, documents=BHUTAN)["replies"][0].meta["document_ids"] == ["bt"]


async def test_a_question_may_be_a_string(generator):
    """As for the chat generators of Haystack 3."""
    assert generator.run(QUESTION[0].text, documents=BHUTAN)["replies"][0].text == "Thimphu"
    assert (await generator.run_async(QUESTION[0].text, documents=BHUTAN))["replies"][0].text == "Thimphu"


def test_without_documents_it_is_a_chat_generator(generator):
    result = generator.run(QUESTION)
    model = generator._model.load()
    plain = segment_chat(model.template, model.tokenizer, [Message("user", (QUESTION[0].text,))], whole=True)
    assert result["replies"][0].meta["usage"]["prompt_tokens"] == plain.num_tokens


def test_generation_kwargs(generator):
    result = generator.run(QUESTION, generation_kwargs={"max_completion_tokens": 1, "temperature": None})
    assert result["replies"][0].meta["finish_reason"] == "length"
    assert result["replies"][0].meta["usage"]["completion_tokens"] == 1
    stopped = generator.run(QUESTION, documents=BHUTAN, generation_kwargs={"stop": "ph"})
    assert stopped["replies"][0].text == "Thim"


def test_full_attention_gives_what_the_plain_prompt_gives(model_arguments, corpus):
    """Documents on the port, documents in the text, and transformers alone on the text: one answer."""
    documents = corpus[:3]
    generator = BlockRAGChatGenerator(
        **model_arguments,
        attention="full",
        prompt_form="chat",
        generation_kwargs={"max_tokens": 16, "ignore_eos": True},
    )
    text = "\n\n".join([*(document.content for document in documents), QUESTION[0].text])
    plain = generator.run([ChatMessage.from_user(text)])["replies"][0]
    on_port = generator.run(QUESTION, documents=documents)["replies"][0]
    in_text = generator.run([ChatMessage.from_user(text)], documents=documents)["replies"][0]
    assert on_port.text == in_text.text == plain.text
    assert on_port.meta["usage"] == in_text.meta["usage"] == plain.meta["usage"]

    model = generator._model.load()
    prompt = segment_chat(model.template, model.tokenizer, [Message("user", (text,))], whole=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_path())
    alone = AutoModelForCausalLM.from_pretrained(checkpoint_path(), dtype=torch.float32)
    alone.generation_config.eos_token_id = None
    ids = torch.tensor([prompt.token_ids])
    said = alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip() == plain.text
    assert len(plain.text) > 16


def test_a_prompt_builders_documents_become_blocks_where_they_stand(generator, corpus):
    """The pipeline of Haystack's own tutorial, with one connection more."""
    template = [
        ChatMessage.from_user(
            "Given these documents, answer the question.\nDocuments:\n{% for doc in documents %}{{ doc.content }}\n"
            "{% endfor %}\nQuestion: {{ question }}\nAnswer:"
        )
    ]
    builder = ChatPromptBuilder(template=template, required_variables="*")
    (prompt,) = builder.run(documents=corpus[:3], question="Why?")["prompt"]
    first = generator.run([prompt], documents=corpus[:3])
    second = generator.run([prompt], documents=corpus[:3])
    assert first["replies"][0].text == second["replies"][0].text
    usage = second["replies"][0].meta["usage"]
    assert _cached(second) > usage["prompt_tokens"] / 2
    plain = generator.run([prompt])["replies"][0].meta["usage"]
    model = generator._model.load()
    opened = model.tokenizer(model.template.block_attention_prefix, add_special_tokens=False)["input_ids"]
    assert plain["prompt_tokens"] == usage["prompt_tokens"] - len(opened)  # only blocks are told that blocks follow


# -- streaming --------------------------------------------------------------------------------------------------------


def _check_chunks(chunks, reply):
    assert "".join(chunk.content for chunk in chunks) == reply.text
    assert [chunk.start for chunk in chunks] == [True] + [False] * (len(chunks) - 1)
    assert {chunk.index for chunk in chunks} == {0}
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reply.meta["finish_reason"]]
    assert chunks[0].component_info.type.endswith("BlockRAGChatGenerator")
    assert chunks[-1].meta["usage"] == reply.meta["usage"]
    assert reply.meta["completion_start_time"] == chunks[0].meta["received_at"]


@pytest.mark.parametrize("documents", [None, BHUTAN])
def test_streaming(generator, documents):
    chunks = []
    (reply,) = generator.run(QUESTION, documents=documents, streaming_callback=chunks.append)["replies"]
    assert len(chunks) > 2
    _check_chunks(chunks, reply)
    assert generator.run(QUESTION, documents=documents)["replies"][0].text == reply.text


async def test_streaming_to_a_coroutine(generator):
    chunks = []

    async def callback(chunk):
        await asyncio.sleep(0)
        chunks.append(chunk)

    result = await generator.run_async(QUESTION, documents=BHUTAN, streaming_callback=callback)
    assert result["replies"][0].text == "Thimphu"
    _check_chunks(chunks, result["replies"][0])
    with pytest.raises(ValueError, match="cannot be a coroutine"):
        generator.run(QUESTION, streaming_callback=callback)


# -- async ------------------------------------------------------------------------------------------------------------


async def test_concurrent_calls_neither_block_the_loop_nor_mix(generator, corpus):
    by_id = {document.id: document for document in corpus}
    asked = load_questions(held_out=False)[: 16 * 7 : 7]
    assert len({one.passage_id for one in asked}) > 8
    calls = [([ChatMessage.from_user(one.question)], [by_id[one.passage_id]]) for one in asked]
    expected = [generator.run(messages, documents=documents)["replies"][0].text for messages, documents in calls]
    assert len(set(expected)) > 8

    model = generator._model.load()
    held, loop_has_run = threading.Event(), threading.Event()

    def hold_the_model():
        with model._lock.exclusive:
            held.set()
            loop_has_run.wait()

    holder = threading.Thread(target=hold_the_model)
    holder.start()
    held.wait()
    tasks = [asyncio.create_task(generator.run_async(m, documents=d)) for m, d in calls]
    # With the model held, no call can end. That the loop still turns lets them go on; if one blocked it, nothing would.
    for _ in range(100):
        await asyncio.sleep(0)
    assert not any(task.done() for task in tasks)
    loop_has_run.set()
    results = await asyncio.gather(*tasks)
    holder.join()
    assert [result["replies"][0].text for result in results] == expected
    assert [r["replies"][0].meta["document_ids"] for r in results] == [[one.passage_id] for one in asked]


async def test_a_cancelled_call_frees_the_worker(generator, model_arguments):
    started = asyncio.Event()

    async def callback(_):
        started.set()

    await generator.warm_up_async()
    with _forwards_counted(model_arguments) as forwards:
        task = asyncio.create_task(
            generator.run_async(QUESTION, documents=BHUTAN, streaming_callback=callback, generation_kwargs=LONG)
        )
        await started.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await generator.run_async(QUESTION, documents=BHUTAN))["replies"][0].text == "Thimphu"
        assert forwards[0] < LONG["max_tokens"] / 2


async def test_a_callback_that_fails_frees_the_worker(generator, model_arguments):
    async def callback(_):
        raise ConnectionError("the client is gone")

    await generator.warm_up_async()
    with _forwards_counted(model_arguments) as forwards:
        with pytest.raises(ConnectionError):
            await generator.run_async(QUESTION, streaming_callback=callback, generation_kwargs=LONG)
        assert (await generator.run_async(QUESTION, documents=BHUTAN))["replies"][0].text == "Thimphu"
        assert forwards[0] < LONG["max_tokens"] / 2


def test_a_callback_that_fails_frees_the_models_memory(generator):
    def callback(_):
        raise ConnectionError("the client is gone")

    generator.run(QUESTION, documents=BHUTAN)
    memory = generator._model.load().prompt_memory()
    # The exception, as a debugger or a log handler keeps it, must not keep the answer.
    with pytest.raises(ConnectionError) as kept:
        generator.run(QUESTION, documents=BHUTAN, streaming_callback=callback)
    assert kept.value.__traceback__ is not None
    after = generator._model.load().prompt_memory()
    assert (after.kept_bytes, after.spare_bytes) == (memory.kept_bytes, memory.spare_bytes)


# -- configuration ----------------------------------------------------------------------------------------------------


def test_nothing_is_loaded_before_warm_up(model_arguments):
    generator = BlockRAGChatGenerator(**{**model_arguments, "model": "/no/such/model"})
    assert generator.to_dict()["init_parameters"]["model"] == "/no/such/model"
    with pytest.raises(ValueError, match="/no/such/model"):
        generator.warm_up()
    with pytest.raises(ValueError, match="/no/such/model"):
        generator.run(QUESTION)


def test_yaml(model_arguments):
    pipeline = Pipeline()
    pipeline.add_component(
        "llm",
        BlockRAGChatGenerator(
            **model_arguments,
            prompt_form="chat",
            precision="int8",
            generation_kwargs={"max_tokens": 3},
            streaming_callback=print_streaming_chunk,
        ),
    )
    again = Pipeline.loads(pipeline.dumps())
    assert again.to_dict() == pipeline.to_dict()
    component = again.get_component("llm")
    assert component.streaming_callback is print_streaming_chunk
    assert component.generation_kwargs == {"max_tokens": 3}
    assert component.to_dict()["init_parameters"].items() >= model_arguments.items()


def test_copies_of_a_used_component_share_its_model(generator):
    generator.run(QUESTION, documents=BHUTAN)
    for again in (copy.deepcopy(generator), pickle.loads(pickle.dumps(generator))):  # noqa: S301 - our own bytes
        assert again._model.load() is generator._model.load()
        assert _cached(again.run(QUESTION, documents=BHUTAN)) > 0


async def test_a_store_that_fails_costs_reuse_and_no_answer(generator, caplog):
    generator.warm_up()
    generator._model.load().store.close()
    for reply in (
        generator.run(QUESTION, documents=BHUTAN),
        await generator.run_async(QUESTION, documents=BHUTAN),
    ):
        assert reply["replies"][0].text
    assert "is closed" in caplog.text


async def test_an_unsafe_store_is_a_value_error(generator, monkeypatch):
    def tampered(keys):
        raise UnsafeStoreError("a pickled row")

    generator.warm_up()
    monkeypatch.setattr(generator._model.load().store, "get_many", tampered)
    with pytest.raises(ValueError, match="a pickled row"):
        generator.run(QUESTION, documents=BHUTAN)
    with pytest.raises(ValueError, match="a pickled row"):
        await generator.run_async(QUESTION, documents=BHUTAN)


def test_a_store_that_cannot_be_opened_is_a_value_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"'demo' cannot be used: cannot open the store"):
        BlockRAGChatGenerator(store=f"disk://{tmp_path}/file/store").warm_up()


def test_errors_say_what_to_do(generator):
    with pytest.raises(ValueError, match="no option 'max_tokns'; known are"):
        generator.run(QUESTION, generation_kwargs={"max_tokns": 3})
    with pytest.raises(ValueError, match="temperature=-1"):
        BlockRAGChatGenerator(generation_kwargs={"temperature": -1}).warm_up()
    with pytest.raises(ValueError, match="'x' has no text content"):
        generator.run(QUESTION, documents=[Document(id="x")])
    with pytest.raises(ValueError, match="2048"):
        generator.run(QUESTION, documents=[Document(content="word " * 3000)])
    with pytest.raises(ValueError, match="prompt_form='blocks'"):
        BlockRAGChatGenerator(prompt_form="blocks")
    with pytest.raises(ValueError, match="last message is assistant"):
        BlockRAGChatGenerator(prompt_form="rag").run([*QUESTION, ChatMessage.from_assistant("Thimphu")], BHUTAN)


async def test_errors_of_the_worker_arrive(generator):
    with pytest.raises(ValueError, match="2048"):
        await generator.run_async(QUESTION, documents=[Document(content="word " * 3000)])
    assert await generator.run_async([]) == {"replies": []}
