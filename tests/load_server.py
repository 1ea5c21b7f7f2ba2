"""What users do to a server under load, for locust: whole answers and streams, most of them about the same passages.

Ends after a number of answers, however long a busy machine takes for them.
Run by tests/test_server_cli.py:  ANSWERS=60 locust -f tests/load_server.py --headless ...
"""

from __future__ import annotations

import json
import os
import random
from itertools import count

import gevent
from locust import HttpUser, constant, task

ENOUGH = int(os.environ["ANSWERS"])

CAPITALS = {"Bhutan": "Thimphu", "Kenya": "Nairobi", "Peru": "Lima", "Norway": "Oslo"}
DOCUMENTS = [{"title": c, "text": f"The capital of {c} is {t}."} for c, t in CAPITALS.items()]


class Reader(HttpUser):
    """Asks about one country after the other; an answer about another one is a failure."""

    wait_time = constant(0)
    answered = count(1)

    def on_answer(self) -> None:
        if next(self.answered) == ENOUGH:
            # Elsewhere, for it waits for all users, and this is one of them.
            gevent.spawn(self.environment.runner.quit)

    def ask(self, **fields: object) -> tuple[str, dict[str, object]]:
        country = random.choice(list(CAPITALS))
        messages = [{"role": "user", "content": f"What is the capital of {country}?"}]
        return CAPITALS[country], {"messages": messages, "documents": DOCUMENTS, "max_tokens": 12, **fields}

    @task(3)
    def whole(self) -> None:
        expected, body = self.ask()
        with self.client.post("/v1/chat/completions", json=body, catch_response=True, name="whole") as reply:
            answer = reply.json()["choices"][0]["message"]["content"] if reply.ok else reply.text
            if answer != expected:
                reply.failure(f"{answer!r} instead of {expected!r}")
        self.on_answer()

    @task(1)
    def streamed(self) -> None:
        expected, body = self.ask(stream=True)
        with self.client.post("/v1/chat/completions", json=body, catch_response=True, name="streamed") as reply:
            lines = [line for line in reply.text.split("\n\n") if line]
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
            answer = "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)
            if answer != expected or lines[-1] != "data: [DONE]":
                reply.failure(f"{answer!r} instead of {expected!r}")
        self.on_answer()
