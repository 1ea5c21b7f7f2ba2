"""Haystack's messages as blockrag's, and the place that documents take among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from haystack.dataclasses import ChatMessage, ReasoningContent, TextContent
from haystack.dataclasses import ToolCall as HaystackToolCall
from haystack.dataclasses.chat_message import ToolCallResult

from blockrag.prompt.chat import fits_rag
from blockrag.prompt.locate import cut_excerpts
from blockrag.prompt.message import Excerpt, Message, Part, ToolCall
from haystack_integrations.common.blockrag import DocumentForm

__all__ = ["PromptForm", "chosen_form", "to_messages", "with_documents"]

PromptForm = Literal["auto", "rag", "chat"]

_PARAGRAPH = "\n\n"


def to_messages(messages: Sequence[ChatMessage] | str) -> list[Message]:
    """Messages of a conversation, or of a question; a message with several tool results becomes several.

    Text parts of one message are paragraphs. Earlier reasoning is left out, as chat templates leave it out.

    Raises:
        ValueError: There is something else among the messages, or a message holds an image, a file, or anything else
            that is no text.
    """
    if isinstance(messages, str):
        messages = [ChatMessage.from_user(messages)]
    for message in messages:
        if not isinstance(message, ChatMessage):
            raise ValueError(f"messages must be a list of ChatMessage, or a string; one is {message!r:.60}")
    return [converted for message in messages for converted in _converted(message)]


def _converted(message: ChatMessage) -> list[Message]:
    texts: list[str] = []
    calls: list[ToolCall] = []
    results: list[Message] = []
    for part in message._content:
        if isinstance(part, TextContent):
            texts.append(part.text)
        elif isinstance(part, HaystackToolCall):
            calls.append(ToolCall(part.tool_name, part.arguments, id=part.id or ""))
        elif isinstance(part, ToolCallResult):
            origin = part.origin
            text = _result_text(part)
            results.append(Message("tool", (text,), tool_call_id=origin.id or "", name=origin.tool_name))
        elif not isinstance(part, ReasoningContent):
            raise _not_text(message.role.value, part)
    if results:
        return results
    text = _PARAGRAPH.join(texts)
    return [Message(message.role.value, (text,) if text else (), tool_calls=tuple(calls))]


def _result_text(part: ToolCallResult) -> str:
    if isinstance(part.result, str):
        return part.result
    for piece in part.result:
        if not isinstance(piece, TextContent):
            raise _not_text("tool", piece)
    return _PARAGRAPH.join(piece.text for piece in part.result if isinstance(piece, TextContent))


def _not_text(role: str, part: object) -> ValueError:
    return ValueError(
        f"a {role} message holds a {type(part).__name__}; BlockRAGChatGenerator reads text only, so remove it or "
        "describe it in text"
    )


def chosen_form(
    asked: PromptForm, messages: Sequence[Message], documents: Sequence[Excerpt] | None, *, with_tools: bool
) -> DocumentForm:
    """The form a prompt takes: "auto" is the RAG form when documents are given for it to show.

    It is the chat form without documents, when the messages show all of the documents already (somebody built the
    prompt), and for what the RAG form cannot show: tools, and answers to no question.
    """
    if asked != "auto":
        return asked
    if documents is None or with_tools or not fits_rag(messages):
        return "chat"
    texts = {excerpt.text.strip() for excerpt in documents} - {""}
    return "chat" if texts and texts <= _shown(_located(messages, documents)) else "rag"


def with_documents(
    messages: Sequence[Message], documents: Sequence[Excerpt], form: DocumentForm
) -> tuple[Message, ...]:
    """The conversation with the documents in it.

    In the RAG form they belong to the last user message. In the chat form those that messages show stay where they are
    shown, and the others open the last user message, a paragraph each.

    Raises:
        ValueError: There are documents to add, but no user message to add them to.
    """
    if form == "chat":
        messages = _located(messages, documents)
        shown = _shown(messages)
        new: list[Part] = []
        for excerpt in documents:
            if excerpt.text.strip() not in shown | {""}:
                new += [excerpt, _PARAGRAPH]
    else:
        new = [excerpt.passage for excerpt in documents]
    if not new:
        return tuple(messages)
    places = [place for place, message in enumerate(messages) if message.role == "user"]
    if not places:
        raise ValueError(
            f"{len(documents)} documents have no user message to go with; end the messages with the user's"
        )
    last = messages[places[-1]]
    return (
        *messages[: places[-1]],
        replace(last, parts=(*new, *last.parts)),
        *messages[places[-1] + 1 :],
    )


def _located(messages: Sequence[Message], documents: Sequence[Excerpt]) -> list[Message]:
    """The messages, cut where they show documents; what the assistant said is left alone."""
    return [
        message if message.role == "assistant" else replace(message, parts=cut_excerpts(message.text, documents))
        for message in messages
    ]


def _shown(messages: Sequence[Message]) -> set[str]:
    return {part.text for message in messages for part in message.parts if isinstance(part, Excerpt)}
