"""LlamaIndex's chat messages to the blocks of a prompt.

What is a passage: a `PassageBlock`, a `CitableBlock`, the text right before a `CachePoint`; and, in messages that have
none of these, text in which a tracked passage stands. Everything else is text of the message, and so is white space.

Neighboring blocks of a message are joined as `ChatMessage.content` joins them, by a line break; beside a passage only
where no white space stands already. The prompt's text is therefore the text that stock synthesizers would show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from llama_index.core.base.llms.types import (
    CachePoint,
    ChatMessage,
    CitableBlock,
    MessageRole,
    TextBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.llms.blockrag.blocks import PassageBlock
from llama_index.llms.blockrag.nodes import PromptForm
from llama_index.llms.blockrag.tool_calls import arguments_of

from blockrag.errors import PromptError
from blockrag.passage import Passage
from blockrag.prompt.chat import fits_rag, segment_chat, segment_rag
from blockrag.prompt.locate import cut_excerpts
from blockrag.prompt.message import Excerpt, Message, Part, Role, ToolCall

if TYPE_CHECKING:
    from llama_index.llms.blockrag.tracking import Tracked

    from blockrag.model.block_model import BlockModel
    from blockrag.prompt.segment import SegmentedPrompt

__all__ = ["Prepared", "core_messages", "prepare"]

_ROLES: dict[MessageRole, Role] = {
    MessageRole.SYSTEM: "system",
    MessageRole.DEVELOPER: "system",
    MessageRole.USER: "user",
    MessageRole.ASSISTANT: "assistant",
    MessageRole.CHATBOT: "assistant",
    MessageRole.MODEL: "assistant",
    MessageRole.TOOL: "tool",
    MessageRole.FUNCTION: "tool",
}
# A passage is in a prompt, but not whole, where this much of its beginning or end is.
_TELLING_CHARACTERS = 32


@dataclass(frozen=True)
class Prepared:
    """A prompt, and what became of the passages.

    Args:
        prompt: The blocks.
        found: Passages that are blocks of their own.
        missing: Tracked passages that are in the prompt, but split or rewritten.
        in_question: Tracked passages that are in the prompt, but that the question quotes.
    """

    prompt: SegmentedPrompt
    found: int
    missing: int = 0
    in_question: int = 0


def prepare(
    model: BlockModel,
    messages: Sequence[ChatMessage],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    tracked: Tracked | None = None,
    form: PromptForm = "chat",
    whole: bool = False,
) -> Prepared:
    """The prompt of a conversation.

    Args:
        model: Whose template and tokenizer to use.
        messages: The conversation.
        tools: JSON schemas of functions the model may call, in the form of the OpenAI API.
        tracked: What is known of passages in the text.
        form: "rag" shows the passages and the question in the form the model was block-fine-tuned on. Prompts without
            passages or with a part of one, prompts that refine an answer, conversations with tools and those in which
            an answer has no question before it have only the chat form.
        whole: One global block, as for full attention; the RAG form keeps its blocks' tokens.

    Raises:
        PromptError: There are no messages, a block of one is not text, or the template cannot show them.
    """
    asked = core_messages(messages)
    if tracked is not None and not any(message.passages for message in asked):
        shown = "".join(message.text for message in asked)
        # A template may have changed what was pasted into it.
        pasted = [text for text in tracked.pasted if text.strip() in shown]
        asked = [_cut(message, tracked, pasted) for message in asked]
        found, missing, in_question = _sorted_out(asked, tracked, pasted)
    else:
        found, missing, in_question = sum(len(message.passages) for message in asked), 0, 0
    question = "" if tracked is None else tracked.query
    template, tokenizer = model.template, model.tokenizer
    refines = tracked is not None and tracked.refines
    if form == "rag" and found and not missing and not refines and fits_rag(asked, tools=tools):
        if question:
            # The framework wrote the messages around the passages; the RAG form brings its own instruction.
            asked = [message for message in asked if message.role != "system" or message.passages]
        prompt = segment_rag(template, tokenizer, asked, question=question)
    else:
        prompt = segment_chat(template, tokenizer, asked, tools=tools, question=question, whole=whole)
    return Prepared(prompt, found, missing, in_question)


def core_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """Messages for blockrag's prompts.

    Raises:
        PromptError: A block is neither text nor a passage nor a tool call.
    """
    return [_message(number, message) for number, message in enumerate(messages)]


def _message(number: int, message: ChatMessage) -> Message:
    parts: list[Part] = []
    calls: list[ToolCall] = []
    for block in message.blocks:
        if isinstance(block, PassageBlock) and block.text.strip():
            parts.append(block.excerpt())
        elif isinstance(block, TextBlock):
            parts.append(block.text)
        elif isinstance(block, CitableBlock):
            parts.append(_citable(number, block))
        elif isinstance(block, CachePoint):
            parts = _ending_in_passage(parts, f"cache point {number}.{len(parts)}")
        elif isinstance(block, ToolCallBlock):
            calls.append(ToolCall(block.tool_name, arguments_of(block), block.tool_call_id or ""))
        elif not isinstance(block, ThinkingBlock):
            raise PromptError(
                f"message {number} holds a block of type {block.block_type!r}, which this model cannot read; "
                "pass its text as a TextBlock or PassageBlock"
            )
    return Message(
        role=_ROLES[message.role],
        parts=_joined(parts),
        tool_calls=tuple(calls),
        tool_call_id=str(message.additional_kwargs.get("tool_call_id") or ""),
        name=str(message.additional_kwargs.get("name") or ""),
    )


def _citable(number: int, block: CitableBlock) -> Part:
    texts: list[str] = []
    for inner in block.content:
        if not isinstance(inner, TextBlock):
            raise PromptError(
                f"message {number} cites {block.source!r} with a block of type {inner.block_type!r}, which this model "
                "cannot read; cite its text"
            )
        texts.append(inner.text)
    text = "\n".join(texts)
    if not text.strip():
        return text
    return Excerpt(text, Passage(id=block.source or "citable", text=text, title=block.title))


def _ending_in_passage(parts: list[Part], name: str) -> list[Part]:
    """The parts with the run of texts at their end as one passage."""
    start = len(parts)
    while start and isinstance(parts[start - 1], str):
        start -= 1
    text = "\n".join(part for part in parts[start:] if isinstance(part, str))
    if not text.strip():
        return parts
    return [*parts[:start], Excerpt(text, Passage(id=name, text=text))]


def _joined(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with line breaks between them where they are needed."""
    joined: list[Part] = []
    for part in parts:
        if not _text(part):
            continue
        if isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += f"\n{part}"
            continue
        if joined and not (_text(joined[-1])[-1:].isspace() or _text(part)[:1].isspace()):
            if isinstance(part, str):
                part = f"\n{part}"
            elif isinstance(joined[-1], str):
                joined[-1] += "\n"
            else:
                joined.append("\n")
        joined.append(part)
    return tuple(joined)


def _text(part: Part) -> str:
    return part if isinstance(part, str) else part.text


def _cut(message: Message, tracked: Tracked, pasted: Sequence[str]) -> Message:
    """The message cut at tracked passages. What the model or a tool said is left alone, also where it quotes one."""
    if message.role not in ("system", "user"):
        return message
    parts = [
        piece
        for part in message.parts
        for piece in (
            cut_excerpts(part, tracked.excerpts, question=tracked.query, pasted=pasted)
            if isinstance(part, str)
            else (part,)
        )
    ]
    return replace(message, parts=tuple(parts))


def _sorted_out(messages: Sequence[Message], tracked: Tracked, pasted: Sequence[str]) -> tuple[int, int, int]:
    """How many tracked passages are blocks, are in the text but not whole, and are left alone for the question's sake.

    Those that are not in the prompt at all count nowhere: refining and accumulating show them one by one.
    """
    blocks = {part.text for message in messages for part in message.parts if isinstance(part, Excerpt)}
    if pasted:
        beside = "\n".join(pasted)
        for body in sorted(blocks, key=len, reverse=True):
            beside = beside.replace(body, "")
    else:
        beside = "".join(message.text for message in messages)
        beside = beside.replace(tracked.query, "") if tracked.query else beside
    found = missing = in_question = 0
    for excerpt in tracked.excerpts:
        body, content = excerpt.text.strip(), excerpt.passage.text.strip()
        if body in blocks:
            found += 1
        elif body and body in tracked.query:
            in_question += 1
        elif content and (content[:_TELLING_CHARACTERS] in beside or content[-_TELLING_CHARACTERS:] in beside):
            missing += 1
    return found, missing, in_question
