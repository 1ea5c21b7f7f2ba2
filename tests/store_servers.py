"""Servers that stores talk to, started by the tests: S3, Redis, and a connection between that fails on demand."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest

__all__ = ["Fault", "Proxy", "redis_server", "s3_server"]

Fault = Literal["none", "stall", "reset", "error", "denied", "partial", "slow", "flip"]
"""stall: says nothing any more. reset: ends connections. error: HTTP 500. denied: HTTP 403. partial: ends in the
middle of an answer. slow: 10 kB/s. flip: a bit of an answer's body is another."""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_it_listens(process: subprocess.Popen[bytes], address: tuple[str, int] | str) -> None:
    family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
    for _ in range(600):
        with socket.socket(family) as probe, contextlib.suppress(OSError):
            probe.connect(address)
            return
        assert process.poll() is None, f"the server ended with {process.returncode}"
        time.sleep(0.1)
    raise AssertionError("the server does not listen")


@contextmanager
def s3_server(directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """moto's S3 server with a bucket `bucket`: the process and its port."""
    port = _free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with (directory / "moto.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _wait_until_it_listens(process, ("127.0.0.1", port))
        _request(port, b"PUT /bucket HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        yield process, port
    finally:
        process.kill()
        process.wait()


def _request(port: int, text: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(text)
        assert b" 200 " in connection.recv(4096)


@contextmanager
def redis_server(directory: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A redis-server of its own: the process and its port. The socket is `directory/redis.sock`."""
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("there is no redis-server here; apt-get install redis-server")
    port = _free_port()
    options = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory), *options)
    command = [binary, *options, "--unixsocket", str(directory / "redis.sock")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_until_it_listens(process, ("127.0.0.1", port))
        yield process, port
    finally:
        process.kill()
        process.wait()


class Proxy:
    """Passes TCP connections on to a port, or fails as `fault` says; to be changed at any time.

    Args:
        target: The port behind it.
        after: Bytes of an answer that `partial` lets through and `flip` leaves alone.
    """

    def __init__(self, target: int, *, after: int = 2000) -> None:
        self.target = target
        self.fault: Fault = "none"
        self.connections = 0
        self._after = after
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Stop; connections end."""
        self._stopped.set()
        # Wakes the thread that accepts.
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
        for thread in self._threads:
            thread.join(timeout=10)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            client, _ = self._listener.accept()
            self.connections += 1
            thread = threading.Thread(target=self._serve, args=(client,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", self.target), timeout=5) as server,
        ):
            self._relay(client, server)

    def _relay(self, client: socket.socket, server: socket.socket) -> None:
        answered = 0
        while not self._stopped.is_set():
            for source in select.select([client, server], [], [], 0.05)[0]:
                if self.fault == "stall":
                    self._stopped.wait(0.05)
                    continue
                if self.fault == "reset":
                    # Closing with nothing waited for sends a reset.
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    return
                data = source.recv(1 << 16)
                if not data:
                    return
                if source is client:
                    answered = 0
                    if self.fault in ("error", "denied"):
                        status = b"500" if self.fault == "error" else b"403"
                        client.sendall(b"HTTP/1.1 %s No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)
                        return
                    server.sendall(data)
                elif not self._answer(client, data, answered):
                    return
                else:
                    answered += len(data)

    def _answer(self, client: socket.socket, data: bytes, answered: int) -> bool:
        """Pass a piece of an answer on; False ends the connection."""
        if self.fault == "partial":
            client.sendall(data[: max(0, self._after - answered)])
            return answered + len(data) < self._after
        if self.fault == "slow":
            for start in range(0, len(data), 500):
                client.sendall(data[start : start + 500])
                if self._stopped.wait(0.05):
                    return False
            return True
        if self.fault == "flip" and answered + len(data) > self._after:
            flipped = bytearray(data)
            # Not where a line of the protocol ends.
            flipped[len(data) // 2] ^= 1
            data = bytes(flipped)
        client.sendall(data)
        return True
