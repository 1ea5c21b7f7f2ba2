"""Who may call: whoever sends the key; without a key, programs and pages of this machine.

Without a key the server listens on a loopback address only. A web page of another site can still make the browser on
this machine send requests there, or have its own name resolve to 127.0.0.1 ("DNS rebinding"); what it sends says so in
`Origin` or `Host`, and is refused.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from blockrag.server.errors import ApiError, error_response
from blockrag.server.settings import is_loopback

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

__all__ = ["Access"]

# What load balancers ask, which have no key.
_OPEN = ("/health",)


class Access:
    """ASGI middleware that lets through whoever may call.

    Args:
        app: What is behind it.
        api_key: The key; None for everybody on this machine.
    """

    def __init__(self, app: ASGIApp, *, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer 401 or 403, or pass the request on."""
        if scope["type"] == "http" and scope["path"] not in _OPEN:
            error = self._refusal(Headers(scope=scope))
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        if self._expected is not None:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            # Compared in constant time, so that the answer's delay says nothing about the key.
            if secrets.compare_digest(given.strip().encode(), self._expected) and scheme.lower() == "bearer":
                return None
            message = "the API key is missing or wrong; send it as 'Authorization: Bearer KEY'"
            return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        for name, prefix in (("host", "//"), ("origin", "")):
            value = headers.get(name)
            if value is not None and not is_loopback(_hostname(prefix + value)):
                return ApiError(
                    403,
                    f"{name} is {value!r:.100}, and without an API key only this machine is served; call it by its "
                    "loopback address, or start the server with a key",
                    code="foreign_origin",
                )
        return None


def _hostname(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
