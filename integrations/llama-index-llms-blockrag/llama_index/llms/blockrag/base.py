"""`BlockRAGLLM`: a language model of LlamaIndex whose prompts are composed from stored blocks.

Its fields are plain configuration, so that it can be copied, pickled and sent to workers; the model behind it is loaded
when it is first needed and shared by every component with the same configuration (`blockrag.model.shared`). All eight
endpoints run on the model itself: the asynchronous ones step by step on its worker thread, so that the event loop never
waits and an answer nobody reads any more is dropped.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast
from urllib.parse import urlsplit, urlunsplit

from llama_index.core.base.llms.types import (
    ChatMessage,
    ChatResponse,
    ChatResponseAsyncGen,
    ChatResponseGen,
    CompletionResponse,
    CompletionResponseAsyncGen,
    CompletionResponseGen,
    ContentBlock,
    LLMMetadata,
    MessageRole,
    TextBlock,
    ToolCallBlock,
)
from llama_index.core.bridge.pydantic import ConfigDict, Field, PrivateAttr
from llama_index.core.constants import DEFAULT_CONTEXT_WINDOW
from llama_index.core.instrumentation.span import active_span_id
from llama_index.core.llms.callbacks import llm_chat_callback, llm_completion_callback
from llama_index.core.llms.function_calling import FunctionCallingLLM
from llama_index.core.llms.llm import ToolSelection
from llama_index.llms.blockrag import tracking
from llama_index.llms.blockrag.events import BlockCacheEvent
from llama_index.llms.blockrag.messages import Prepared, prepare
from llama_index.llms.blockrag.model_fields import config_of, fields_of
from llama_index.llms.blockrag.nodes import PromptForm
from llama_index.llms.blockrag.streams import acompletions, aobserved, completion_of, completions, observed
from llama_index.llms.blockrag.tool_calls import arguments_of, shown_of, split_calls
from llama_index_instrumentation import get_dispatcher

from blockrag.codec import Precision
from blockrag.errors import InputError
from blockrag.model.sampling import GenerationOptions
from blockrag.model.shared import register_model, shared_model
from blockrag.model.stream import ResultStream
from blockrag.prompt.tools import supports_tools

if TYPE_CHECKING:
    from llama_index.core.tools.types import BaseTool
    from transformers import PreTrainedTokenizerBase
    from typing_extensions import Self

    from blockrag.model.answer import Generation
    from blockrag.model.block_model import BlockModel
    from blockrag.model.config import ModelConfig
    from blockrag.prompt.message import ToolCall

__all__ = ["BlockRAGLLM"]

dispatcher = get_dispatcher(__name__)


@dataclass(frozen=True)
class _Answered:
    """A complete answer: its text apart from calls, the calls, and what it cost."""

    text: str
    calls: tuple[ToolCall, ...]
    generation: Generation
    prepared: Prepared


class BlockRAGLLM(FunctionCallingLLM):
    """A causal language model with block attention, for LlamaIndex.

    Stock query engines and chat engines keep their passages as blocks (`track_passages`), and so do messages that
    hold `PassageBlock`s. KV states of passages come from the store; those it lacks are computed and stored.

    Raises:
        ValueError: A field is unknown or out of range; when it is used: the model cannot be loaded, a message cannot be
            shown, a prompt is longer than the context window, an option is unknown. One sentence says which, and what
            to pass instead.

    Examples:
        `BlockRAGLLM(model_name="demo").complete("What is the capital of Bhutan?")`
    """

    model_config = ConfigDict(extra="forbid")

    model_name: str = Field(default="demo", description='A directory, a Hugging Face hub id, or "demo".')
    store_url: str | None = Field(
        default=None, description="Where KV states are kept, as blockrag.open_store takes it; 2 GiB of memory if None."
    )
    context_window: int | None = Field(
        default=None, gt=0, description="Tokens of prompt and answer together; the model's own if None."
    )
    max_new_tokens: int = Field(default=256, gt=0, description="Upper bound on an answer's tokens.")
    temperature: float = Field(default=0.0, ge=0, description="0 for greedy decoding.")
    top_p: float = Field(default=1.0, gt=0, le=1, description="Sample among the tokens with this probability.")
    top_k: int = Field(default=0, ge=0, description="Sample among the k most likely tokens; 0 for all.")
    repetition_penalty: float = Field(default=1.0, gt=0, description="Above 1 makes repeated tokens less likely.")
    seed: int | None = Field(default=None, description="Makes sampling repeatable.")
    stop: list[str] = Field(default_factory=list, description="Strings that end an answer; not part of it.")
    attention: Literal["block", "full"] = Field(
        default="block", description='"full" prefills every prompt whole, for models without block fine-tuning.'
    )
    device: str = Field(default="auto", description='"auto", "cpu", "cuda", "cuda:1", ...')
    dtype: str = Field(default="auto", description='"auto", "float32", "bfloat16" or "float16".')
    precision: Precision | None = Field(
        default=None,
        description="Precision of stored KV states; 16 bits if None. See docs/guide/storage-and-sizing.md.",
    )
    block_fine_tuned: bool | None = Field(
        default=None, description="Overrides what the checkpoint says of its block fine-tuning."
    )
    namespace: str = Field(default="", description="Blocks stored under one namespace are not found from another.")
    prompt_form: PromptForm = Field(
        default="chat",
        description='"chat" shows messages as they are; "rag" shows passages and question in the form that the model '
        "was block-fine-tuned on.",
    )
    track_passages: bool = Field(
        default=True, description="Find the passages of stock query and chat engines again in their prompts."
    )
    _tracking: tracking.TrackingCounts = PrivateAttr(default_factory=tracking.TrackingCounts)

    def model_post_init(self, context: Any, /) -> None:
        """Make sure that passages are tracked from the first query on."""
        super().model_post_init(context)
        if self.track_passages:
            tracking.install()

    @classmethod
    def from_model(cls, model: BlockModel, **fields: Any) -> Self:
        """Use a model that is loaded already; copies of the result work in this process only.

        Args:
            model: The model; its store and its kind of attention are used.
            **fields: Fields that do not describe the model.

        Raises:
            ValueError: A field describes the model.
        """
        given = fields_of(register_model(model))
        if doubled := sorted(given.keys() & fields):
            raise InputError(
                f"{', '.join(doubled)} cannot be given beside a model that is loaded already; load it with them"
            )
        return cls(**given, **fields)

    @classmethod
    def class_name(cls) -> str:
        """The component's name in serialized pipelines."""
        return "BlockRAGLLM"

    @property
    def shared_config(self) -> ModelConfig:
        """Which model of this process it uses: components with an equal configuration share it, and its store."""
        return config_of(self)

    @property
    def block_model(self) -> BlockModel:
        """The model, loaded when it is first asked for."""
        return shared_model(self.shared_config)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer, for `Settings.tokenizer`: without it LlamaIndex counts tokens with another one."""
        return self.block_model.tokenizer

    @property
    def metadata(self) -> LLMMetadata:
        """What the model can do, from the model itself."""
        model = self.block_model
        return LLMMetadata(
            context_window=self.context_window or model.context_window or DEFAULT_CONTEXT_WINDOW,
            num_output=self.max_new_tokens,
            is_chat_model=True,
            is_function_calling_model=supports_tools(model.tokenizer),
            model_name=self.model_name,
        )

    @property
    def tracking_counts(self) -> dict[str, int]:
        """Passages of all calls so far by what became of them; see `tracking.TrackingCounts`."""
        return self._tracking.as_dict()

    def to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """The fields, without what a store's URL says about user and password."""
        data: dict[str, Any] = super().to_dict(**kwargs)
        if self.store_url is not None:
            data["store_url"] = _without_credentials(self.store_url)
        return data

    def count_prompt_tokens(self, messages: Sequence[ChatMessage], **kwargs: Any) -> int:
        """Tokens of the prompt these messages make, as the model will see it.

        Args:
            messages: The conversation.
            **kwargs: `tools`, as for `chat`.
        """
        tools = kwargs.get("tools") or ()
        return self._prepare(self.block_model, messages, tools, tracking.current(self.track_passages)).prompt.num_tokens

    # -- Endpoints -------------------------------------------------------------------------------------------------

    @llm_chat_callback()
    def chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """Answer a conversation.

        Args:
            messages: The conversation.
            **kwargs: Options of this call: max_tokens, temperature, top_p, top_k, repetition_penalty, seed, stop,
                ignore_eos; and `tools`, JSON schemas in the form of the OpenAI API.

        Returns:
            The answer, without white space at its ends; usage in `raw["usage"]` and `additional_kwargs`, the block
            cache's part in `raw["block_cache"]`.
        """
        return self._chat(messages, **kwargs)

    def stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        """`chat` piece by piece: what was said so far, and what is new. The last piece carries usage and calls.

        Closing the generator ends the answer and frees its cache.
        """
        return observed(llm_chat_callback(), self._stream_chat, self, messages, kwargs)

    @llm_chat_callback()
    async def achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        """`chat` on the model's worker thread."""
        return await self._achat(messages, **kwargs)

    async def astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        """`stream_chat` on the model's worker thread."""
        return await aobserved(llm_chat_callback(), self._astream_chat, self, messages, kwargs)

    @llm_completion_callback()
    def complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """Answer one user message.

        Args:
            prompt: What it says. As with other chat models, the model's own markup is put around it.
            formatted: Makes no difference.
            **kwargs: See `chat`.
        """
        return completion_of(self._chat(_asked(prompt), **kwargs))

    def stream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseGen:
        """`complete` piece by piece."""
        return observed(
            llm_completion_callback(), self._stream_complete, self, prompt, {"formatted": formatted, **kwargs}
        )

    @llm_completion_callback()
    async def acomplete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponse:
        """`complete` on the model's worker thread."""
        return completion_of(await self._achat(_asked(prompt), **kwargs))

    async def astream_complete(self, prompt: str, formatted: bool = False, **kwargs: Any) -> CompletionResponseAsyncGen:
        """`stream_complete` on the model's worker thread."""
        arguments = {"formatted": formatted, **kwargs}
        return await aobserved(llm_completion_callback(), self._astream_complete, self, prompt, arguments)

    # -- Tools -----------------------------------------------------------------------------------------------------

    def _prepare_chat_with_tools(
        self,
        tools: Sequence[BaseTool],
        user_msg: str | ChatMessage | None = None,
        chat_history: list[ChatMessage] | None = None,
        verbose: bool = False,
        allow_parallel_tool_calls: bool = False,
        tool_required: bool = False,
        tool_choice: str | dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of `chat` for tools. That a tool must be called can be asked of the model, not forced.

        Raises:
            ValueError: A choice is made for the model.
        """
        if tool_choice not in (None, "auto"):
            raise InputError(
                f"tool_choice={tool_choice!r} cannot be forced on this model; leave it out, and offer only the tools "
                "that it may call"
            )
        messages = list(chat_history or [])
        if user_msg is not None:
            messages.append(
                user_msg if isinstance(user_msg, ChatMessage) else ChatMessage(role=MessageRole.USER, content=user_msg)
            )
        return {"messages": messages, "tools": [tool.metadata.to_openai_tool() for tool in tools], **kwargs}

    def _validate_chat_with_tools_response(
        self,
        response: ChatResponse,
        tools: Sequence[BaseTool],
        allow_parallel_tool_calls: bool = False,
        **kwargs: Any,
    ) -> ChatResponse:
        """The response, with its first call only unless several are allowed."""
        if not allow_parallel_tool_calls:
            blocks = response.message.blocks
            first = next((block for block in blocks if isinstance(block, ToolCallBlock)), None)
            response.message.blocks = [b for b in blocks if b is first or not isinstance(b, ToolCallBlock)]
        return response

    def get_tool_calls_from_response(
        self, response: ChatResponse, error_on_no_tool_call: bool = True, **kwargs: Any
    ) -> list[ToolSelection]:
        """The calls an answer makes.

        Raises:
            ValueError: There are none, and there should be.
        """
        calls = [block for block in response.message.blocks if isinstance(block, ToolCallBlock)]
        if not calls and error_on_no_tool_call:
            raise ValueError(f"the model called no tool; it said {response.message.content!r:.200}")
        return [
            ToolSelection(tool_id=call.tool_call_id or "", tool_name=call.tool_name, tool_kwargs=arguments_of(call))
            for call in calls
        ]

    # -- Answering -------------------------------------------------------------------------------------------------

    def _chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        with closing(self._answer(self.block_model, messages, kwargs)) as answer:
            answered = answer.finish()
        return self._completed(answered, active_span_id.get())

    def _stream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseGen:
        # Whose turn it is and what is tracked is known now, when the caller asks, and not when the first piece is read.
        return self._responses(self._answer(self.block_model, messages, kwargs), active_span_id.get())

    async def _achat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponse:
        model = await asyncio.to_thread(lambda: self.block_model)
        answer = self._answer(model, messages, kwargs)
        async with aclosing(_on_worker(model, answer)) as pieces:
            async for _ in pieces:
                pass
        return self._completed(answer.result, active_span_id.get())

    async def _astream_chat(self, messages: Sequence[ChatMessage], **kwargs: Any) -> ChatResponseAsyncGen:
        model = await asyncio.to_thread(lambda: self.block_model)
        return self._aresponses(model, self._answer(model, messages, kwargs), active_span_id.get())

    def _stream_complete(self, prompt: str, formatted: bool, **kwargs: Any) -> CompletionResponseGen:
        return completions(self._stream_chat(_asked(prompt), **kwargs))

    async def _astream_complete(self, prompt: str, formatted: bool, **kwargs: Any) -> CompletionResponseAsyncGen:
        return acompletions(await self._astream_chat(_asked(prompt), **kwargs))

    def _responses(self, answer: ResultStream[str, _Answered], span_id: str | None) -> ChatResponseGen:
        text = ""
        with closing(answer):
            for delta in filter(None, answer):
                text += delta
                yield _response(text, delta)
        yield self._completed(answer.result, span_id, delta=answer.result.text.removeprefix(text))

    async def _aresponses(
        self, model: BlockModel, answer: ResultStream[str, _Answered], span_id: str | None
    ) -> ChatResponseAsyncGen:
        text = ""
        async with aclosing(_on_worker(model, answer)) as pieces:
            async for delta in pieces:
                if delta:
                    text += delta
                    yield _response(text, delta)
        yield self._completed(answer.result, span_id, delta=answer.result.text.removeprefix(text))

    def _answer(
        self, model: BlockModel, messages: Sequence[ChatMessage], kwargs: dict[str, Any]
    ) -> ResultStream[str, _Answered]:
        """An answer that nothing has been done for yet; its options are checked."""
        tools = kwargs.pop("tools", None) or ()
        tracked = tracking.current(self.track_passages)
        return ResultStream(self._run(model, messages, tools, tracked, self._options(kwargs)))

    def _run(
        self,
        model: BlockModel,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]],
        tracked: tracking.Tracked | None,
        options: GenerationOptions,
    ) -> Generator[str, None, _Answered]:
        """Yields what is new of the text apart from calls, with every token, and returns the answer.

        That is often nothing; but only between two pieces can others have their turn, and this answer be dropped.
        """
        prepared = self._prepare(model, messages, tools, tracked)
        self._count(prepared)
        said = shown = ""
        with closing(model.stream(prepared.prompt, options, attention=self.attention)) as stream:
            for chunk in stream:
                said += chunk.text
                text = shown_of(said) if tools else said.strip()
                yield text[len(shown) :]
                shown = text
        text, calls = split_calls(stream.result.text) if tools else (stream.result.text.strip(), ())
        return _Answered(text, calls, stream.result, prepared)

    def _prepare(
        self,
        model: BlockModel,
        messages: Sequence[ChatMessage],
        tools: Sequence[dict[str, Any]],
        tracked: tracking.Tracked | None,
    ) -> Prepared:
        return prepare(
            model, messages, tools=tools, tracked=tracked, form=self.prompt_form, whole=self.attention == "full"
        )

    def _options(self, changes: dict[str, Any]) -> GenerationOptions:
        options = GenerationOptions(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=tuple(self.stop),
        )
        return options.updated(changes)

    def _count(self, prepared: Prepared) -> None:
        none = not (prepared.found or prepared.missing or prepared.in_question)
        self._tracking.add(
            found=prepared.found, missing=prepared.missing, in_question=prepared.in_question, no_passages=int(none)
        )

    def _completed(self, answered: _Answered, span_id: str | None, *, delta: str | None = None) -> ChatResponse:
        """The response that carries usage and calls; tells the instrumentation about it."""
        usage, timings, prepared = answered.generation.usage, answered.generation.timings, answered.prepared
        block_cache: dict[str, Any] = {
            "blocks_reused": usage.blocks_reused,
            "blocks_computed": usage.blocks_computed,
            "tokens_reused": usage.tokens_reused,
            "tokens_computed": usage.tokens_computed,
            "passages_found": prepared.found,
            "passages_missed": prepared.missing + prepared.in_question,
            "ttft_s": timings.ttft_s,
        }
        dispatcher.event(BlockCacheEvent(span_id=span_id, **block_cache))
        response = _response(answered.text, delta, answered.calls)
        response.raw = {
            "usage": usage.as_openai(),
            "finish_reason": "tool_calls" if answered.calls else answered.generation.finish_reason,
            "block_cache": block_cache,
        }
        response.additional_kwargs = usage.as_openai()
        return response


def _asked(prompt: str) -> list[ChatMessage]:
    return [ChatMessage(role=MessageRole.USER, content=prompt)]


def _on_worker(model: BlockModel, answer: ResultStream[str, _Answered]) -> AsyncGenerator[str, None]:
    """The pieces of an answer, computed on the model's worker thread; closing it closes the answer behind them."""
    return cast("AsyncGenerator[str, None]", model.on_worker(answer))


def _response(text: str, delta: str | None, calls: Sequence[ToolCall] = ()) -> ChatResponse:
    blocks: list[ContentBlock] = [TextBlock(text=text)] if text or not calls else []
    blocks += [
        ToolCallBlock(tool_call_id=call.id, tool_name=call.name, tool_kwargs=dict(call.arguments)) for call in calls
    ]
    return ChatResponse(message=ChatMessage(role=MessageRole.ASSISTANT, blocks=blocks), delta=delta)


def _without_credentials(url: str) -> str:
    # What looks like a host there is a relative path, which must survive.
    if url.startswith("disk:"):
        return url
    parts = urlsplit(url)
    _, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=host)) if at else url
