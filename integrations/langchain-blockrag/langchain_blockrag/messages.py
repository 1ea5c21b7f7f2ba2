"""LangChain messages as blockrag's: which of their text is a passage and which is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from blockrag.errors import InputError
from blockrag.passage import Passage
from blockrag.prompt import Excerpt, Message, Part, ToolCall
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, BaseMessage, ChatMessage, HumanMessage, SystemMessage, ToolMessage

from langchain_blockrag.documents import MARK, passage_parts, shown

__all__ = ["core_messages", "with_documents"]

# What a model said besides its answer; calls stand in `tool_calls` as well.
_UNSAID = {"reasoning", "thinking", "redacted_thinking", "tool_call", "tool_call_chunk", "tool_use"}


def core_messages(messages: Sequence[BaseMessage]) -> list[Message]:
    """The same conversation for `blockrag.prompt`; names of speakers are left out.

    Raises:
        InputError: A message has a role or a part that a text model cannot be shown.
    """
    return [_core_message(message) for message in messages]


def with_documents(messages: Sequence[BaseMessage], documents: Sequence[Document | str]) -> list[BaseMessage]:
    """The conversation with documents at the head of its last human message, as `documents_to_blocks` has them.

    Raises:
        InputError: There is no human message, or one of the documents is none.
    """
    parts = passage_parts(documents)
    for place in reversed(range(len(messages))):
        message = messages[place]
        if isinstance(message, HumanMessage):
            asked = message.content
            said = [{"type": "text", "text": asked}] if isinstance(asked, str) else asked
            return [*messages[:place], message.model_copy(update={"content": [*parts, *said]}), *messages[place + 1 :]]
    raise InputError(f"documents go with a human message; got {[message.type for message in messages]}")


def _core_message(message: BaseMessage) -> Message:
    parts = tuple(_parts(message))
    if isinstance(message, AIMessage):
        calls = tuple(ToolCall(call["name"], call["args"], id=call["id"] or "") for call in message.tool_calls)
        return Message("assistant", parts, tool_calls=calls)
    if isinstance(message, ToolMessage):
        return Message("tool", parts, tool_call_id=message.tool_call_id, name=message.name or "")
    if isinstance(message, HumanMessage):
        return Message("user", parts)
    if isinstance(message, SystemMessage):
        return Message("system", parts)
    if isinstance(message, ChatMessage) and message.role in ("system", "user", "assistant"):
        return Message(message.role, parts)  # type: ignore[arg-type]
    role = message.role if isinstance(message, ChatMessage) else message.type
    raise InputError(f"a message has the role {role!r}; pass system, human, AI and tool messages")


def _parts(message: BaseMessage) -> Iterator[Part]:
    content: Sequence[str | dict[Any, Any]] = [message.content] if isinstance(message.content, str) else message.content
    for number, part in enumerate(content):
        if isinstance(part, str):
            yield part
            continue
        kind, text, extras = part.get("type"), part.get("text"), part.get("extras")
        if isinstance(message, AIMessage) and kind in _UNSAID:
            continue
        if kind not in ("text", "text-plain"):
            raise InputError(f"a {message.type} message holds a part of type {kind!r}; this model reads text only")
        if not isinstance(text, str):
            raise InputError(f"a {kind!r} part of a {message.type} message has the text {text!r:.60}; pass a string")
        # Extras are anybody's: what is no mapping cannot be ours.
        facts = extras.get(MARK) if isinstance(extras, Mapping) else None
        if facts is not None and not isinstance(facts, Mapping):
            raise InputError(f'extras["{MARK}"] of a text part is {facts!r:.60}; pass a mapping with id and title')
        if kind == "text-plain":
            yield _attached(text, str(part.get("title") or "").strip(), facts or {}, number)
        else:
            yield text if facts is None else _excerpt(text, facts, number)


def _excerpt(text: str, facts: Mapping[str, object], number: int) -> Excerpt:
    """A passage as a text part shows it, with its title on the first line or without."""
    title = str(facts.get("title") or "").strip()
    body = f"{text.strip()}\n".removeprefix(f"{title}\n").strip()
    return Excerpt(text, _passage(body, title, facts, number))


def _attached(text: str, title: str, facts: Mapping[str, object], number: int) -> Excerpt:
    """A passage whose title stands beside its text."""
    passage = _passage(text, title, facts, number)
    return Excerpt(f"{shown(passage)}\n\n", passage)


def _passage(text: str, title: str, facts: Mapping[str, object], number: int) -> Passage:
    return Passage(id=str(facts.get("id") or number + 1), text=text, title=title)
