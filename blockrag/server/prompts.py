"""From requests to blocks: which messages, which passages, which form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from blockrag.errors import PromptError, PromptTooLongError
from blockrag.passage import Passage
from blockrag.prompt import Message, Part, ToolCall, fits_rag, segment_chat, segment_rag

if TYPE_CHECKING:
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.prompt import SegmentedPrompt
    from blockrag.server.schemas import ChatMessage, ChatRequest, Document, RequestedToolCall, SeedRequest

__all__ = ["is_rag", "passages_of", "question_of", "seed_prompt", "segment_request"]


def is_rag(body: ChatRequest) -> bool:
    """Whether the prompt is to have the RAG form: if it is asked for, or fits a conversation that has documents.

    Raises:
        PromptError: A message is malformed.
    """
    if body.blockrag.form is not None:
        return body.blockrag.form == "rag"
    messages = [_message(number, message) for number, message in enumerate(body.messages)]
    return bool(body.documents or body.blockrag.retrieve) and fits_rag(messages, tools=body.tools)


def passages_of(documents: Sequence[Document]) -> list[Passage]:
    """Documents as passages.

    Raises:
        InputError: A text cannot be encoded.
    """
    return [
        Passage(document.id or f"document-{number}", document.text, document.title)
        for number, document in enumerate(documents)
    ]


def question_of(body: ChatRequest) -> str:
    """What the user says last, to search for.

    Raises:
        PromptError: The user says nothing.
    """
    for message in reversed(body.messages):
        if message.role == "user":
            return "\n".join(part.text for part in message.content if part.blockrag is None)
    raise PromptError("there is no user message to search for; add one")


def segment_request(
    model: BlockModel, body: ChatRequest, passages: Sequence[Passage], attention: Attention
) -> SegmentedPrompt:
    """The blocks of a chat request.

    Passages stand before everything the user says, where chat templates that know documents show them.

    Args:
        model: The model they are for.
        body: The request.
        passages: Its documents, and those that were searched for.
        attention: In full attention a conversation is one block, exactly as tokenizing it whole gives it.

    Raises:
        PromptError: The messages are malformed, or the form cannot show them.
        PromptTooLongError: They are longer than the model's context.
    """
    messages = [_message(number, message) for number, message in enumerate(body.messages)]
    if passages:
        messages = _with_passages(messages, passages)
    if is_rag(body):
        if body.tools:
            raise PromptError('tools cannot be shown in the RAG form; leave them out, or pass {"form": "chat"}')
        prompt = segment_rag(model.template, model.tokenizer, messages)
    else:
        tools = () if body.tool_choice == "none" else body.tools
        whole = attention == "full"
        try:
            prompt = segment_chat(model.template, model.tokenizer, messages, tools=tools, whole=whole)
        except RecursionError as error:
            raise PromptError("a tool or the arguments of a call are nested too deeply; make them flatter") from error
    return _fitting(model, prompt)


def seed_prompt(model: BlockModel, body: SeedRequest) -> SegmentedPrompt:
    """The blocks of the seed's request: surplus blocks join the global one.

    Raises:
        PromptError: The last block is empty, or a text cannot be encoded.
        PromptTooLongError: They are longer than the model's context.
    """
    local = min(body.num_local_attention_blocks, len(body.blocks) - 1)
    blocks = [*body.blocks[:local], "".join(body.blocks[local:])]
    prompt = model.template.segment_blocks(model.tokenizer, blocks, allow_special=body.allow_special)
    return _fitting(model, prompt)


def _fitting(model: BlockModel, prompt: SegmentedPrompt) -> SegmentedPrompt:
    """The prompt, if an answer has room behind it; also for models that can be placed without limit."""
    window = model.context_window
    if window is not None and prompt.num_tokens >= window:
        raise PromptTooLongError(
            f"the prompt has {prompt.num_tokens} tokens and the model's context {window}; "
            "send fewer or shorter documents or messages"
        )
    return prompt


def _with_passages(messages: Sequence[Message], passages: Sequence[Passage]) -> list[Message]:
    for number, message in enumerate(messages):
        if message.role == "user":
            shown = Message("user", (*passages, *message.parts), name=message.name)
            return [*messages[:number], shown, *messages[number + 1 :]]
    raise PromptError(f"{len(passages)} documents and no user message to answer; add one")


def _message(number: int, message: ChatMessage) -> Message:
    parts: list[Part] = []
    for position, part in enumerate(message.content):
        mark = part.blockrag
        if mark is None:
            parts.append(part.text)
        else:
            parts.append(Passage(mark.id or f"message-{number}-{position}", part.text, mark.title))
    return Message(
        "system" if message.role == "developer" else message.role,
        tuple(parts),
        tool_calls=tuple(_tool_call(call) for call in message.tool_calls),
        tool_call_id=message.tool_call_id,
        name=message.name,
    )


def _tool_call(call: RequestedToolCall) -> ToolCall:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise PromptError(
            f"the arguments of call {call.id!r} are no JSON object: {call.function.arguments!r:.60}; pass them as the "
            "answer gave them"
        )
    return ToolCall(call.function.name, arguments, id=call.id)
