"""A server that runs: in a thread of this process, on a free loopback port, with clients that connect to it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai

from blockrag.index import PassageIndex
from blockrag.model.block_model import BlockModel
from blockrag.server import ServerSettings, create_app, listen
from blockrag.server.run import Server
from blockrag.server.serving import Serving

DOCUMENTS = [
    {"title": "Bhutan", "text": "The capital of Bhutan is Thimphu."},
    {"title": "Kenya", "text": "The capital of Kenya is Nairobi."},
]
QUESTION = {"role": "user", "content": "What is the capital of Bhutan?"}
# An answer that takes seconds: as long as the model's context.
LONG: dict[str, Any] = {"max_tokens": 1900, "extra_body": {"ignore_eos": True}}


@dataclass
class Live:
    """A server that runs, and clients of it."""

    url: str
    serving: Serving
    server: Server
    thread: threading.Thread
    http: httpx.Client
    clients: list[openai.OpenAI] = field(default_factory=list)

    def client(self, api_key: str = "none", **arguments: Any) -> openai.OpenAI:
        """A real client, which retries nothing."""
        client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **arguments)
        self.clients.append(client)
        return client

    def async_client(self, **arguments: Any) -> openai.AsyncOpenAI:
        """The same for asyncio; the caller closes it."""
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, **arguments)

    def metric(self, sample: str, **labels: str) -> float:
        """A value of /metrics, as Prometheus reads it."""
        from prometheus_client.parser import text_string_to_metric_families

        text = self.http.get("/metrics").raise_for_status().text
        found = [
            value.value
            for family in text_string_to_metric_families(text)
            for value in family.samples
            if value.name == sample and value.labels == labels
        ]
        return found[0] if found else 0.0

    def stop(self) -> None:
        """What a signal does; returns when the server is gone."""
        self.server.should_exit = True
        self.thread.join(60)


@contextmanager
def live_server(model: BlockModel, *, index: PassageIndex | None = None, **limits: Any) -> Iterator[Live]:
    """Serve a model until the block is left."""
    app = create_app(model, ServerSettings(**{"model_name": "demo", **limits}), index=index)
    bound = listen("127.0.0.1", 0)
    ready = threading.Event()
    server = Server(app, ready.set)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        assert ready.wait(30)
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        with httpx.Client(base_url=url, timeout=60) as http:
            live = Live(url, app.state.serving, server, thread, http)
            yield live
            for client in live.clients:
                client.close()
    finally:
        server.should_exit = True
        thread.join(60)
        bound.close()
    assert not thread.is_alive()
