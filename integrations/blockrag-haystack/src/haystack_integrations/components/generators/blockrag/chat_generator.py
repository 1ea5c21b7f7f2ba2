"""`BlockRAGChatGenerator`: Haystack's chat generator whose documents stay blocks."""

from __future__ import annotations

import inspect
import json
from collections.abc import Generator, Sequence
from contextlib import aclosing, closing
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, get_args

from haystack import Document, component, default_from_dict, default_to_dict
from haystack.dataclasses import (
    ChatMessage,
    ComponentInfo,
    StreamingCallbackT,
    StreamingChunk,
    ToolCall,
    select_streaming_callback,
)
from haystack.dataclasses.streaming_chunk import ToolCallDelta
from haystack.tools import (
    ToolsType,
    deserialize_tools_or_toolset_inplace,
    flatten_tools_or_toolsets,
    serialize_tools_or_toolset,
    warm_up_tools,
)
from haystack.utils import deserialize_callable, serialize_callable

from blockrag.errors import StoreError
from blockrag.model.config import DEFAULT_STORE
from haystack_integrations.common.blockrag import ConfiguredModel, DocumentForm, document_excerpt
from haystack_integrations.components.generators.blockrag.conversation import (
    PromptForm,
    chosen_form,
    to_messages,
    with_documents,
)

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.model.answer import Chunk, Generation
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.model.sampling import GenerationOptions
    from blockrag.model.stream import ResultStream
    from blockrag.prompt import SegmentedPrompt
    from blockrag.prompt.message import Message

__all__ = ["BlockRAGChatGenerator"]


@dataclass(frozen=True, slots=True)
class _Request:
    """One call, checked and in blockrag's terms."""

    messages: tuple[Message, ...]
    form: DocumentForm
    document_ids: list[str]
    options: GenerationOptions
    tools: list[dict[str, Any]]


@component
class BlockRAGChatGenerator:
    """Answers conversations with a local model that reuses the KV states of the documents in them.

    Connect a retriever to `documents`: each document becomes one block, whose KV states are computed once, stored, and
    composed into every later prompt that holds the document, in any order. The answer's meta counts what was reused in
    `usage["prompt_tokens_details"]["cached_tokens"]`.

    ```python
    from haystack import Document
    from haystack.dataclasses import ChatMessage
    from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator

    generator = BlockRAGChatGenerator(model="demo")
    documents = [Document(content="The capital of Bhutan is Thimphu.", meta={"title": "Bhutan"})]
    result = generator.run([ChatMessage.from_user("What is the capital of Bhutan?")], documents=documents)
    print(result["replies"][0].text)  # Thimphu
    ```

    Args:
        model: A directory with a saved model, a hub id, or "demo". Components with equal model arguments (this one and
            the seven that follow) share one model in a process.
        store: URL of the block store, e.g. "disk:///var/lib/blocks?max_bytes=20GiB" or "memory://".
        device: "auto", "cpu", "cuda", "cuda:1", ...
        dtype: "auto", "float32", "bfloat16" or "float16".
        attention: "block", or "full" to answer without blocks, as any other generator would.
        precision: Precision of stored KV states; by default the model's 16-bit one.
        block_fine_tuned: Overrides what the checkpoint says of itself.
        namespace: Blocks stored under one namespace are not found from another.
        prompt_form: How prompts look. "rag" is the form the model was block-fine-tuned on: its instruction, the
            documents with their titles, the text of the messages as the question. "chat" is the messages as they are:
            a document that they show already (written there by a `ChatPromptBuilder`) becomes a block where it
            stands, and the others open the last user message. "auto" is "rag" when documents are given that the
            messages do not show already, unless there are tools, or an answer to no question (a greeting); else
            "chat".
        generation_kwargs: Fields of `blockrag.GenerationOptions`, also under OpenAI's names: `max_new_tokens` or
            `max_tokens`, `temperature`, `top_p`, `top_k`, `seed`, `stop`, ...
        streaming_callback: Called with each `StreamingChunk` of an answer.
        tools: Tools the model may call, if its chat template shows tools. With tools an answer is streamed when it is
            complete, since only then it is known to be text.

    Raises:
        ValueError: There is no such prompt form.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        store: str = DEFAULT_STORE,
        device: str = "auto",
        dtype: str = "auto",
        attention: Attention = "block",
        precision: Precision | None = None,
        block_fine_tuned: bool | None = None,
        namespace: str = "",
        prompt_form: PromptForm = "auto",
        generation_kwargs: dict[str, Any] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        tools: ToolsType | None = None,
    ) -> None:
        if prompt_form not in get_args(PromptForm):
            raise ValueError(f'prompt_form={prompt_form!r} is none of "auto", "rag" and "chat"')
        self._model = ConfiguredModel(
            model=model,
            store=store,
            device=device,
            dtype=dtype,
            attention=attention,
            precision=precision,
            block_fine_tuned=block_fine_tuned,
            namespace=namespace,
        )
        self.prompt_form: PromptForm = prompt_form
        self.generation_kwargs = dict(generation_kwargs or {})
        self.streaming_callback = streaming_callback
        self.tools = tools
        self._tools_are_warm = False

    def warm_up(self) -> None:
        """Load the model, and whatever the tools need; the first `run` does it otherwise.

        Raises:
            ValueError: The model does not exist or cannot be composed exactly, or a generation argument is unknown.
        """
        self._warm_up_tools()
        self._model.load()
        self._options({})

    async def warm_up_async(self) -> None:
        """`warm_up`, without blocking the event loop."""
        self._warm_up_tools()
        await self._model.load_async()
        self._options({})

    def to_dict(self) -> dict[str, Any]:
        """The component as plain values, for YAML; a `streaming_callback` must be a named function."""
        callback = serialize_callable(self.streaming_callback) if self.streaming_callback else None
        return default_to_dict(
            self,
            **self._model.parameters(),
            prompt_form=self.prompt_form,
            generation_kwargs=self.generation_kwargs,
            streaming_callback=callback,
            tools=serialize_tools_or_toolset(self.tools),
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockRAGChatGenerator:
        """The component from `to_dict`'s values."""
        parameters = dict(data.get("init_parameters", {}))
        deserialize_tools_or_toolset_inplace(parameters, key="tools")
        if parameters.get("streaming_callback"):
            parameters["streaming_callback"] = deserialize_callable(parameters["streaming_callback"])
        return default_from_dict(cls, {**data, "init_parameters": parameters})

    @component.output_types(replies=list[ChatMessage])
    def run(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        tools: ToolsType | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """Answer a conversation.

        Args:
            messages: The conversation, the user's question last; or the question alone, as a string.
            documents: What the answer is to rest on, in the order of the prompt. An empty list is a search that found
                nothing: the prompt keeps the RAG form.
            streaming_callback: Takes precedence over the component's own.
            generation_kwargs: Merged over the component's own.
            tools: Take the place of the component's own.

        Returns:
            `replies`: one message, whose meta holds `model`, `index`, `finish_reason` ("stop", "length" or
            "tool_calls"), `usage` (OpenAI's names), `document_ids`, and, when streaming, `completion_start_time`. No
            reply for no messages.

        Raises:
            ValueError: A message holds more than text, a document has no content, a generation argument is unknown,
                the prompt and its answer exceed what the model can place, or the block store is closed or unsafe.
        """
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=False)
        self.warm_up()
        if not messages:
            return {"replies": []}
        request = self._request(messages, documents, generation_kwargs, tools)
        outgoing = _Outgoing(self._model.name, ComponentInfo.from_component(self))
        with closing(self._stream(request)) as stream:
            for piece in stream:
                if callback is not None and not request.tools and (chunk := outgoing.take(piece.text)):
                    callback(chunk)
        reply = outgoing.reply(stream.result, request, streamed=callback is not None)
        if callback is not None:
            for chunk in outgoing.ending(reply):
                callback(chunk)
        return {"replies": [reply]}

    @component.output_types(replies=list[ChatMessage])
    async def run_async(
        self,
        messages: list[ChatMessage] | str,
        documents: list[Document] | None = None,
        streaming_callback: StreamingCallbackT | None = None,
        generation_kwargs: dict[str, Any] | None = None,
        tools: ToolsType | None = None,
    ) -> dict[str, list[ChatMessage]]:
        """`run`, on the model's worker thread: the event loop goes on, and a cancelled call frees the worker.

        A `streaming_callback` may be a coroutine function.
        """
        callback = select_streaming_callback(self.streaming_callback, streaming_callback, requires_async=True)
        await self.warm_up_async()
        if not messages:
            return {"replies": []}
        request = self._request(messages, documents, generation_kwargs, tools)
        model = self._model.load()
        outgoing = _Outgoing(self._model.name, ComponentInfo.from_component(self))
        stream = self._stream(request)
        # Closed here and now, also when the callback raises: the worker is not to go on for nobody. (on_worker is a
        # generator, which its annotation does not say.)
        async with aclosing(model.on_worker(stream)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                if callback is not None and not request.tools and (chunk := outgoing.take(piece.text)):
                    await _call(callback, chunk)
        reply = outgoing.reply(stream.result, request, streamed=callback is not None)
        if callback is not None:
            for chunk in outgoing.ending(reply):
                await _call(callback, chunk)
        return {"replies": [reply]}

    def _warm_up_tools(self) -> None:
        if not self._tools_are_warm:
            warm_up_tools(self.tools)
            self._tools_are_warm = True

    def _options(self, changes: dict[str, Any]) -> GenerationOptions:
        from blockrag.model.sampling import GenerationOptions

        return GenerationOptions().updated({**self.generation_kwargs, **changes})

    def _request(
        self,
        messages: Sequence[ChatMessage] | str,
        documents: Sequence[Document] | None,
        generation_kwargs: dict[str, Any] | None,
        tools: ToolsType | None,
    ) -> _Request:
        offered = flatten_tools_or_toolsets(self.tools if tools is None else tools)
        conversation = to_messages(messages)
        excerpts = None if documents is None else [document_excerpt(document) for document in documents]
        form = chosen_form(self.prompt_form, conversation, excerpts, with_tools=bool(offered))
        return _Request(
            messages=with_documents(conversation, excerpts or [], form),
            form=form,
            document_ids=[document.id for document in documents or []],
            options=self._options(generation_kwargs or {}),
            tools=[{"type": "function", "function": tool.tool_spec} for tool in offered],
        )

    def _stream(self, request: _Request) -> ResultStream[Chunk, Generation]:
        from blockrag.model.stream import ResultStream

        return ResultStream(_answer(self._model.load(), request))


def _answer(model: BlockModel, request: _Request) -> Generator[Chunk, None, Generation]:
    """Tokenizing is part of it, so that it runs on the worker as well."""
    stream = model.stream(_segmented(model, request), request.options)
    try:
        yield from stream
    except StoreError as error:
        raise ValueError(str(error)) from error
    finally:
        stream.close()
    return stream.result


def _segmented(model: BlockModel, request: _Request) -> SegmentedPrompt:
    from blockrag.prompt.chat import segment_chat, segment_rag

    template, tokenizer = model.template, model.tokenizer
    if request.form == "chat":
        whole = model.attention == "full"
        return segment_chat(template, tokenizer, request.messages, tools=request.tools, whole=whole)
    if request.tools:
        raise ValueError(
            f'prompt_form="rag" cannot show the {len(request.tools)} tools; use prompt_form="chat" or "auto"'
        )
    return segment_rag(template, tokenizer, request.messages)


class _Outgoing:
    """One answer on its way out: chunks for a streaming callback, then the reply.

    White space at the ends of an answer is the prompt's affair ("Answer:" is followed by a space) and not part of it.

    Args:
        model: The model's name.
        component_info: Says to callbacks where chunks come from.
    """

    def __init__(self, model: str, component_info: ComponentInfo) -> None:
        self._model = model
        self._component_info = component_info
        self._started_at = ""
        self._space = ""

    def take(self, text: str) -> StreamingChunk | None:
        """The next piece of text as a chunk; None while it may be white space at an end."""
        text = self._space + text
        shown = text.rstrip() if self._started_at else text.strip()
        if not shown:
            self._space = text if self._started_at else ""
            return None
        self._space = text[len(text.rstrip()) :]
        start = not self._started_at
        received_at = datetime.now(timezone.utc).isoformat()
        self._started_at = self._started_at or received_at
        return StreamingChunk(
            content=shown,
            meta={"model": self._model, "received_at": received_at},
            component_info=self._component_info,
            index=0,
            start=start,
        )

    def reply(self, generation: Generation, request: _Request, *, streamed: bool) -> ChatMessage:
        """The finished answer, with tool calls where tools were offered."""
        from blockrag.prompt.tools import parse_tool_calls

        text, calls = parse_tool_calls(generation.text) if request.tools else (generation.text, ())
        text = text.strip()
        meta: dict[str, Any] = {
            "model": self._model,
            "index": 0,
            "finish_reason": "tool_calls" if calls else generation.finish_reason,
            "usage": generation.usage.as_openai(),
            "document_ids": request.document_ids,
        }
        if streamed:
            meta["completion_start_time"] = self._started_at or datetime.now(timezone.utc).isoformat()
        tool_calls = [ToolCall(call.name, dict(call.arguments), id=call.id) for call in calls]
        return ChatMessage.from_assistant(text or None if calls else text, meta=meta, tool_calls=tool_calls)

    def ending(self, reply: ChatMessage) -> list[StreamingChunk]:
        """What follows the text streamed so far: with tools all of the answer, and then how it ended."""
        chunks = []
        if not self._started_at and reply.text and (whole := self.take(reply.text)):
            chunks.append(whole)
        for call in reply.tool_calls:
            index = len(chunks)
            delta = ToolCallDelta(index, tool_name=call.tool_name, arguments=json.dumps(call.arguments), id=call.id)
            chunks.append(
                StreamingChunk(
                    content="",
                    meta={"model": self._model},
                    component_info=self._component_info,
                    index=index,
                    tool_calls=[delta],
                    start=True,
                )
            )
        chunks.append(
            StreamingChunk(
                content="",
                meta={"model": self._model, "usage": reply.meta["usage"]},
                component_info=self._component_info,
                index=max(0, len(chunks) - 1),
                finish_reason=reply.meta["finish_reason"],
            )
        )
        return chunks


async def _call(callback: StreamingCallbackT, chunk: StreamingChunk) -> None:
    waiting = callback(chunk)
    if inspect.isawaitable(waiting):
        await waiting
