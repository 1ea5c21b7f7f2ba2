"""`POST /v1/chat/completions`: whole or as a stream.

Source: https://platform.openai.com/docs/api-reference/chat/object and .../chat-streaming
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from blockrag.errors import BlockRAGError
from blockrag.model.answer import Generation
from blockrag.prompt import parse_tool_calls
from blockrag.server.connection import GONE, ClientGoneError, EventStream, event, while_connected
from blockrag.server.errors import ApiError, api_error
from blockrag.server.prompts import is_rag, passages_of, question_of, segment_request
from blockrag.server.schemas import ChatRequest, refuse_unsupported
from blockrag.server.serving import Serving, serving_of

if TYPE_CHECKING:
    from blockrag.passage import Hit, Passage
    from blockrag.prompt import SegmentedPrompt, ToolCall

__all__ = ["Completion", "EdgeStripper", "router"]

router = APIRouter()

# A stream may take this much longer than its answer, for a client that reads slowly.
_READING_S = 5.0


@router.post("/v1/chat/completions")
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    """Answer a conversation, from documents if it brings or asks for some."""
    serving = serving_of(request)
    serving.check_model(body.model)
    refuse_unsupported(body.model_extra)
    if body.blockrag.retrieve is not None and serving.index is None:
        message = "this server has no index to search; start it with --path, or send documents"
        raise ApiError(400, message, code="unsupported_parameter", param="blockrag.retrieve")
    options = body.options(serving.settings.max_new_tokens)
    completion = Completion(serving.settings.model_name, tools=bool(body.tools), strip=is_rag(body))
    work = (partial(_prompt, serving, body, completion), options, body.blockrag.attention)
    try:
        if not body.stream:
            generation = await while_connected(request.receive, serving.complete(*work))
            return JSONResponse(completion.whole(generation))
        pieces = serving.answer(*work)
        # Nothing is sent before the first token, so that whatever may go wrong until then has its HTTP status.
        first = await while_connected(request.receive, anext(pieces))
    except ClientGoneError:
        return Response(status_code=GONE)
    include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
    events = _events(completion, first, pieces, include_usage=include_usage)
    return EventStream(events, pieces, limit_s=serving.settings.timeout_s + _READING_S)


def _prompt(serving: Serving, body: ChatRequest, completion: Completion) -> SegmentedPrompt:
    passages: list[Passage] = passages_of(body.documents)
    if body.blockrag.retrieve is not None and serving.index is not None:
        completion.sources = serving.index.search(question_of(body), body.blockrag.retrieve.top_k)
        passages += [hit.passage for hit in completion.sources]
    attention = body.blockrag.attention or serving.model.attention
    return segment_request(serving.model, body, passages, attention)


async def _events(
    completion: Completion,
    first: str | Generation,
    rest: AsyncGenerator[str | Generation, None],
    *,
    include_usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The events of a stream whose first piece is there; an error ends it as an event, without [DONE]."""
    yield event(completion.chunk({"role": "assistant", "content": ""}))
    edges = EdgeStripper() if completion.strip else None
    piece = first
    try:
        while not isinstance(piece, Generation):
            text = edges.push(piece) if edges else piece
            # A call can be told from text only when it is complete.
            if text and not completion.tools:
                yield event(completion.chunk({"content": text}))
            piece = await anext(rest)
    except BlockRAGError as error:
        yield event(api_error(error).body)
        return
    except ApiError as error:
        yield event(error.body)
        return
    message, finish_reason = completion.message(piece)
    if completion.tools:
        calls = message.get("tool_calls")
        numbered = [{"index": i, **call} for i, call in enumerate(calls)] if isinstance(calls, list) else None
        yield event(completion.chunk({**message, **({"tool_calls": numbered} if numbered else {})}))
    yield event(completion.chunk({}, finish_reason))
    if include_usage:
        yield event({**completion.envelope("chat.completion.chunk"), "choices": [], **completion.cost(piece)})
    yield b"data: [DONE]\n\n"


@dataclass(slots=True)
class Completion:
    """One answer in the API's form.

    Args:
        model: What clients call the model.
        tools: Whether the answer may be a call.
        strip: Drop the white space at the ends of the answer, as the RAG form has it.
        sources: What was found in the index.
    """

    model: str
    tools: bool = False
    strip: bool = False
    sources: Sequence[Hit] = ()
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def envelope(self, kind: str) -> dict[str, object]:
        """What every object of this answer begins with."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def whole(self, generation: Generation) -> dict[str, object]:
        """The answer in one object."""
        message, finish_reason = self.message(generation)
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish_reason}
        return {**self.envelope("chat.completion"), "choices": [choice], **self.cost(generation)}

    def chunk(self, delta: dict[str, object], finish_reason: str | None = None) -> dict[str, object]:
        """A part of it, for a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self.envelope("chat.completion.chunk"), "choices": [choice]}

    def message(self, generation: Generation) -> tuple[dict[str, object], str]:
        """The assistant's message, and why it ended."""
        text, calls = parse_tool_calls(generation.text) if self.tools else (generation.text, ())
        message: dict[str, object] = {"role": "assistant", "content": text.strip() if self.strip else text}
        if not calls:
            return message, generation.finish_reason
        return {**message, "content": text or None, "tool_calls": [_call(call) for call in calls]}, "tool_calls"

    def cost(self, generation: Generation) -> dict[str, object]:
        """Usage in the API's form, and what only blockrag knows."""
        usage = generation.usage
        known: dict[str, object] = {
            "blocks_reused": usage.blocks_reused,
            "blocks_computed": usage.blocks_computed,
            "blocks_damaged": usage.blocks_damaged,
            "blocks_missing": usage.blocks_missing,
            "store_failures": usage.store_failures,
            "model_ttft_s": generation.timings.ttft_s,
        }
        if self.sources:
            known["sources"] = [
                {
                    "id": hit.passage.id,
                    "document_id": hit.passage.document_id,
                    "title": hit.passage.title,
                    "text": hit.passage.text,
                    "score": hit.score,
                }
                for hit in self.sources
            ]
        return {"usage": usage.as_openai(), "blockrag": known}


def _call(call: ToolCall) -> dict[str, object]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments))}
    return {"id": call.id, "type": "function", "function": function}


class EdgeStripper:
    """Drops the white space at both ends of a text that comes in pieces; the last of it is never passed on."""

    def __init__(self) -> None:
        self._begun = False
        self._held = ""

    def push(self, piece: str) -> str:
        """What can be passed on now."""
        text = self._held + (piece if self._begun else piece.lstrip())
        shown = text.rstrip()
        self._begun, self._held = self._begun or bool(shown), text[len(shown) :]
        return shown
