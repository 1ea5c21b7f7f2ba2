"""Streamed answers as LlamaIndex wants them: under its callbacks, closed when they are left, and as completions."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, closing
from typing import Any, TypeVar

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.llms.generic_utils import chat_response_to_completion_response
from llama_index.core.base.llms.types import (
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
)

__all__ = ["acompletions", "aobserved", "completion_of", "completions", "observed"]

T = TypeVar("T")


def observed(
    callback: Callable[..., Any],
    start: Callable[..., Generator[T, None, None]],
    llm: BaseLLM,
    asked: object,
    kwargs: dict[str, Any],
) -> Generator[T, None, None]:
    """Start an answer under LlamaIndex's callbacks.

    Theirs is a generator around ours, which forgets to close it. Ours would stay open for as long as anybody remembers
    the exception that ended theirs, and with it the cache of its prompt.
    """
    started: list[Generator[T, None, None]] = []

    def begin(_: BaseLLM, asked: object, **kwargs: Any) -> Generator[T, None, None]:
        started.append(start(asked, **kwargs))
        return started[0]

    def both(pieces: Generator[T, None, None]) -> Generator[T, None, None]:
        with closing(started[0]), closing(pieces):
            yield from pieces

    return both(callback(begin)(llm, asked, **kwargs))


async def aobserved(
    callback: Callable[..., Any],
    start: Callable[..., Awaitable[AsyncGenerator[T, None]]],
    llm: BaseLLM,
    asked: object,
    kwargs: dict[str, Any],
) -> AsyncGenerator[T, None]:
    """`observed` for an asynchronous answer."""
    started: list[AsyncGenerator[T, None]] = []

    async def begin(_: BaseLLM, asked: object, **kwargs: Any) -> AsyncGenerator[T, None]:
        started.append(await start(asked, **kwargs))
        return started[0]

    async def both(pieces: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        async with aclosing(started[0]), aclosing(pieces):
            async for piece in pieces:
                yield piece

    return both(await callback(begin)(llm, asked, **kwargs))


def completion_of(response: ChatResponse) -> CompletionResponse:
    """A chat response as a completion."""
    completion = chat_response_to_completion_response(response)
    completion.delta = response.delta
    return completion


def completions(responses: ChatResponseGen) -> CompletionResponseGen:
    """Streamed chat responses as completions."""
    with closing(responses):
        for response in responses:
            yield completion_of(response)


async def acompletions(responses: ChatResponseAsyncGen) -> CompletionResponseAsyncGen:
    """`completions` of an asynchronous answer."""
    async with aclosing(responses):
        async for response in responses:
            yield completion_of(response)
