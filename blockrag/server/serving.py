"""Answers from the model's one worker thread: in turn, in time, until the client leaves or the server stops.

Requests that were let in share the model step by step, so that a long answer does not hold up a short one. A step that
runs cannot be interrupted (computing many new passages is one); whatever ends a request ends it before the next.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar, cast

from blockrag.model.answer import Generation
from blockrag.model.materialize import MaterializeReport
from blockrag.model.stream import ResultStream
from blockrag.server.errors import ApiError
from blockrag.server.gate import Gate, shutting_down
from blockrag.server.metrics import Metrics

if TYPE_CHECKING:
    from fastapi import Request

    from blockrag.index import PassageIndex
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.model.sampling import GenerationOptions
    from blockrag.prompt import Block, SegmentedPrompt
    from blockrag.server.settings import ServerSettings

__all__ = ["Serving", "serving_of"]

T = TypeVar("T")

# Passages that are computed in one step; between steps, answers go on.
_BLOCKS_AT_ONCE = 16


@dataclass(slots=True)
class Serving:
    """What all routes share.

    Args:
        model: The model.
        settings: Limits.
        index: Where passages can be searched for; None for nowhere.
    """

    model: BlockModel
    settings: ServerSettings
    index: PassageIndex | None = None
    gate: Gate = field(init=False)
    metrics: Metrics = field(init=False)
    _stops_at: float = math.inf

    def __post_init__(self) -> None:
        self.gate = Gate(max_concurrent=self.settings.max_concurrent, max_queue=self.settings.max_queue)
        self.metrics = Metrics(self.gate, self.model.store)

    def check_model(self, name: str | None) -> None:
        """Refuse requests for another model.

        Raises:
            ApiError: 404.
        """
        if name not in (None, self.settings.model_name):
            message = f"there is no model {name!r:.100} here; pass {self.settings.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def stop(self) -> None:
        """Let nobody in any more, and end the answers that are not complete in `shutdown_s` seconds."""
        self._stops_at = time.monotonic() + self.settings.shutdown_s
        self.gate.close()

    async def answer(
        self, prepare: Callable[[], SegmentedPrompt], options: GenerationOptions, attention: Attention | None
    ) -> AsyncGenerator[str | Generation, None]:
        """Answer one prompt.

        Args:
            prepare: Makes the prompt, in another thread, when the request's turn has come.
            options: How to generate.
            attention: "block" or "full"; by default the model's.

        Yields:
            The text of each token as it becomes certain (the first one also if it has none), then the whole.

        Raises:
            ApiError: 503 or 504: there was no time for it.
            BlockRAGError: The prompt or the store cannot be used.
        """
        started = time.monotonic()
        async with self._turn(started) as deadline:
            prompt = await self._within(deadline, asyncio.to_thread(prepare))
            pieces = self.model.stream(prompt, options, attention=attention)
            first = True
            async for chunk in self._steps(pieces, deadline):
                if first:
                    self.metrics.first_token(time.monotonic() - started)
                if first or chunk.text:
                    yield chunk.text
                first = False
        self.metrics.answered(pieces.result.usage)
        yield pieces.result

    async def complete(
        self, prepare: Callable[[], SegmentedPrompt], options: GenerationOptions, attention: Attention | None
    ) -> Generation:
        """The whole of an `answer`."""
        async with aclosing(self.answer(prepare, options, attention)) as pieces:
            async for piece in pieces:
                if isinstance(piece, Generation):
                    return piece
        raise AssertionError("an answer ends with its generation")

    async def materialize(
        self, prepare: Callable[[], list[Block]], on_block: Callable[[Block, bool, int], None]
    ) -> MaterializeReport:
        """Compute the blocks that the store lacks, some at a time.

        Args:
            prepare: Makes the blocks, none of them empty; see `answer`.
            on_block: See `BlockModel.materialize`.

        Raises:
            ApiError: 503 or 504: there was no time for it; what was computed stays.
            BlockRAGError: The store cannot take a block, or the model no block of that length.
        """
        async with self._turn(time.monotonic()) as deadline:
            blocks = await self._within(deadline, asyncio.to_thread(prepare))

            def batches() -> Generator[int, None, MaterializeReport]:
                reports = []
                for start in range(0, len(blocks), _BLOCKS_AT_ONCE):
                    batch = blocks[start : start + _BLOCKS_AT_ONCE]
                    reports.append(self.model.materialize(batch, on_block=on_block))
                    yield start
                return MaterializeReport.total(reports)

            work = ResultStream(batches())
            async for _ in self._steps(work, deadline):
                pass
        return work.result

    @asynccontextmanager
    async def _turn(self, started: float) -> AsyncIterator[float]:
        """Wait for one's turn, and have it; gives the time until which it lasts."""
        deadline = started + self.settings.timeout_s
        try:
            await self.gate.enter(self._left(deadline))
        except TimeoutError:
            raise self._too_late() from None
        try:
            yield deadline
        finally:
            self.gate.leave()

    async def _steps(self, pieces: ResultStream[T, Any], deadline: float) -> AsyncGenerator[T, None]:
        """The pieces, made on the model's worker thread."""
        steps = cast("AsyncGenerator[T, None]", self.model.on_worker(pieces))
        async with aclosing(steps):
            while True:
                try:
                    piece = await self._within(deadline, anext(steps))
                except StopAsyncIteration:
                    return
                yield piece

    async def _within(self, deadline: float, work: Awaitable[T]) -> T:
        """Wait for something as long as there is time.

        Not `asyncio.wait_for`, which before Python 3.12 loses a cancellation that comes with the result.

        Raises:
            ApiError: See `_too_late`.
        """
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task}, timeout=self._left(deadline))
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        if task.cancelled():
            raise self._too_late()
        return task.result()

    def _left(self, deadline: float) -> float:
        """Seconds until a request's time is up, or the server's."""
        return max(0.0, min(deadline, self._stops_at) - time.monotonic())

    def _too_late(self) -> ApiError:
        """What those see whose time is up: 503 if the server's is as well, else 504."""
        if time.monotonic() >= self._stops_at:
            return shutting_down()
        message = (
            f"there was no complete answer within {self.settings.timeout_s:g} s; ask for fewer tokens, send fewer "
            "documents, or start the server with a longer --timeout"
        )
        return ApiError(504, message, code="timeout")


def serving_of(request: Request) -> Serving:
    """What the application that a request came to serves."""
    serving = request.app.state.serving
    if not isinstance(serving, Serving):
        raise TypeError(f"the application serves {serving!r}; make it with create_app()")
    return serving
