"""The client at the other end: noticing that it left, and sending it events.

Source: https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import StreamingResponse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

__all__ = ["GONE", "ClientGoneError", "EventStream", "event", "while_connected"]

GONE = 499
"""Status under which requests are counted whose client left; nobody receives it."""

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was complete."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Do some work as long as the client is there; cancel it when the client leaves.

    Args:
        receive: The request's, whose body was read to its end.
        work: What to do.

    Raises:
        ClientGoneError: The client left.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def event(value: object) -> bytes:
    """A server-sent event with a JSON value."""
    return b"data: " + json.dumps(value).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events, one by one as they come; when the client leaves, their source is closed.

    Args:
        events: The encoded events.
        source: What they are made from; it is closed with them, also if no event was taken.
        limit_s: Longest time for all of them to be taken: a client that stops reading must not keep its place.
    """

    def __init__(
        self, events: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None], *, limit_s: float
    ) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._source = source
        self._limit_s = limit_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events; a response left incomplete makes the server close the connection."""
        async with aclosing(self._source), aclosing(self._events):
            with suppress(ClientGoneError, asyncio.TimeoutError):
                await asyncio.wait_for(while_connected(receive, self.stream_response(send)), self._limit_s)
