"""How large a request may be, and how long it may take to arrive: counted as it comes, whatever its headers promise."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from starlette.datastructures import Headers

from blockrag.server.errors import ApiError, error_response

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = ["BodyLimits"]


class BodyLimits:
    """ASGI middleware that stops reading a body that is too long or too slow.

    Args:
        app: What is behind it.
        max_bytes: Longest body, also for one sent in chunks.
        timeout_s: Longest time for it to arrive.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, timeout_s: float) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 413, or pass the request on with its body counted."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, self._counted(receive), send)

    def _counted(self, receive: Receive) -> Receive:
        received, complete = 0, False
        deadline = asyncio.get_running_loop().time() + self._timeout_s

        async def counted() -> Message:
            nonlocal received, complete
            if complete:
                # Behind the body comes nothing but the client's leaving, for which one may wait.
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
            except asyncio.TimeoutError:
                text = f"the body did not arrive within {self._timeout_s:g} s; send it faster, or send less"
                raise ApiError(408, text, code="request_timeout", headers={"Connection": "close"}) from None
            received += len(message.get("body", b""))
            complete = not message.get("more_body", False)
            if received > self._max_bytes:
                raise self._too_large()
            return message

        return counted

    def _too_large(self) -> ApiError:
        return ApiError(
            413,
            f"the body is longer than {self._max_bytes} bytes; send fewer or shorter documents, or start the server "
            "with a larger --max-body",
            code="request_too_large",
            # What was not read of it would be taken for the next request.
            headers={"Connection": "close"},
        )
