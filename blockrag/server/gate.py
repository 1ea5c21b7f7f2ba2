"""Who may use the model now, who waits, and who is sent away. Counts requests; knows nothing about what they want."""

from __future__ import annotations

import asyncio
from collections import deque

from blockrag.server.errors import ApiError

__all__ = ["Gate", "shutting_down"]


def shutting_down() -> ApiError:
    """What those see who come too late, or whose answer took too long, when the server stops."""
    return ApiError(503, "the server is shutting down; ask another one, or later", code="shutting_down")


class Gate:
    """Lets a number of requests in; the others wait in order of arrival, and too many of them are sent away.

    For one event loop; not for several threads.

    Args:
        max_concurrent: Requests inside.
        max_queue: Requests waiting.
    """

    def __init__(self, *, max_concurrent: int, max_queue: int) -> None:
        self._max_concurrent = max_concurrent
        self._max_queue = max_queue
        self._turns: deque[asyncio.Future[None]] = deque()
        self.running = 0
        """Requests inside."""
        self.closed = False
        """Whether nobody else is let in."""

    @property
    def waiting(self) -> int:
        """Requests that wait for their turn."""
        return len(self._turns)

    async def enter(self, timeout_s: float) -> None:
        """Wait for one's turn; whoever got in must `leave`.

        Args:
            timeout_s: Longest time to wait.

        Raises:
            ApiError: 503: the queue is full, or the gate is or was closed.
            TimeoutError: The turn did not come in time.
        """
        if self.closed:
            raise shutting_down()
        if self.running < self._max_concurrent:
            self.running += 1
            return
        if len(self._turns) >= self._max_queue:
            message = f"{self.running} requests are being answered and {self.waiting} wait; try again in a second"
            raise ApiError(503, message, code="queue_full", headers={"Retry-After": "1"})
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        timer = loop.call_later(timeout_s, _expire, turn)
        self._turns.append(turn)
        try:
            await turn
        except BaseException:
            if turn in self._turns:
                self._turns.remove(turn)
            elif not turn.cancelled() and turn.exception() is None:
                # The turn came in the very moment in which the one waiting for it left.
                self.leave()
            raise
        finally:
            timer.cancel()

    def leave(self) -> None:
        """Give one's place to whoever waits longest."""
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.running -= 1

    def close(self) -> None:
        """Let nobody in any more; those who wait are sent away, those inside go on."""
        self.closed = True
        while self._turns:
            turn = self._turns.popleft()
            if not turn.done():
                turn.set_exception(shutting_down())


def _expire(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_exception(TimeoutError())
