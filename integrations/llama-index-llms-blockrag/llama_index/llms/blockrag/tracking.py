"""Tracking: which passages a stock response synthesizer is about to paste into a prompt.

LlamaIndex joins the retrieved passages to one string before the language model is called. Its own instrumentation names
them a moment earlier: the span of `BaseSynthesizer.synthesize` carries the nodes, and that of `LLM.predict` (or stream,
apredict, ...) the string they were joined to. A span handler puts both into a context variable for as long as the call
lasts, streamed answers included, and `BlockRAGLLM` finds the passages again in the prompt's text. The handler changes
no prompt, stores nothing beyond the span, and no other language model reads the variable. Context variables follow
threads and tasks, so that concurrent requests never see each other's passages.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from inspect import BoundArguments
from typing import Any

from llama_index.core.base.llms.base import BaseLLM
from llama_index.core.base.response.schema import AsyncStreamingResponse, StreamingResponse
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.llms.blockrag.blocks import excerpt_of
from llama_index_instrumentation import get_dispatcher

from blockrag.prompt.message import Excerpt

__all__ = ["Tracked", "TrackingCounts", "asking", "current", "install", "track_passages"]


@dataclass(frozen=True)
class Tracked:
    """What is known of the prompt that is being made.

    Args:
        query: What the user asked.
        excerpts: The passages that may be in the prompt, as its text shows them.
        refines: The prompt also shows an earlier answer, which is to be refined.
        own: Known from our own synthesizer rather than from the handler, and therefore not to be switched off.
    """

    query: str
    excerpts: tuple[Excerpt, ...] = ()
    pasted: tuple[str, ...] = ()
    refines: bool = False
    own: bool = False


_TRACKED: ContextVar[Tracked | None] = ContextVar("blockrag_tracked", default=None)
_SWITCH: ContextVar[bool | None] = ContextVar("blockrag_track_passages", default=None)
_LOCK = threading.Lock()
# How templates of synthesizers and chat engines name the passages, and the answer that is to be refined.
_PASTED, _REFINED = ("context_str", "context_msg"), "existing_answer"


def current(enabled: bool) -> Tracked | None:
    """What is known here and now.

    Args:
        enabled: Whether the language model that asks tracks passages, unless `track_passages` says otherwise.
    """
    tracked = _TRACKED.get()
    switch = _SWITCH.get()
    wanted = enabled if switch is None else switch
    return tracked if tracked is not None and (wanted or tracked.own) else None


@contextmanager
def track_passages(enabled: bool = True) -> Iterator[None]:
    """Switch tracking on or off for every `BlockRAGLLM` called in this context, whatever its own setting.

    Args:
        enabled: Whether to track.
    """
    if enabled:
        install()
    token = _SWITCH.set(enabled)
    try:
        yield
    finally:
        _SWITCH.reset(token)


@contextmanager
def asking(query: str) -> Iterator[None]:
    """Say what is asked by the calls made in this context, whose messages hold their passages as blocks."""
    token = _TRACKED.set(Tracked(query, own=True))
    try:
        yield
    finally:
        _TRACKED.reset(token)


def install() -> None:
    """Put the handler at LlamaIndex's root dispatcher, once per process."""
    root = get_dispatcher()
    with _LOCK:
        if not any(isinstance(handler, PassageSpanHandler) for handler in root.span_handlers):
            root.add_span_handler(PassageSpanHandler())


class TrackingCounts:
    """How often passages were found again; copies start from zero.

    The counts: `found` passages that are blocks, `missing` ones whose text was split or rewritten, `in_question` ones
    that the question quotes, and `no_passages` calls that had none.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type[TrackingCounts], tuple[()]]:
        return (TrackingCounts, ())

    def add(self, **counts: int) -> None:
        """Count."""
        with self._lock:
            self._counts.update(counts)

    def as_dict(self) -> dict[str, int]:
        """All four counts."""
        with self._lock:
            return {name: self._counts[name] for name in ("found", "missing", "in_question", "no_passages")}


class _PassageSpan(BaseSpan):
    """A span that changed the variable: what the variable held before, and what it holds inside."""

    before: Any = None
    inside: Any = None


class PassageSpanHandler(BaseSpanHandler[_PassageSpan]):
    """Keeps the context variable in step with the spans of response synthesizers and of the prompts they make."""

    @classmethod
    def class_name(cls) -> str:
        """The handler's name."""
        return "PassageSpanHandler"

    def new_span(
        self,
        id_: str,
        bound_args: BoundArguments,
        instance: Any | None = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> _PassageSpan | None:
        """Note what the span tells about passages; no span of ours where it tells nothing."""
        before = _TRACKED.get()
        inside = _told(instance, bound_args.arguments, before)
        if inside is None:
            return None
        _TRACKED.set(inside)
        return _PassageSpan(id_=id_, parent_id=parent_span_id, before=before, inside=inside)

    def prepare_to_exit_span(
        self,
        id_: str,
        bound_args: BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> _PassageSpan | None:
        """Forget it; an answer that is still to be streamed takes it along, since it calls the model only then."""
        span = self.prepare_to_drop_span(id_, bound_args, instance)
        if span is None or not isinstance(result, (StreamingResponse, AsyncStreamingResponse)):
            return span
        # Whatever else a synthesizer of somebody's own streams, it does not call the model as it goes.
        if isinstance(result.response_gen, Generator):
            result.response_gen = _within(span.inside, result.response_gen)
        elif isinstance(result.response_gen, AsyncGenerator):
            result.response_gen = _awithin(span.inside, result.response_gen)
        return span

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> _PassageSpan | None:
        """Forget it."""
        span = self.open_spans.get(id_)
        if span is not None:
            _TRACKED.set(span.before)
        return span


def _told(instance: object, arguments: Mapping[str, Any], before: Tracked | None) -> Tracked | None:
    """What a span with these arguments tells, or None."""
    if isinstance(instance, BaseSynthesizer) and "nodes" in arguments:
        query = arguments["query"]
        return Tracked(
            query if isinstance(query, str) else query.query_str,
            tuple(excerpt_of(hit.node) for hit in arguments["nodes"]),
        )
    prompt = arguments.get("prompt")
    if before is None or not isinstance(instance, BaseLLM) or not isinstance(prompt, BasePromptTemplate):
        return None
    values = {**prompt.kwargs, **arguments.get("prompt_args", {})}
    pasted = tuple(values[name] for name in _PASTED if isinstance(values.get(name), str))
    refines = _REFINED in values
    # A prompt within a prompt, as structured answers have it, need not say it again.
    told = replace(before, pasted=pasted or before.pasted, refines=refines or before.refines)
    return told if pasted or refines else None


def _within(tracked: Tracked, pieces: Generator[str, None, None]) -> Generator[str, None, None]:
    try:
        while True:
            token = _TRACKED.set(tracked)
            try:
                piece = next(pieces)
            except StopIteration:
                return
            finally:
                _TRACKED.reset(token)
            yield piece
    finally:
        pieces.close()


async def _awithin(tracked: Tracked, pieces: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    async with aclosing(pieces):
        while True:
            token = _TRACKED.set(tracked)
            try:
                piece = await anext(pieces)
            except StopAsyncIteration:
                return
            finally:
                _TRACKED.reset(token)
            yield piece
