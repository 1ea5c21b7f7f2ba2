"""The server as its users call it: the openai client, LlamaIndex's OpenAILike, plain HTTP; against the demo model."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import DOCUMENTS, QUESTION, Live, live_server
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import CHATML_CHAT, chatml_tokenizer

from blockrag.codec import read_header
from blockrag.encoders import LexicalEncoder
from blockrag.index import PassageIndex
from blockrag.model.answer import Generation
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.sampling import GenerationOptions
from blockrag.model.usage import GenerationTimings, Usage
from blockrag.passage import Passage
from blockrag.prompt import Message, segment_chat, segment_rag
from blockrag.server.chat import Completion, EdgeStripper

PASSAGES = [Passage(f"d{n}", document["text"], document["title"]) for n, document in enumerate(DOCUMENTS)]
CAPITALS = {"Bhutan": "Thimphu", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo"}


@pytest.fixture(scope="module")
def model() -> BlockModel:
    return BlockModel.from_pretrained("demo")


@pytest.fixture(scope="module")
def live(model: BlockModel) -> Iterator[Live]:
    with PassageIndex(LexicalEncoder()) as index:
        index.add([Passage(f"p{n}", f"The capital of {c} is {t}.", c) for n, (c, t) in enumerate(CAPITALS.items())])
        with live_server(model, index=index, max_queue=64) as running:
            yield running


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return live.client()


def ask(client: openai.OpenAI, *, documents: Any = DOCUMENTS, messages: Any = (QUESTION,), **arguments: Any) -> Any:
    body = {**({"documents": documents} if documents else {}), **arguments.pop("extra_body", {})}
    arguments.setdefault("max_tokens", 24)
    return client.chat.completions.create(model="demo", messages=list(messages), extra_body=body, **arguments)


# -- answers ----------------------------------------------------------------------------------------------------------


def test_an_answer_from_documents_and_the_same_again_from_their_blocks(live: Live, client: openai.OpenAI) -> None:
    documents = [*DOCUMENTS, {"title": "Tellin", "text": "Tellin is a town that only this test knows.", "id": "t"}]
    first = ask(client, documents=documents)
    second = ask(client, documents=documents)
    assert first.choices[0].message.content == second.choices[0].message.content == "Thimphu"
    assert first.choices[0].finish_reason == "stop"
    prompt = segment_rag(
        live.serving.model.template,
        live.serving.model.tokenizer,
        [Message("user", (*[Passage(d["title"], d["text"], d["title"]) for d in documents], QUESTION["content"]))],
    )
    local = sum(len(block) for block in prompt.local_blocks)
    assert second.usage.prompt_tokens == prompt.num_tokens
    assert first.usage.prompt_tokens_details.cached_tokens < local
    assert second.usage.prompt_tokens_details.cached_tokens == local
    assert second.usage.total_tokens == second.usage.prompt_tokens + second.usage.completion_tokens
    assert second.model_extra["blockrag"]["blocks_reused"] == len(prompt.local_blocks)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "Thimphu"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in ask(client, stream=True))


def test_the_events_of_a_stream_are_those_of_the_api(live: Live) -> None:
    body = {"messages": [QUESTION], "documents": DOCUMENTS, "stream": True}
    response = live.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-2])


def test_requests_at_the_same_time_get_the_answers_they_get_alone(live: Live, client: openai.OpenAI) -> None:
    documents = [{"title": c, "text": f"The capital of {c} is {t}."} for c, t in CAPITALS.items()]

    def arguments(number: int) -> dict[str, Any]:
        country = list(CAPITALS)[number % len(CAPITALS)]
        messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
        order = documents[number % 3 :] + documents[: number % 3]
        return {"model": "demo", "messages": messages, "extra_body": {"documents": order}, "max_tokens": 16}

    async def together() -> list[str]:
        async with live.async_client() as everybody:

            async def one(number: int) -> str:
                if number % 2:
                    answer = await everybody.chat.completions.create(**arguments(number))
                    return str(answer.choices[0].message.content)
                stream = await everybody.chat.completions.create(**arguments(number), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*[one(number) for number in range(16)])

    alone = [client.chat.completions.create(**arguments(n)).choices[0].message.content for n in range(16)]
    assert asyncio.run(together()) == alone
    assert set(alone) == set(CAPITALS.values())
    assert live.serving.gate.running == live.serving.gate.waiting == 0


@pytest.mark.parametrize("attention", ["block", "full"])
def test_without_documents_the_prompt_is_the_conversation(
    client: openai.OpenAI, model: BlockModel, attention: Any
) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The river runs"}]
    answer = ask(
        client, documents=None, messages=messages, max_tokens=12, extra_body={"blockrag": {"attention": attention}}
    )
    prompt = segment_chat(
        model.template,
        model.tokenizer,
        [Message("system", ("Be brief.",)), Message("user", ("The river runs",))],
        whole=attention == "full",
    )
    expected = model.generate(prompt, GenerationOptions(max_new_tokens=12), attention=attention)
    assert answer.choices[0].message.content == expected.text
    assert answer.usage.prompt_tokens == prompt.num_tokens


def test_passages_marked_in_messages_are_blocks_where_they_stand(client: openai.OpenAI, model: BlockModel) -> None:
    marked = {
        "type": "text",
        "text": "Onder lies by the sea, as nobody else says.",
        "blockrag": {"passage": True, "title": "Onder"},
    }
    content = [{"type": "text", "text": "Read this:\n"}, marked, {"type": "text", "text": "Where does Onder lie?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": content}]
    first, second = (ask(client, documents=None, messages=messages, max_tokens=8) for _ in range(2))
    passage = Passage("any", marked["text"], "Onder")
    prompt = segment_chat(
        model.template,
        model.tokenizer,
        [Message("system", ("Be brief.",)), Message("user", ("Read this:\n", passage, "Where does Onder lie?"))],
    )
    expected = model.generate(prompt, GenerationOptions(max_new_tokens=8))
    assert first.choices[0].message.content == second.choices[0].message.content == expected.text
    assert second.usage.prompt_tokens_details.cached_tokens == sum(len(block) for block in prompt.local_blocks)


def test_documents_stand_before_the_first_question_of_a_conversation(client: openai.OpenAI, model: BlockModel) -> None:
    messages = [
        QUESTION,
        {"role": "assistant", "content": "Thimphu", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "What is the capital of Kenya?"},
    ]
    answer = ask(client, messages=messages)
    prompt = segment_rag(
        model.template,
        model.tokenizer,
        [
            Message("user", (*PASSAGES, QUESTION["content"])),
            Message("assistant", ("Thimphu",)),
            Message("user", ("What is the capital of Kenya?",)),
        ],
    )
    assert (
        answer.choices[0].message.content == model.generate(prompt, GenerationOptions(max_new_tokens=24)).text.strip()
    )
    assert answer.usage.prompt_tokens == prompt.num_tokens


def test_the_form_can_be_chosen(client: openai.OpenAI, model: BlockModel) -> None:
    chat = ask(client, max_tokens=6, extra_body={"blockrag": {"form": "chat"}})
    prompt = segment_chat(model.template, model.tokenizer, [Message("user", (*PASSAGES, QUESTION["content"]))])
    assert chat.usage.prompt_tokens == prompt.num_tokens
    assert chat.choices[0].message.content == model.generate(prompt, GenerationOptions(max_new_tokens=6)).text


def test_sampling_is_as_the_request_says(client: openai.OpenAI) -> None:
    warm: dict[str, Any] = {"documents": None, "temperature": 1.5, "top_p": 0.9, "max_tokens": 12}
    same = [ask(client, **warm, seed=7, extra_body={"top_k": 40}).choices[0].message.content for _ in range(2)]
    others = {ask(client, **warm, seed=seed).choices[0].message.content for seed in range(8)}
    assert same[0] == same[1]
    assert len(others) > 1


def test_an_answer_ends_at_its_limit_or_at_a_stop_string(live: Live, client: openai.OpenAI) -> None:
    limited = ask(client, max_tokens=2)
    assert limited.choices[0].finish_reason == "length"
    assert limited.usage.completion_tokens == 2
    newer = ask(client, max_tokens=50, max_completion_tokens=1)
    assert newer.usage.completion_tokens == 1
    for stop in ("imp", ["nothing", "imp"]):
        stopped = ask(client, stop=stop)
        assert stopped.choices[0].message.content == "Th"
        assert stopped.choices[0].finish_reason == "stop"
    body = {"messages": [QUESTION], "documents": DOCUMENTS, "stop": None, "ignore_eos": True}
    assert live.http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 256


def test_passages_are_searched_for_where_a_request_asks_for_it(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "What is the capital of Peru?"}]
    answer = ask(client, documents=None, messages=messages, extra_body={"blockrag": {"retrieve": {"top_k": 2}}})
    assert answer.choices[0].message.content == "Lima"
    sources = answer.model_extra["blockrag"]["sources"]
    assert len(sources) == 2
    assert sources[0]["title"] == "Peru"
    assert sources[0]["score"] >= sources[1]["score"]
    silent = [{"role": "system", "content": "Be brief."}]
    with pytest.raises(openai.BadRequestError, match="no user message to search for"):
        ask(client, documents=None, messages=silent, extra_body={"blockrag": {"retrieve": {}}})


# -- other clients ----------------------------------------------------------------------------------------------------


def test_llama_index_reaches_it_as_openai_like(live: Live) -> None:
    from llama_index.core.llms import ChatMessage
    from llama_index.llms.openai_like import OpenAILike

    question = ChatMessage(role="user", content=QUESTION["content"])

    async def everything(http: httpx.Client) -> list[str | None]:
        async with httpx.AsyncClient() as async_http:
            llm = OpenAILike(
                model="demo",
                api_base=f"{live.url}/v1",
                api_key="none",
                is_chat_model=True,
                max_tokens=16,
                max_retries=0,
                http_client=http,
                async_http_client=async_http,
                additional_kwargs={"extra_body": {"documents": DOCUMENTS}},
            )
            streamed = [chunk async for chunk in await llm.astream_chat([question])]
            return [
                llm.complete(QUESTION["content"]).text,
                llm.chat([question]).message.content,
                list(llm.stream_chat([question]))[-1].message.content,
                (await llm.achat([question])).message.content,
                streamed[-1].message.content,
            ]

    with httpx.Client() as http:
        assert asyncio.run(everything(http)) == ["Thimphu"] * 5


def test_the_seeds_call_takes_blocks_as_strings(live: Live, model: BlockModel) -> None:
    blocks = ["Arvo lies in the north.\n", "Brask lies in the south.\n", "Question: Where is Arvo?\nAnswer:"]
    for local in (None, 10_000, 2, 1, 0):
        limit = {} if local is None else {"num_local_attention_blocks": local}
        reply = live.http.post("/generate", json={"blocks": blocks, "max_new_tokens": 6, **limit}).json()
        count = 2 if local is None else min(local, 2)
        prompt = model.template.segment_blocks(model.tokenizer, [*blocks[:count], "".join(blocks[count:])])
        expected = model.generate(prompt, GenerationOptions(max_new_tokens=6)).text
        assert (reply["ret"], reply["generated"], reply["message"]) == (0, expected, "")
        assert reply["usage"]["prompt_tokens"] == prompt.num_tokens
    refused = live.http.post("/generate", json={"blocks": ["text", ""]})
    assert refused.status_code == 400
    assert "end them with the question" in refused.json()["error"]["message"]


# -- tools ------------------------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "capital", "parameters": {"type": "object", "properties": {}}}}]
TOOLS_CHAT = "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}" + CHATML_CHAT.replace(
    "message['content'] + ", "message['content'] + (message['tool_calls'] | tojson if message['tool_calls'] else '') + "
)


@pytest.fixture(scope="module")
def tool_live() -> Iterator[Live]:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = TOOLS_CHAT
    facts = BlockAttentionFacts(block_fine_tuned=True)
    with live_server(BlockModel(tiny_model(ModelCase("llama", "llama")), tokenizer, facts=facts)) as running:
        yield running


def test_tools_reach_a_model_whose_template_shows_them(tool_live: Live) -> None:
    client = tool_live.client()
    said = {"role": "assistant", "content": None, "tool_calls": [
        {"id": "c1", "type": "function", "function": {"name": "capital", "arguments": '{"country": "Bhutan"}'}},
    ]}  # fmt: skip
    result = {"role": "tool", "tool_call_id": "c1", "content": "Thimphu"}
    messages: Any = [QUESTION, said, result]
    lengths = {}
    for name, arguments in {"tools": {"tools": TOOLS}, "none": {"tools": TOOLS, "tool_choice": "none"}}.items():
        answer = client.chat.completions.create(model="demo", messages=messages, max_tokens=4, **arguments)
        assert isinstance(answer.choices[0].message.content, str)
        lengths[name] = answer.usage.prompt_tokens
    assert lengths["tools"] > lengths["none"]
    chunks = list(
        client.chat.completions.create(model="demo", messages=messages, max_tokens=4, tools=TOOLS, stream=True)
    )
    whole = client.chat.completions.create(model="demo", messages=messages, max_tokens=4, tools=TOOLS)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    for broken in ("[1]", "{"):
        said["tool_calls"][0]["function"]["arguments"] = broken  # type: ignore[index]
        with pytest.raises(openai.BadRequestError, match="no JSON object"):
            client.chat.completions.create(model="demo", messages=messages, max_tokens=4)
    # The RAG form shows no tools: a conversation with them has the chat form, unless the request insists.
    assert ask(client, tools=TOOLS).usage.prompt_tokens > ask(client).usage.prompt_tokens
    with pytest.raises(openai.BadRequestError, match="RAG form"):
        ask(client, tools=TOOLS, extra_body={"blockrag": {"form": "rag"}})


def test_a_conversation_that_opens_with_a_greeting_is_answered(client: openai.OpenAI) -> None:
    greeting = {"role": "assistant", "content": "Hello! What would you like to know?"}
    assert isinstance(ask(client, messages=(greeting, QUESTION)).choices[0].message.content, str)


def test_a_call_in_an_answer_is_a_tool_call() -> None:
    text = 'Let me see.<tool_call>{"name": "capital", "arguments": {"country": "Bhutan"}}</tool_call>'
    generation = Generation(text, (1,), "stop", Usage(), GenerationTimings())
    message, reason = Completion("demo", tools=True).message(generation)
    assert (message["content"], reason) == ("Let me see.", "tool_calls")
    (call,) = message["tool_calls"]  # type: ignore[misc]
    assert call["function"]["name"] == "capital"
    assert json.loads(call["function"]["arguments"]) == {"country": "Bhutan"}
    assert Completion("demo").message(generation) == ({"role": "assistant", "content": text}, "stop")


def test_white_space_around_an_answer_is_dropped_as_it_comes() -> None:
    edges = EdgeStripper()
    assert [edges.push(piece) for piece in (" ", "\n a", " b ", "\n", "c", "  ")] == ["", "a", " b", "", " \nc", ""]


def test_tools_without_a_bottom_are_the_clients_mistake(tool_live: Live) -> None:
    # As much as a JSON parser takes; who walks over it gives up earlier.
    nested: dict[str, Any] = {}
    for _ in range(700):
        nested = {"a": nested}
    call = {"id": "1", "type": "function", "function": {"name": "capital", "arguments": json.dumps(nested)}}
    for fields in (
        {"messages": [QUESTION], "tools": [{"type": "function", "function": {"name": "f", "parameters": nested}}]},
        {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}, QUESTION]},
    ):
        reply = tool_live.http.post("/v1/chat/completions", json=fields)
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_value")
        assert "nested too deeply" in reply.json()["error"]["message"]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "param", "code", "message"),
    [
        ({"n": 2}, "n", "unsupported_parameter", "n=2 is not supported"),
        ({"logprobs": True}, "logprobs", "unsupported_parameter", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter", "json_object"),
        ({"documnts": []}, "documnts", "unknown_parameter", "no field 'documnts'"),
        ({"temperature": "hot"}, "temperature", "invalid_value", "got 'hot'"),
        ({"temperature": -1}, "temperature", "invalid_value", "equal to 0, got -1"),
        ({"temperature": 5e-324}, "temperature", "invalid_value", "at least 1e-30, got 5e-324"),
        ({"repetition_penalty": 5e-324}, "repetition_penalty", "invalid_value", "equal to 0.001, got 5e-324"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value", "equal to 1, got 0"),
        ({"stop": [""]}, None, "invalid_value", "stop="),
        ({"messages": []}, "messages", "invalid_value", "at least 1 item"),
        ({"messages": [{"content": "a"}]}, "messages[0].role", "invalid_value", "required"),
        ({"messages": [{"role": "user", "content": " "}]}, None, "invalid_value", "question"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, None, "invalid_value", "no user message"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, None, "invalid_value", "surrogate"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
            "should be 'text', got 'image_url'",
        ),
        ({"documents": [{"title": "a"}]}, "documents[0].text", "invalid_value", "required"),
        ({"documents": [{"text": "a", "url": "b"}]}, "documents[0].url", "invalid_value", "not permitted"),
        ({"blockrag": {"attention": "some"}}, "blockrag.attention", "invalid_value", "got 'some'"),
        ({"tools": TOOLS, "documents": []}, None, "invalid_value", "shows no tools"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_value", "got 'required'"),
        ({"documents": [{"text": "word " * 4000}]}, "messages", "context_length_exceeded", "context 2048"),
        ({"messages": [[[[[[[[[[[[]]]]]]]]]]]]}, "messages[0]", "invalid_value", "[[[...]]]"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    live: Live, change: dict[str, Any], param: str | None, code: str, message: str
) -> None:
    body = {"messages": [QUESTION], "documents": DOCUMENTS, **change}
    headers = {"content-type": "application/json"}
    for extra in ({}, {"stream": True}):
        reply = live.http.post("/v1/chat/completions", content=json.dumps({**body, **extra}), headers=headers)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
        assert message in error["message"]


def test_fields_that_change_nothing_are_taken(client: openai.OpenAI) -> None:
    neutral: dict[str, Any] = {
        "n": 1,
        "logprobs": False,
        "presence_penalty": 0,
        "response_format": {"type": "text"},
        "user": "somebody",
        "tool_choice": "none",
    }
    assert ask(client, **neutral).choices[0].message.content == "Thimphu"


def test_mistakes_are_the_clients_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ask(client, n=3)
    assert (bad.value.param, bad.value.code) == ("n", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here; pass 'demo'") as unknown:
        client.chat.completions.create(model="gpt-4", messages=[QUESTION])  # type: ignore[list-item]
    assert unknown.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{nope", "no JSON"),
        ("[]", "must be a JSON object"),
        ("", "must be a JSON object"),
        ('{"messages": ' + "[" * 100_000, "no JSON ("),
        ('{"seed": ' + "1" * 10_000 + "}", "no JSON ("),
        (b'{"messages": "\xff"}', "no JSON ('utf-8' codec can't decode"),
    ],
)
def test_what_is_no_json_object_is_refused(live: Live, content: str | bytes, message: str) -> None:
    for route in ("/v1/chat/completions", "/v1/blocks", "/generate"):
        reply = live.http.post(route, content=content, headers={"content-type": "application/json"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_json")
        assert message in reply.json()["error"]["message"]


def test_a_model_that_only_attends_in_full_serves_no_blocks() -> None:
    gpt2 = BlockModel(tiny_model(ModelCase("gpt2", "gpt2")), chatml_tokenizer(), attention="full")
    with live_server(gpt2) as running:
        client = running.client()
        assert ask(client, max_tokens=3).usage.prompt_tokens_details.cached_tokens == 0
        with pytest.raises(openai.BadRequestError, match="cannot be composed"):
            ask(client, extra_body={"blockrag": {"attention": "block"}})
        with pytest.raises(openai.BadRequestError, match="no index to search"):
            ask(client, documents=None, extra_body={"blockrag": {"retrieve": {}}})
        reply = running.http.post("/v1/blocks", json={"documents": DOCUMENTS})
        assert (reply.status_code, reply.json()["error"]["code"]) == (400, "invalid_value")


# -- what the server says of itself -----------------------------------------------------------------------------------


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (found,) = client.models.list().data
    assert (found.id, found.object) == ("demo", "model")
    assert client.models.retrieve("demo").model_extra["max_model_len"] == 2048
    with pytest.raises(openai.NotFoundError, match="no model 'other'"):
        client.models.retrieve("other")


def test_health_says_that_requests_are_taken(live: Live) -> None:
    reply = live.http.get("/health")
    assert reply.status_code == 200
    assert reply.json() == {"status": "ok", "ready": True, "running": 0, "waiting": 0}


def test_metrics_count_what_was_asked_and_reused(live: Live, client: openai.OpenAI) -> None:
    route = "/v1/chat/completions"
    names: list[tuple[str, dict[str, str]]] = [
        ("blockrag_requests_total", {"route": route, "status": "200"}),
        ("blockrag_requests_total", {"route": route, "status": "400"}),
        ("blockrag_requests_total", {"route": "other", "status": "404"}),
        ("blockrag_request_seconds_count", {"route": route}),
        ("blockrag_ttft_seconds_count", {}),
        ("blockrag_tokens_total", {"kind": "reused"}),
        ("blockrag_tokens_total", {"kind": "computed"}),
        ("blockrag_tokens_total", {"kind": "generated"}),
        ("blockrag_blocks_total", {"kind": "reused"}),
        ("blockrag_blocks_total", {"kind": "damaged"}),
    ]
    ask(client)
    before = [live.metric(name, **labels) for name, labels in names]
    answer = ask(client)
    with pytest.raises(openai.BadRequestError):
        ask(client, n=2)
    assert live.http.get("/nowhere").json()["error"]["code"] == "not_found"
    after = [live.metric(name, **labels) for name, labels in names]
    reused = answer.usage.prompt_tokens_details.cached_tokens
    assert [new - old for new, old in zip(after, before, strict=True)] == [
        1, 1, 1, 2, 1, reused, answer.usage.prompt_tokens - reused, answer.usage.completion_tokens, 3, 0,
    ]  # fmt: skip
    assert live.metric("blockrag_store_blocks") == live.serving.model.store.stats().blocks
    assert live.metric("blockrag_in_flight") == live.metric("blockrag_queue_depth") == 0


def test_a_method_that_a_route_lacks_is_refused(live: Live) -> None:
    reply = live.http.get("/v1/chat/completions")
    assert reply.status_code == 405
    assert "GET /v1/chat/completions" in reply.json()["error"]["message"]


def test_a_defect_says_nothing_of_itself(model: BlockModel, caplog: pytest.LogCaptureFixture) -> None:
    with live_server(model) as running:
        running.server.config.app.state.serving = None  # type: ignore[union-attr]
        reply = running.http.get("/v1/models")
        assert reply.status_code == 500
        assert reply.json()["error"]["code"] == "internal_error"
        # The server closes the connection behind it; a client that was not told would lose its next request.
        assert reply.headers["connection"] == "close"
        assert "create_app" not in reply.text
    assert "make it with create_app()" in caplog.text


# -- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::blockrag.BeyondTrainingWarning")  # twenty passages, for the pages of the list
def test_blocks_are_built_ahead_listed_and_removed(live: Live, client: openai.OpenAI, model: BlockModel) -> None:
    documents = [{"id": f"w{n}", "title": f"Well {n}", "text": f"Well {n} is {n} meters deep."} for n in range(20)]
    built = live.http.post("/v1/blocks", json={"documents": documents}).json()
    assert built["blocks_new"] in (20, 21)  # the prefix may be there
    passages = [block for block in built["data"] if block["kind"] == "passage"]
    assert [block["document"] for block in passages] == [document["id"] for document in documents]
    assert {block["status"] for block in passages} == {"new"}
    assert sum(block["bytes_new"] for block in built["data"]) == built["bytes_new"]
    again = live.http.post("/v1/blocks", json={"documents": documents}).json()
    assert (again["blocks_new"], again["blocks_reused"], again["bytes_new"]) == (0, 21, 0)

    answer = ask(client, documents=documents, max_tokens=1)
    assert answer.usage.prompt_tokens_details.cached_tokens == sum(block["tokens"] for block in again["data"])

    keys: list[str] = []
    page: dict[str, Any] = {"last_key": "", "has_more": True}
    while page["has_more"]:
        page = live.http.get("/v1/blocks", params={"after": page["last_key"], "limit": 7}).json()
        assert len(page["data"]) <= 7
        keys += [block["key"] for block in page["data"]]
    assert keys == sorted(model.store.keys())
    assert page["store"]["blocks"] == len(keys)
    assert live.http.get("/v1/blocks", params={"after": keys[-1]}).json()["last_key"] is None

    key = passages[0]["key"]
    facts = live.http.get(f"/v1/blocks/{key}").json()
    header = read_header(model.store.get(key) or b"")
    assert facts["tokens"] == passages[0]["tokens"] == header.num_tokens
    assert (facts["precision"], facts["fingerprint"]) == (header.precision, header.fingerprint)
    assert (facts["usable"], facts["damaged"]) == (True, None)
    assert live.http.delete(f"/v1/blocks/{key}").json() == {"object": "block", "key": key, "deleted": True}
    assert model.store.get(key) is None
    # Neither is it in what the last prompt left in memory.
    recomputed = ask(client, documents=documents, max_tokens=1)
    assert recomputed.model_extra["blockrag"]["blocks_computed"] == 2  # it, and the question
    assert live.http.delete(f"/v1/blocks/{key}").status_code == 200
    for call in (live.http.get, live.http.delete):
        assert call(f"/v1/blocks/{key}").json()["error"]["code"] == "not_found"
        assert call("/v1/blocks/abc").status_code == 400
    assert live.http.get("/v1/blocks?limit=0").json()["error"]["param"] == "limit"


def test_a_damaged_block_is_shown_counted_and_replaced(live: Live, client: openai.OpenAI, model: BlockModel) -> None:
    document = {"title": "Umbra", "text": "Umbra is where the damaged block is."}
    (*_, block) = live.http.post("/v1/blocks", json={"documents": [document]}).json()["data"]
    data = bytearray(model.store.get(block["key"]) or b"")
    data[-1] ^= 1
    model.store.put(block["key"], data)
    assert live.http.get(f"/v1/blocks/{block['key']}").json()["damaged"] == "checksum"
    before = live.metric("blockrag_blocks_total", kind="damaged")
    answer = ask(client, documents=[document], max_tokens=1)
    assert answer.model_extra["blockrag"]["blocks_damaged"] == 1
    assert live.metric("blockrag_blocks_total", kind="damaged") == before + 1
    assert live.http.get(f"/v1/blocks/{block['key']}").json()["damaged"] is None


def test_the_description_names_every_route(live: Live) -> None:
    described = live.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/blocks", "/v1/blocks/{key}", "/generate", "/health"} <= set(described["paths"])
    guide = (Path(__file__).parent.parent / "docs" / "guide" / "serving.md").read_text("utf-8")
    for path in described["paths"]:
        assert re.sub(r"/\{.*", "", path) in guide, f"docs/guide/serving.md says nothing about {path}"


def test_a_request_is_refused_before_it_waits(make_model: Callable[..., BlockModel]) -> None:
    with live_server(make_model(), model_name="tiny") as running:
        assert (
            running.http.post("/v1/chat/completions", json={"model": "demo", "messages": [QUESTION]}).status_code == 404
        )
        assert running.metric("blockrag_ttft_seconds_count") == 0
