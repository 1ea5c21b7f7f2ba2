"""Listening, and stopping without breaking off answers: a SIGTERM or SIGINT lets them finish, a second SIGINT does not.

Source: https://www.uvicorn.org/server-behavior/#graceful-process-shutdown
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import uvicorn

from blockrag.errors import InputError
from blockrag.server.serving import Serving

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Server", "listen", "serve"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Answers that the server ended still have to be sent, and a step that runs cannot be interrupted.
_LAST_WORDS_S = 5


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address; nobody can connect until it is served.

    Args:
        host: Name or address.
        port: Port; 0 for a free one.

    Raises:
        InputError: The address does not exist here, or is taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        raise InputError(f"cannot listen on {host!r}, port {port} ({error}); pass another --host or --port") from error
    return bound


class Server(uvicorn.Server):
    """A uvicorn server that closes the gate when it is told to stop.

    Args:
        app: An application from `create_app`.
        on_ready: Called when requests are taken.
    """

    def __init__(self, app: FastAPI, on_ready: Callable[[], None] | None = None) -> None:
        self._serving: Serving = app.state.serving
        self._on_ready = on_ready
        limit_s = int(self._serving.settings.shutdown_s) + _LAST_WORDS_S
        super().__init__(
            uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=limit_s, lifespan="off")
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Take requests.

        Raises:
            InputError: Another program listens on the address since `listen` bound it.
        """
        try:
            await super().startup(sockets)
        except OSError as error:
            raise InputError(f"cannot listen any more ({error}); pass another --host or --port") from error
        if self._on_ready is not None:
            self._on_ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Take no more, and wait for the answers in progress."""
        self._serving.stop()
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Stop at a signal, and return as usual: whoever opened the store must be able to close it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def serve(app: FastAPI, bound: socket.socket, *, on_ready: Callable[[], None] | None = None) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        app: An application from `create_app`.
        bound: Where to listen, from `listen`; it is closed at the end.
        on_ready: Called when requests are taken.

    Raises:
        InputError: Another program was faster to listen on the same address.
    """
    log = logging.getLogger("uvicorn.error")
    log.addFilter(_tells_something)
    try:
        with bound:
            Server(app, on_ready).run(sockets=[bound])
    finally:
        log.removeFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    """Whether a record is worth showing: a second Ctrl-C ends every answer with a traceback that nobody asked for."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))
