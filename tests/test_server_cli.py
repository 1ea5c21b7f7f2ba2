"""`blockrag serve` as a process: how it starts, refuses to, stops; under load; and the chat page in a browser."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from live_server import DOCUMENTS, LONG, QUESTION
from typer.testing import CliRunner, Result

import blockrag
from blockrag.cli import app
from blockrag.demo import load_corpus
from blockrag.server import listen

ROOT = Path(__file__).parent.parent
CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server in a process of its own, and its address."""
    command = [sys.executable, "-m", "blockrag", "serve", "--port", "0", "--json", *arguments]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    ) as running:
        try:
            assert running.stdout is not None
            yield running, json.loads(running.stdout.readline())["url"]
        finally:
            if running.poll() is None:
                running.kill()


def serve(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["serve", *arguments])


def stopped(*arguments: str, asking: Any) -> Result:
    """Run the command here; when it serves, call `asking` with its address, then send this process SIGTERM."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    problems = []

    def play() -> None:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, timeout=60) as http:
            deadline = time.monotonic() + 60
            while time.monotonic() < deadline:
                try:
                    http.get("/health").raise_for_status()
                    break
                except httpx.TransportError:
                    time.sleep(0.05)
            try:
                asking(http)
            except BaseException as error:
                problems.append(error)
            finally:
                # A server that never ran would leave the signal to the whole test run.
                if signal.getsignal(signal.SIGTERM) != before:
                    os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=play)
    thread.start()
    result = serve("--port", str(port), *arguments)
    thread.join()
    assert signal.getsignal(signal.SIGTERM) == before
    if problems:
        raise problems[0]
    return result


# -- starting and stopping --------------------------------------------------------------------------------------------


def test_a_signal_lets_a_stream_finish_and_ends_the_process_with_0() -> None:
    served = process("--model", "demo", "--shutdown-timeout", "600")
    with served as (running, url), openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        arguments: Any = {**LONG, "max_tokens": 200}
        stream = client.chat.completions.create(model="demo", messages=[QUESTION], stream=True, **arguments)  # type: ignore[list-item]
        events = iter(stream)
        next(events)
        running.send_signal(signal.SIGTERM)
        assert [chunk.choices[0].finish_reason for chunk in events][-1] == "length"
        _, messages = running.communicate(timeout=240)
        assert running.returncode == 0
        assert messages.splitlines() == [f"serving demo at {url}/v1; stop it with Ctrl-C", "stopped"]


def test_a_second_ctrl_c_ends_at_once_and_says_no_more_than_that() -> None:
    with process("--model", "demo", "--shutdown-timeout", "600") as (running, url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(model="demo", messages=[QUESTION], stream=True, **LONG)  # type: ignore[call-overload]
            next(iter(stream))
            running.send_signal(signal.SIGINT)
            deadline = time.monotonic() + 60
            with suppress(OSError):
                while time.monotonic() < deadline:
                    socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2]))).close()
            running.send_signal(signal.SIGINT)
            with pytest.raises(httpx.TransportError):
                list(stream)
        told = running.communicate(timeout=240)[1].splitlines()
    assert running.returncode == 0
    assert told == [f"serving demo at {url}/v1; stop it with Ctrl-C", "stopped"]


def test_a_served_directory_answers_from_what_it_holds(tmp_path: Path) -> None:
    with blockrag.BlockRAG.from_pretrained("demo", path=tmp_path) as rag:
        rag.ingest(load_corpus()[:40])
        passage = next(iter(rag.index.passages()))
        question = f"What is the capital of {passage.title}?"
        expected = rag.query(question, blockrag.GenerationOptions(max_new_tokens=8), k=3)

    def asking(http: httpx.Client) -> None:
        body = {
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 8,
            "blockrag": {"retrieve": {"top_k": 3}},
        }
        reply = http.post("/v1/chat/completions", json=body).raise_for_status().json()
        assert reply["choices"][0]["message"]["content"] == expected.text
        assert [found["id"] for found in reply["blockrag"]["sources"]] == [hit.passage.id for hit in expected.hits]
        assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == expected.usage.tokens_reused

    result = stopped("--path", str(tmp_path), "--model", "demo", asking=asking)
    assert result.exit_code == 0, result.output
    assert "stopped" in result.stderr


def test_options_reach_the_server_and_its_store_is_closed(tmp_path: Path) -> None:
    def asking(http: httpx.Client) -> None:
        assert http.get("/v1/models").status_code == 401
        http.headers["authorization"] = "Bearer secret"
        built = http.post("/v1/blocks", json={"documents": DOCUMENTS}).raise_for_status().json()
        assert http.get(f"/v1/blocks/{built['data'][0]['key']}").json()["precision"] == "int8"
        assert http.post("/v1/blocks", json={"documents": [{"text": "a" * 2000}]}).status_code == 413
        body = {"messages": [QUESTION], "ignore_eos": True}
        assert http.post("/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] == 3

    store = f"disk://{tmp_path / 'kv'}"
    options = ["--api-key", "secret", "--max-body", "1KB", "--precision", "int8", "--max-new-tokens", "3", "--json"]
    result = stopped("--model", "demo", "--store", store, *options, asking=asking)
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["model"], told["pid"]) == ("demo", os.getpid())
    with_blocks = blockrag.open_store(store)
    assert with_blocks.stats().blocks == 3
    with_blocks.close()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "there is nothing to serve"),
        (["--model", "demo", "--host", "0.0.0.0"], 2, "set an API key (BLOCKRAG_API_KEY or --api-key)"),
        (["--model", "demo", "--timeout", "0"], 2, "timeout_s=0.0 is out of range"),
        (["--model", "demo", "--max-body", "much"], 2, "cannot read the size 'much'"),
        (["--model", "./nowhere"], 2, "no model directory './nowhere'"),
        (["--path", "nowhere"], 2, "there is no index at nowhere"),
        (["--path", "nowhere", "--store", "memory://"], 2, "both say where blocks are"),
        (["--model", "demo", "--store", "ftp://x", "--port", "0"], 2, "cannot open store 'ftp://x'"),
    ],
)
def test_a_call_that_cannot_be_served_says_why(arguments: list[str], code: int, message: str) -> None:
    result = serve(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_port_that_is_taken_is_named() -> None:
    with listen("127.0.0.1", 0) as taken:
        taken.listen()
        result = serve("--model", "demo", "--port", str(taken.getsockname()[1]))
    assert result.exit_code == 2
    assert "pass another --host or --port" in result.stderr


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    result = serve("--model", "demo")
    assert result.exit_code == 2
    assert "needs fastapi; install it with: pip install 'blockrag[server]'" in result.stderr


# -- load -------------------------------------------------------------------------------------------------------------


def test_under_load_every_answer_is_right(tmp_path: Path) -> None:
    with process("--model", "demo", "--max-concurrent", "3", "--max-queue", "64") as (_, url):
        command = [sys.executable, "-m", "locust", "-f", str(ROOT / "tests" / "load_server.py"), "--headless"]
        # Users end what they have begun: an answer that is cut off would be nobody's.
        command += ["--users", "12", "--spawn-rate", "12", "--stop-timeout", "120"]
        command += ["--host", url, "--json", "--loglevel", "WARNING"]
        environment = {**os.environ, "ANSWERS": "60"}
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
        counted = json.loads(result.stdout)
        assert {one["name"]: one["num_failures"] for one in counted} == {"whole": 0, "streamed": 0}
        assert sum(one["num_requests"] for one in counted) >= 60
        health = httpx.get(f"{url}/health").json()
        assert (health["running"], health["waiting"]) == (0, 0)


# -- the chat page ----------------------------------------------------------------------------------------------------


@contextmanager
def browser(directory: Path) -> Iterator[httpx.Client]:
    """A browser without a window, driven over WebDriver (https://www.w3.org/TR/webdriver2/)."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    switches += ["--disable-background-networking", "--disable-component-update", "--disable-dev-shm-usage"]
    switches += [f"--user-data-dir={directory / 'profile'}", "--window-size=900,800"]
    options = {"binary": CHROMIUM, "args": switches}
    with subprocess.Popen([str(CHROMEDRIVER), f"--port={port}"], stdout=subprocess.DEVNULL) as driver:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                deadline = time.monotonic() + 30
                while True:
                    try:
                        http.get("/status")
                        break
                    except httpx.TransportError:
                        assert time.monotonic() < deadline
                        time.sleep(0.05)
                wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
                session = http.post("/session", json=wanted).raise_for_status().json()["value"]["sessionId"]
                address = f"http://127.0.0.1:{port}/session/{session}"
                http.base_url = httpx.URL(address)
                try:
                    yield http
                finally:
                    # The driver alone does not take the browser with it.
                    http.delete(address).raise_for_status()
        finally:
            driver.terminate()


def element(http: httpx.Client, selector: str) -> str:
    """Wait for an element; gives its path."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        reply = http.post("/element", json={"using": "css selector", "value": selector})
        if reply.is_success:
            return "/element/" + next(iter(reply.json()["value"].values()))
        time.sleep(0.05)
    raise AssertionError(f"no {selector} on the page")


@pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="needs chromium and chromedriver on the PATH")
def test_the_chat_page_answers_in_a_browser(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "examples" / "chat_page.py"), "--stay"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as running:
        try:
            assert running.stdout is not None
            url = running.stdout.readline().split()[-1]
            with browser(tmp_path) as http:
                http.post("/url", json={"url": url}).raise_for_status()

                def ask(text: str) -> None:
                    http.post(f"{element(http, '#question')}/value", json={"text": text}).raise_for_status()
                    http.post(f"{element(http, 'button:not(:disabled)')}/click", json={}).raise_for_status()

                for number, text in enumerate(("What is the capital of Bhutan?", "What is the capital of Kenya?"), 1):
                    ask(text)
                    element(http, f".turn:nth-of-type({number}) small")
                turns = [http.get(f"{element(http, f'.turn:nth-of-type({n})')}/text").json()["value"] for n in (1, 2)]
                image = base64.b64decode(http.get("/screenshot").json()["value"])
                running.send_signal(signal.SIGINT)
                assert running.wait(240) == 0
                ask("Is anybody there?")
                failed = http.get(f"{element(http, '.turn.failed')}/text").json()["value"].splitlines()
            Path(os.environ.get("BLOCKRAG_SCREENSHOT", tmp_path / "chat_page.png")).write_bytes(image)
        finally:
            running.kill()
    assert failed == ["Is anybody there?", "The server cannot be reached; is it still running?"]
    assert [turn.splitlines()[:2] for turn in turns] == [
        ["What is the capital of Bhutan?", "Thimphu"],
        ["What is the capital of Kenya?", "Nairobi"],
    ]
    assert turns[0].splitlines()[2].startswith("0 of ")
    assert int(turns[1].splitlines()[2].split()[0]) > 0
    assert image.startswith(b"\x89PNG")
