"""`ChatBlockRAG`: a chat model that prefills each passage once and reuses its KV states in every later prompt."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Literal, cast

from blockrag.errors import InputError, PromptError
from langchain_core.callbacks import AsyncCallbackManagerForLLMRun, CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel, LangSmithParams
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from pydantic import ConfigDict, Field, model_validator

from langchain_blockrag.errors import langchain_errors
from langchain_blockrag.messages import core_messages, with_documents

if TYPE_CHECKING:
    from blockrag.model.answer import Chunk, Generation
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.model.config import ModelConfig
    from blockrag.model.sampling import GenerationOptions
    from blockrag.model.stream import ResultStream
    from blockrag.prompt import Message, SegmentedPrompt

__all__ = ["ChatBlockRAG", "PromptForm"]

PromptForm = Literal["auto", "chat", "rag"]

# What clients of remote models are configured with; a model in this process has no use for it.
_REMOTE = ("api_key", "base_url", "max_retries", "timeout")
_OPTIONS = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "seed")


class ChatBlockRAG(BaseChatModel):
    """A causal language model in this process, as a LangChain chat model.

    Messages may hold passages: parts made by `documents_to_blocks`, "text-plain" parts, or documents given with
    `bind(documents=...)`. Each becomes a block, whose KV states are taken from the block store or computed once and
    kept there; `usage_metadata["input_token_details"]["cache_read"]` counts the tokens that were reused.

    The fields are plain values, so that the model pickles; it is loaded at the first call, and models with equal
    configurations are one model, with one worker thread, in each process. Every field from `max_tokens` to `stop` can
    also be given per call or with `bind`, as can `model`, `attention`, `prompt_form` and `documents` (or `blocks`).

    Args:
        model: A directory, a hub id, or "demo" for the small model that ships with blockrag.
        store_url: URL of the block store, see `blockrag.open_store`; by default 2 GiB of memory.
        max_tokens: Upper bound on the answer's tokens; by default 256.
        temperature: 0, the default, for greedy decoding.
        top_p: Sample among the most likely tokens that together have this probability.
        top_k: Sample among the k most likely tokens.
        repetition_penalty: Above 1 makes tokens that were said less likely.
        seed: Makes sampling repeatable.
        stop: Strings that end the answer; not part of it.
        streaming: Stream inside `invoke` as well, for callbacks that want tokens.
        attention: "block" composes prompts from blocks; "full" prefills them whole, with ordinary attention.
        device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        precision: Precision of stored KV states: "float32", "bfloat16", "float16", "int8" or "int4".
        block_fine_tuned: Says that the model was fine-tuned for block attention, where its checkpoint does not.
        namespace: Blocks stored under one namespace are not found from another.
        prompt_form: "rag" shows passages in the form the model was block-fine-tuned on, with the form's own
            instruction; "chat" shows messages as they are, in the model's chat turns. "auto" is "rag" for
            conversations with passages in which human and AI messages take turns, the human's first and last, without
            tools, and "chat" for all others.

    Raises:
        ValueError: At a call: the model cannot be loaded or composed, a store is closed, an option is unknown or out
            of range, or a message cannot be shown. Always one sentence that says what to do.
        ContextTooLongError: The prompt and the room for its answer exceed the model's positions; also a LangChain
            `ContextOverflowError`.
    """

    model_config = ConfigDict(populate_by_name=True, extra="forbid", protected_namespaces=())

    model_name: str = Field(default="demo", alias="model")
    store_url: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: list[str] | None = None
    streaming: bool = False
    attention: Literal["block", "full"] = "block"
    device: str = "auto"
    dtype: str = "auto"
    precision: Literal["float32", "bfloat16", "float16", "int8", "int4"] | None = None
    block_fine_tuned: bool | None = None
    namespace: str = ""
    prompt_form: PromptForm = "auto"

    @model_validator(mode="before")
    @classmethod
    def _without_remote_settings(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: value for name, value in values.items() if name not in _REMOTE}

    @classmethod
    def from_model(cls, model: BlockModel, **fields: Any) -> ChatBlockRAG:
        """A chat model around a `BlockModel` that exists already; usable in this process only.

        Args:
            model: The model, with its store.
            **fields: Any field that does not describe the model: `max_tokens`, `prompt_form` and so on.
        """
        from blockrag.model.shared import register_model

        config = register_model(model)
        described: dict[str, Any] = {
            "model": config.model,
            "store_url": config.store,
            "attention": config.attention,
            "device": config.device,
            "dtype": config.dtype,
            "precision": config.precision,
            "block_fine_tuned": config.block_fine_tuned,
            "namespace": config.namespace,
        }
        return cls(**described, **fields)

    def block_model(self, name: str | None = None) -> BlockModel:
        """The model behind this one, loaded now if it was not yet.

        Args:
            name: Another model under the same configuration.

        Raises:
            ValueError: It cannot be loaded or composed.
        """
        from blockrag.model.shared import shared_model

        with langchain_errors():
            return shared_model(self._config(name))

    # -- LangChain's own surface --------------------------------------------------------------------------------------

    @property
    def _llm_type(self) -> str:
        return "blockrag"

    @property
    def _identifying_params(self) -> dict[str, Any]:
        names = type(self).model_fields.keys() - BaseChatModel.model_fields.keys()
        return {name: getattr(self, name) for name in sorted(names)}

    def _get_ls_params(self, stop: list[str] | None = None, **kwargs: Any) -> LangSmithParams:
        params = super()._get_ls_params(stop=stop or self.stop, **kwargs)
        params["ls_provider"] = "blockrag"
        params["ls_model_name"] = kwargs.get("model") or self.model_name
        return params

    def get_token_ids(self, text: str) -> list[int]:
        """The ids of a text under the model's tokenizer, without special tokens."""
        if self.custom_get_token_ids is not None:
            return self.custom_get_token_ids(text)
        from blockrag.prompt.encode import Draft, check_text, content, encode_drafts

        with langchain_errors():
            draft = Draft(groups=((content(check_text("the text", text)),),), local=False, kind="query")
            (block,) = encode_drafts(self.block_model().tokenizer, [draft])
        return list(block.token_ids)

    def get_num_tokens_from_messages(self, messages: list[BaseMessage], tools: Sequence[Any] | None = None) -> int:
        """The tokens of the prompt these messages make; 0 for none.

        Args:
            messages: A conversation, or a part of one.
            tools: Not shown to the model, and not counted.
        """
        with langchain_errors():
            if not messages:
                return 0
            model, shown = self.block_model(), core_messages(messages)
            try:
                prompt = self._prompt(model, shown, self.prompt_form, self.attention)
            except PromptError:
                # Whoever trims a conversation counts parts of it, which the RAG form alone cannot show.
                prompt = self._prompt(model, shown, "chat", self.attention)
            return prompt.num_tokens

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            _, name, answer = self._open(messages, stop, kwargs)
            return _result(name, answer.finish())

    async def _agenerate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> ChatResult:
        with langchain_errors():
            model, name, answer = await asyncio.to_thread(self._open, messages, stop, kwargs)
            async with aclosing(_on_worker(model, answer)) as chunks:
                async for _ in chunks:
                    pass
            return _result(name, answer.result)

    def _stream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> Iterator[ChatGenerationChunk]:
        with langchain_errors():
            _, name, answer = self._open(messages, stop, kwargs)
            said = _Said()
            try:
                for chunk in answer:
                    if piece := said.piece(chunk):
                        if run_manager is not None:
                            run_manager.on_llm_new_token(piece.text, chunk=piece)
                        yield piece
            finally:
                answer.close()
            yield _last(name, answer.result)

    async def _astream(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: AsyncCallbackManagerForLLMRun | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[ChatGenerationChunk]:
        with langchain_errors():
            model, name, answer = await asyncio.to_thread(self._open, messages, stop, kwargs)
            said = _Said()
            async with aclosing(_on_worker(model, answer)) as chunks:
                async for chunk in chunks:
                    if piece := said.piece(chunk):
                        if run_manager is not None:
                            await run_manager.on_llm_new_token(piece.text, chunk=piece)
                        yield piece
            yield _last(name, answer.result)

    # -- one call -----------------------------------------------------------------------------------------------------

    def _config(self, name: str | None = None) -> ModelConfig:
        from blockrag.model.config import DEFAULT_STORE, ModelConfig

        return ModelConfig(
            model=name or self.model_name,
            store=self.store_url or DEFAULT_STORE,
            device=self.device,
            dtype=self.dtype,
            attention=self.attention,
            precision=self.precision,
            block_fine_tuned=self.block_fine_tuned,
            namespace=self.namespace,
        )

    def _open(
        self, messages: Sequence[BaseMessage], stop: Sequence[str] | None, kwargs: Mapping[str, Any]
    ) -> tuple[BlockModel, str, ResultStream[Chunk, Generation]]:
        """Check a call and load its model; returns the model, its name, and the answer, of which nothing has run."""
        from blockrag.model.stream import ResultStream

        given = dict(kwargs)
        name = str(given.pop("model", None) or self.model_name)
        documents, blocks = given.pop("documents", None), given.pop("blocks", None)
        if documents is not None and blocks is not None:
            raise InputError("documents and blocks are two names for the same thing; pass one of them")
        documents = blocks if documents is None else documents
        form: PromptForm = given.pop("prompt_form", None) or self.prompt_form
        attention: Attention = given.pop("attention", None) or self.attention
        options = self._options(stop, given)
        shown = core_messages(messages if documents is None else with_documents(messages, documents))
        model = self.block_model(name)

        def run() -> Generator[Chunk, None, Generation]:
            stream = model.stream(self._prompt(model, shown, form, attention), options, attention=attention)
            try:
                yield from stream
            finally:
                stream.close()
            return stream.result

        return model, name, ResultStream(run())

    def _options(self, stop: Sequence[str] | None, given: Mapping[str, Any]) -> GenerationOptions:
        from blockrag.model.sampling import GenerationOptions

        configured = {option: getattr(self, option) for option in _OPTIONS}
        # `stream` chooses a method of BaseChatModel and says nothing to the model.
        per_call = {option: value for option, value in given.items() if option != "stream"}
        return (
            GenerationOptions().updated({**configured, "stop": self.stop if stop is None else stop}).updated(per_call)
        )

    @staticmethod
    def _prompt(
        model: BlockModel, messages: Sequence[Message], form: PromptForm, attention: Attention
    ) -> SegmentedPrompt:
        from blockrag.prompt import fits_rag, segment_chat, segment_rag

        if form not in ("auto", "chat", "rag"):
            raise InputError(f'prompt_form={form!r} is not one of "auto", "chat", "rag"')
        if form == "auto":
            form = "rag" if any(message.passages for message in messages) and fits_rag(messages) else "chat"
        if form == "rag":
            return segment_rag(model.template, model.tokenizer, messages)
        # In full attention the prompt is tokenized as one string, exactly as if nobody had known of passages.
        return segment_chat(model.template, model.tokenizer, messages, whole=attention == "full")


class _Said:
    """The text of an answer, piece by piece, without the white space it opens with."""

    def __init__(self) -> None:
        self._begun = False

    def piece(self, chunk: Chunk) -> ChatGenerationChunk | None:
        """What a chunk adds to the text, if anything."""
        text = chunk.text if self._begun else chunk.text.lstrip()
        if not text:
            return None
        self._begun = True
        return ChatGenerationChunk(message=AIMessageChunk(content=text))


def _on_worker(model: BlockModel, answer: ResultStream[Chunk, Generation]) -> AsyncGenerator[Chunk, None]:
    return cast("AsyncGenerator[Chunk, None]", model.on_worker(answer))


def _metadata(name: str, generation: Generation) -> dict[str, Any]:
    usage = generation.usage
    return {
        "usage_metadata": {
            "input_tokens": usage.prompt_tokens,
            "output_tokens": usage.new_tokens,
            "total_tokens": usage.prompt_tokens + usage.new_tokens,
            "input_token_details": {"cache_read": usage.tokens_reused},
        },
        "response_metadata": {
            "model_name": name,
            "model_provider": "blockrag",
            "finish_reason": generation.finish_reason,
        },
    }


def _result(name: str, generation: Generation) -> ChatResult:
    message = AIMessage(content=generation.text.lstrip(), **_metadata(name, generation))
    return ChatResult(generations=[ChatGeneration(message=message)])


def _last(name: str, generation: Generation) -> ChatGenerationChunk:
    message = AIMessageChunk(content="", chunk_position="last", **_metadata(name, generation))
    return ChatGenerationChunk(message=message)
