"""The server under pressure: queues, time limits, clients that leave, bodies that are too long, keys, stopping."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from live_server import DOCUMENTS, LONG, QUESTION, Live, live_server

from blockrag.errors import InputError
from blockrag.model.block_model import BlockModel
from blockrag.server import ServerSettings, check_exposure, create_app, listen, serve
from blockrag.server.connection import ClientGoneError, EventStream, while_connected
from blockrag.server.errors import ApiError
from blockrag.server.gate import Gate
from blockrag.server.settings import is_loopback
from blockrag.stores import MemoryStore


@pytest.fixture(scope="module")
def model() -> BlockModel:
    return BlockModel.from_pretrained("demo")


def begin(client: openai.OpenAI, **arguments: Any) -> Any:
    """A long stream, of which the first events are there."""
    stream = client.chat.completions.create(
        model="demo",
        messages=[QUESTION],
        stream=True,
        **{**LONG, **arguments},  # type: ignore[list-item]
    )
    next(iter(stream))
    return stream


def inside(app: FastAPI) -> httpx.AsyncClient:
    """A client in the application's own event loop, without a server between them."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1")


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen"
        time.sleep(0.005)


# -- the queue --------------------------------------------------------------------------------------------------------


def test_those_who_find_the_queue_full_are_told_when_to_come_back(model: BlockModel) -> None:
    with live_server(model, max_concurrent=1, max_queue=1) as live, ThreadPoolExecutor(1) as pool:
        client = live.client()
        stream = begin(client)
        short = {"model": "demo", "messages": [QUESTION], "max_tokens": 2}
        waiting = pool.submit(client.chat.completions.create, **short)  # type: ignore[arg-type]
        until(lambda: live.serving.gate.waiting == 1, "waiting")
        assert live.metric("blockrag_queue_depth") == live.metric("blockrag_in_flight") == 1
        with pytest.raises(openai.APIStatusError, match="1 requests are being answered and 1 wait") as refused:
            client.chat.completions.create(**short)  # type: ignore[call-overload]
        assert (refused.value.status_code, refused.value.code) == (503, "queue_full")
        assert refused.value.response.headers["retry-after"] == "1"
        stream.close()
        assert waiting.result(60).usage.completion_tokens == 2


def test_an_openai_client_that_may_try_again_is_served_after_all(model: BlockModel) -> None:
    with live_server(model, max_concurrent=1, max_queue=0) as live, ThreadPoolExecutor(1) as pool:
        stream = begin(live.client())
        patient = live.client().with_options(max_retries=60)
        short = {"model": "demo", "messages": [QUESTION], "max_tokens": 2}
        answer = pool.submit(patient.chat.completions.create, **short)  # type: ignore[arg-type]
        refused = {"route": "/v1/chat/completions", "status": "503"}
        until(lambda: live.metric("blockrag_requests_total", **refused) >= 1, "refusing")
        stream.close()
        assert answer.result(60).usage.completion_tokens == 2


def test_gates_let_in_one_after_the_other_whoever_leaves() -> None:
    async def scene() -> None:
        gate = Gate(max_concurrent=1, max_queue=8)
        await gate.enter(60)
        first, second, third = (asyncio.ensure_future(gate.enter(60)) for _ in range(3))
        await asyncio.sleep(0)
        assert (gate.running, gate.waiting) == (1, 3)
        first.cancel()  # leaves while it waits, and its turn comes before it noticed
        gate.leave()
        await second
        third.cancel()
        await asyncio.gather(first, third, return_exceptions=True)
        assert (gate.running, gate.waiting) == (1, 0)
        fourth = asyncio.ensure_future(gate.enter(60))
        await asyncio.sleep(0)
        gate.leave()  # its turn comes, and it leaves before it noticed
        fourth.cancel()
        await asyncio.gather(fourth, return_exceptions=True)
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(scene())


def test_a_turn_that_does_not_come_is_not_waited_for() -> None:
    async def scene() -> None:
        gate = Gate(max_concurrent=1, max_queue=8)
        await gate.enter(60)
        for timeout_s in (0, 0.01):
            with pytest.raises(TimeoutError):
                await gate.enter(timeout_s)
        assert (gate.running, gate.waiting) == (1, 0)
        late = asyncio.ensure_future(gate.enter(0))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        gate.leave()  # its turn comes just before its time is up
        await late
        assert (gate.running, gate.waiting) == (1, 0)

    asyncio.run(scene())


def test_a_closed_gate_sends_everybody_away() -> None:
    async def scene() -> None:
        gate = Gate(max_concurrent=1, max_queue=8)
        await gate.enter(60)
        waiting, before, after = (asyncio.ensure_future(gate.enter(60)) for _ in range(3))
        await asyncio.sleep(0)
        before.cancel()
        gate.close()
        after.cancel()
        with pytest.raises(ApiError, match="shutting down"):
            await waiting
        for leaving in (before, after):
            with pytest.raises(asyncio.CancelledError):
                await leaving
        with pytest.raises(ApiError, match="shutting down"):
            await gate.enter(60)
        gate.leave()
        assert (gate.running, gate.waiting) == (0, 0)

    asyncio.run(scene())


# -- clients that leave -----------------------------------------------------------------------------------------------


def test_a_client_that_leaves_mid_stream_frees_the_model(model: BlockModel) -> None:
    with live_server(model, max_concurrent=1) as live:
        client = live.client()
        begin(client).close()
        answer = client.chat.completions.create(model="demo", messages=[QUESTION], max_tokens=3)  # type: ignore[list-item]
        assert answer.usage is not None
        # Had the long answer gone on to its end, its tokens would have been counted before these.
        assert live.metric("blockrag_tokens_total", kind="generated") == answer.usage.completion_tokens
        until(lambda: live.serving.gate.running == 0, "leaving")


@pytest.mark.parametrize(
    ("route", "body"),
    [
        ("/v1/chat/completions", {"messages": [QUESTION], "max_tokens": 1900, "ignore_eos": True}),
        ("/generate", {"blocks": ["Who?"], "max_new_tokens": 1900, "ignore_eos": True}),
        ("/v1/blocks", {"documents": [{"text": f"{n} " * 400} for n in range(200)]}),
    ],
)
def test_a_client_that_does_not_wait_for_its_answer_frees_the_model(
    model: BlockModel, route: str, body: dict[str, Any]
) -> None:
    with live_server(model, max_concurrent=1) as live:
        with pytest.raises(httpx.ReadTimeout):
            live.http.post(route, json=body, timeout=0.2)
        until(lambda: live.metric("blockrag_requests_total", route=route, status="499") == 1, "leaving")
        assert live.serving.gate.running == 0
        assert live.metric("blockrag_tokens_total", kind="generated") == 0


def test_a_client_that_leaves_the_queue_is_not_answered(model: BlockModel) -> None:
    with live_server(model, max_concurrent=1) as live:
        stream = begin(live.client())
        for extra in ({}, {"stream": True}):
            body = {"messages": [QUESTION], **extra}
            with pytest.raises(httpx.ReadTimeout):
                live.http.post("/v1/chat/completions", json=body, timeout=0.1)
        until(lambda: live.serving.gate.waiting == 0, "leaving the queue")
        assert live.serving.gate.running == 1
        stream.close()


async def _copied(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    while True:
        yield await anext(source)


def test_a_client_that_stops_reading_does_not_keep_its_place() -> None:
    closed, taken = [], []

    async def events() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield b"data: {}\n\n"
        finally:
            closed.append(True)

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        taken.append(message)
        if len(taken) == 3:
            await asyncio.Event().wait()

    source = events()
    asyncio.run(EventStream(_copied(source), source, limit_s=0.05)({"type": "http"}, receive, send))  # type: ignore[arg-type]
    assert closed == [True]
    assert all(message.get("more_body", True) for message in taken)


def test_work_ends_with_its_client() -> None:
    async def scene() -> None:
        ended = []

        async def work() -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

        messages = iter([{"type": "http.request"}, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(messages)

        with pytest.raises(ClientGoneError):
            await while_connected(receive, work())
        assert ended == [True]

    asyncio.run(scene())


# -- time -------------------------------------------------------------------------------------------------------------


def test_an_answer_that_takes_too_long_is_an_error_and_never_a_shorter_answer(model: BlockModel) -> None:
    with live_server(model, timeout_s=0.5) as live:
        client = live.client()
        with pytest.raises(openai.APIStatusError, match=r"within 0.5 s") as late:
            client.chat.completions.create(model="demo", messages=[QUESTION], **LONG)  # type: ignore[list-item]
        assert (late.value.status_code, late.value.code) == (504, "timeout")
        with pytest.raises(openai.APIError, match=r"within 0.5 s") as later:
            list(begin(client))
        assert later.value.code == "timeout"
        until(lambda: live.serving.gate.running == 0, "ending")


def test_a_store_that_fails_in_the_middle_ends_the_stream_with_its_error(model: BlockModel) -> None:
    async def scene() -> list[dict[str, Any]]:
        from blockrag.errors import StoreError
        from blockrag.model.answer import Generation
        from blockrag.server.chat import Completion, _events

        async def rest() -> AsyncGenerator[str | Generation, None]:
            yield "b"
            raise StoreError("the disk is gone")

        events = [event async for event in _events(Completion("demo"), "a", rest(), include_usage=True)]
        return [json.loads(event.removeprefix(b"data: ")) for event in events]

    *chunks, last = asyncio.run(scene())
    assert [chunk["choices"][0]["delta"]["content"] for chunk in chunks] == ["", "a", "b"]
    assert (last["error"]["message"], last["error"]["code"]) == ("the disk is gone", "store_unavailable")


# -- bodies -----------------------------------------------------------------------------------------------------------


def test_a_body_that_is_too_long_is_not_read(model: BlockModel) -> None:
    with live_server(model, max_body_bytes=2000) as live:
        long = json.dumps({"messages": [QUESTION], "documents": [{"text": "a" * 3000}]}).encode()

        def chunks() -> Iterator[bytes]:
            for start in range(0, len(long), 500):
                yield long[start : start + 500]

        headers = {"content-type": "application/json"}
        for content in (long, chunks()):
            reply = live.http.post("/v1/chat/completions", content=content, headers=headers)
            assert reply.status_code == 413, reply.text
            assert reply.json()["error"]["code"] == "request_too_large"
            assert "2000 bytes" in reply.json()["error"]["message"]
        body = {"messages": [QUESTION], "documents": DOCUMENTS}
        assert live.http.post("/v1/chat/completions", json=body).status_code == 200


def test_a_body_that_does_not_arrive_is_not_waited_for(model: BlockModel) -> None:
    with live_server(model, timeout_s=0.3) as live:
        host, port = live.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 99"
            slow.sendall(f'{head}\r\n\r\n{{"blocks": '.encode())
            reply = b""
            while piece := slow.recv(4096):
                reply += piece
        assert reply.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 0.3 s" in reply


# -- who may call -----------------------------------------------------------------------------------------------------


def test_with_a_key_whoever_has_it_may_call(model: BlockModel) -> None:
    with live_server(model, api_key="the key") as live:
        with pytest.raises(openai.AuthenticationError, match="missing or wrong") as refused:
            live.client("another").models.list()
        assert refused.value.code == "invalid_api_key"
        assert live.client("the key").models.list().data[0].id == "demo"
        assert live.http.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer"}, {"authorization": "Bearer thé key".encode("latin-1")}):
            reply = live.http.get("/metrics", headers=headers)  # type: ignore[arg-type]
            assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer")
        assert live.http.delete(f"/v1/blocks/{'0' * 64}").status_code == 401
        assert live.http.get("/metrics", headers={"authorization": "bearer  the key"}).status_code == 200
        elsewhere = {"authorization": "Bearer the key", "host": "models.example.org", "origin": "https://example.org"}
        assert live.http.get("/metrics", headers=elsewhere).status_code == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:1", "origin": "http://127.0.0.1:9"}, 200),
        ({"host": "rebound.example.org"}, 403),
        ({"host": "[::1"}, 403),
        ({"origin": "https://example.org"}, 403),
        ({"origin": "null"}, 403),
    ],
)
def test_without_a_key_pages_of_other_sites_may_not_call(
    model: BlockModel, headers: dict[str, str], status: int
) -> None:
    with live_server(model) as live:
        reply = live.http.get("/v1/models", headers=headers)
        assert reply.status_code == status
        if status == 403:
            assert reply.json()["error"]["code"] == "foreign_origin"


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost", "LOCALHOST."])
def test_this_machine_is_served_without_a_key(host: str) -> None:
    assert is_loopback(host)
    check_exposure(host, None)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", ""])
def test_other_machines_are_served_only_with_a_key(host: str) -> None:
    with pytest.raises(InputError, match="BLOCKRAG_API_KEY"):
        check_exposure(host, None)
    check_exposure(host, "key")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"max_concurrent": 0}, "max_concurrent=0"),
        ({"max_queue": -1}, "max_queue=-1"),
        ({"timeout_s": 0}, "timeout_s=0"),
        ({"shutdown_s": math.inf}, "shutdown_s=inf"),
        ({"model_name": ""}, "model_name=''"),
        ({"api_key": ""}, "not empty"),
        ({"api_key": "schlüssel"}, "ASCII"),
        ({"api_key": "key "}, "ends with a space"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ServerSettings(**{"model_name": "demo", **setting})
    assert "secret" not in repr(ServerSettings(model_name="demo", api_key="secret"))


def test_an_address_that_is_taken_or_none_is_named(model: BlockModel) -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(InputError, match="in use"):
            listen("127.0.0.1", taken.getsockname()[1])
    # Two that start at the same time may both bind the address, and only one of them can listen.
    with listen("127.0.0.1", 0) as first, listen("127.0.0.1", first.getsockname()[1]) as second:
        first.listen()
        with pytest.raises(InputError, match=r"cannot listen any more .*; pass another --host or --port"):
            serve(create_app(model, ServerSettings(model_name="demo")), second)
    with pytest.raises(InputError, match=r"cannot listen on '256\.1\.1\.1'"):
        listen("256.1.1.1", 0)


# -- failing and stopping ---------------------------------------------------------------------------------------------


def test_a_store_that_cannot_be_used_costs_the_reuse_and_is_reported() -> None:
    """Answers come from computing; what is about the store itself says that it is the server's fault."""
    store = MemoryStore()
    model = BlockModel.from_pretrained("demo", store=store, kept_bytes=0)
    with live_server(model) as live:
        store.close()
        for _ in range(2):
            done = live.client().chat.completions.create(
                model="demo",
                messages=[QUESTION],  # type: ignore[list-item]
                extra_body={"documents": DOCUMENTS},
            )
            assert done.usage.prompt_tokens_details.cached_tokens == 0
        assert live.http.get("/v1/blocks").status_code == 503
        health = live.http.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "store_unavailable")
        assert live.metric("blockrag_store_blocks") == 0
        assert live.metric("blockrag_requests_total", route="/v1/blocks", status="503") == 1


def test_a_store_without_a_budget_shows_none() -> None:
    model = BlockModel.from_pretrained("demo", store=MemoryStore())
    with live_server(model) as live:
        assert "blockrag_store_bytes" in live.http.get("/metrics").text
        assert "blockrag_store_max_bytes" not in live.http.get("/metrics").text


def test_stopping_lets_answers_finish_and_sends_away_those_who_wait(model: BlockModel) -> None:
    with live_server(model, max_concurrent=1, shutdown_s=600) as live, ThreadPoolExecutor(1) as pool:
        client = live.client()
        stream = begin(client, max_tokens=400)
        waiting = pool.submit(client.chat.completions.create, model="demo", messages=[QUESTION])  # type: ignore[arg-type]
        until(lambda: live.serving.gate.waiting == 1, "waiting")
        live.server.should_exit = True
        with pytest.raises(openai.APIStatusError, match="shutting down") as refused:
            waiting.result(60)
        assert (refused.value.status_code, refused.value.code) == (503, "shutting_down")
        assert [chunk.choices[0].finish_reason for chunk in stream][-1] == "length"
        live.thread.join(60)
        with pytest.raises(httpx.ConnectError), httpx.Client() as http:
            http.get(f"{live.url}/health")


def test_stopping_ends_what_takes_too_long_with_an_error(model: BlockModel) -> None:
    with live_server(model, shutdown_s=0.2) as live, ThreadPoolExecutor(1) as pool:
        client = live.client()
        stream = begin(client)
        whole = pool.submit(client.chat.completions.create, model="demo", messages=[QUESTION], **LONG)  # type: ignore[arg-type]
        until(lambda: live.serving.gate.running == 2, "running")
        live.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(stream)
        with pytest.raises(openai.APIStatusError, match="shutting down"):
            whole.result(60)


def test_a_server_that_stops_says_so_while_it_does(model: BlockModel) -> None:
    app = create_app(model, ServerSettings(model_name="demo"))
    app.state.serving.stop()

    async def ask() -> httpx.Response:
        async with inside(app) as http:
            return await http.get("/health")

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()["status"]) == (503, "shutting_down")


def test_a_request_whose_turn_does_not_come_in_time_is_told(model: BlockModel) -> None:
    app = create_app(model, ServerSettings(model_name="demo", max_concurrent=1, timeout_s=0.1))

    async def ask() -> httpx.Response:
        await app.state.serving.gate.enter(0)
        async with inside(app) as http:
            return await http.post("/v1/chat/completions", json={"messages": [QUESTION]})

    reply = asyncio.run(ask())
    assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")


def test_an_application_can_be_run_by_any_server(model: BlockModel) -> None:
    async def lifespan() -> list[str]:
        app = create_app(model, ServerSettings(model_name="demo"))
        sent: list[str] = []
        asked = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive() -> Any:
            return {"type": next(asked)}

        async def send(message: Any) -> None:
            sent.append(message["type"])

        await app({"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        return sent

    assert asyncio.run(lifespan()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_more_requests_than_places_are_all_answered(model: BlockModel) -> None:
    with live_server(model, max_concurrent=2, max_queue=30) as live:

        async def everybody(live: Live) -> list[str]:
            async with live.async_client() as client:
                arguments: Any = {"model": "demo", "messages": [QUESTION], "max_tokens": 8}
                arguments["extra_body"] = {"documents": DOCUMENTS}
                answers = await asyncio.gather(*[client.chat.completions.create(**arguments) for _ in range(24)])
                return [answer.choices[0].message.content for answer in answers]

        assert asyncio.run(everybody(live)) == ["Thimphu"] * 24
        assert live.metric("blockrag_ttft_seconds_count") == 24
