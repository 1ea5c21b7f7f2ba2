"""What requests hold: the OpenAI API's fields, vLLM's `documents`, and blockrag's own under `blockrag`.

A field is declared here if it does something. Fields of the OpenAI API that do not are refused where they would change
the answer, and ignored where they would not; a field that nobody knows is refused, since it may be a misspelled one.
Source: https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

import reprlib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from blockrag.model.sampling import LEAST_TEMPERATURE, PENALTIES, GenerationOptions
from blockrag.server.errors import ApiError

__all__ = [
    "BlocksRequest",
    "ChatMessage",
    "ChatRequest",
    "Document",
    "RequestedToolCall",
    "SeedRequest",
    "refuse_unsupported",
]

# Fields of the OpenAI API that change no answer.
_IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# Fields that would change the answer, with the values that do not; None never does.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "n": (1,),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "top_logprobs": (0,),
    "web_search_options": (),
}


def refuse_unsupported(extra: dict[str, Any] | None) -> None:
    """Check the fields that nothing declares.

    Args:
        extra: Their names and values.

    Raises:
        ApiError: 400: one of them would change the answer, or is unknown.
    """
    for name, value in (extra or {}).items():
        if value is None or name in _IGNORED or value in _NEUTRAL.get(name, ()):
            continue
        known = name in _NEUTRAL
        message = f"{name}={reprlib.repr(value)} is not supported" if known else f"there is no field {name!r}"
        code = "unsupported_parameter" if known else "unknown_parameter"
        raise ApiError(400, f"{message}; leave it out", code=code, param=name)


def _as_parts(value: object) -> object:
    """`content` as a list of parts, whichever of its forms it has."""
    if value is None:
        return []
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


def _as_list(value: object) -> object:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


def _without_none(value: object) -> object:
    return "" if value is None else value


_Text = Annotated[str, BeforeValidator(_without_none)]
_Positive = Annotated[int, Field(ge=1)]


def _divisor(temperature: float) -> float:
    if 0 < temperature < LEAST_TEMPERATURE:
        raise ValueError(f"pass 0 for the likeliest tokens, or at least {LEAST_TEMPERATURE:g}")
    return temperature


class _Strict(BaseModel):
    """A part of a request in which nothing may be misspelled, and a number is no string."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Lenient(BaseModel):
    """A part of a request that may bring what it was answered with, or what only other servers know."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Document(_Strict):
    """A passage to answer from."""

    text: str
    title: _Text = ""
    id: _Text = ""


class PassageMark(_Strict):
    """Marks a text part as a passage."""

    passage: Literal[True]
    title: _Text = ""
    id: _Text = ""


class TextPart(_Strict):
    """A part of a message: text, or a passage in its place in the conversation."""

    type: Literal["text"]
    text: str
    blockrag: PassageMark | None = None


class RequestedFunction(_Lenient):
    """The function of a call, its arguments as JSON text."""

    name: str
    arguments: str


class RequestedToolCall(_Lenient):
    """A call that an earlier answer made."""

    id: str
    function: RequestedFunction


class ChatMessage(_Lenient):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)] = Field(default_factory=list)
    tool_calls: Annotated[list[RequestedToolCall], BeforeValidator(_as_list)] = Field(default_factory=list)
    tool_call_id: _Text = ""
    name: _Text = ""


class Retrieve(_Strict):
    """Look for passages in the server's own index."""

    top_k: int = Field(default=5, ge=1, le=100)


class BlockRAGOptions(_Strict):
    """What only blockrag knows.

    `form`: "rag" is the prompt the model was block-fine-tuned on, "chat" shows every message as it is; by default the
    former where there are documents.
    """

    attention: Literal["block", "full"] | None = None
    form: Literal["rag", "chat"] | None = None
    retrieve: Retrieve | None = None


class StreamOptions(_Lenient):
    """What a stream tells besides the answer."""

    include_usage: bool | None = False


class _Sampled(BaseModel):
    """How the answer is generated, where a request says so."""

    temperature: Annotated[float, Field(ge=0), AfterValidator(_divisor)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=PENALTIES[0], le=PENALTIES[1])] | None = None
    seed: int | None = None
    stop: Annotated[list[str], BeforeValidator(_as_list)] = Field(default_factory=list)
    ignore_eos: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer."""
        raise AssertionError("every request says it under a name of its own")

    def options(self, most_tokens: int) -> GenerationOptions:
        """The library's options.

        Args:
            most_tokens: Where the request does not say.

        Raises:
            InputError: A value is out of range.
        """
        given = {name: getattr(self, name) for name in _Sampled.model_fields}
        return GenerationOptions(max_new_tokens=most_tokens).updated({**given, "max_new_tokens": self.most_tokens})


class ChatRequest(_Sampled):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    messages: list[ChatMessage] = Field(min_length=1)
    model: str | None = None
    documents: Annotated[list[Document], BeforeValidator(_as_list)] = Field(default_factory=list)
    blockrag: BlockRAGOptions = Field(default_factory=BlockRAGOptions)
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: _Positive | None = None
    max_completion_tokens: _Positive | None = None
    tools: Annotated[list[dict[str, Any]], BeforeValidator(_as_list)] = Field(default_factory=list)
    tool_choice: Literal["none", "auto"] | None = None

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer, under its newer name if both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class SeedRequest(_Sampled):
    """`POST /generate`, the call of the method's own server: blocks as strings, the last one global.

    Source: https://github.com/TemporaryLoRA/Block-Attention (server/block_generate_server.py).
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    blocks: list[str] = Field(min_length=1)
    num_local_attention_blocks: int = Field(default=10_000, ge=0)
    max_new_tokens: _Positive | None = None
    allow_special: bool = False

    @property
    def most_tokens(self) -> int | None:
        """Most tokens of the answer."""
        return self.max_new_tokens


class BlocksRequest(_Strict):
    """`POST /v1/blocks`."""

    documents: list[Document] = Field(min_length=1)
