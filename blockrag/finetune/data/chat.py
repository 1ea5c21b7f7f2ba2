"""Conversations, as the instruction sets on the Hugging Face hub keep them: `messages` of role and content.

What such records have besides (where they come from, which model wrote them) is dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from blockrag.errors import DataError
from blockrag.finetune.data.lines import ChatLine, parse_line
from blockrag.finetune.data.parts import LeftOut, nobody_asks
from blockrag.finetune.data.records import Record, read_records

__all__ = ["read_chat"]

_ROLES = {"system", "user", "assistant"}


def read_chat(path: str | Path, *, left_out: LeftOut = nobody_asks) -> Iterator[ChatLine]:
    """One line per conversation.

    Args:
        path: Parquet (allenai/tulu-3-sft-mixture), JSON lines or a JSON list.
        left_out: Told of every conversation that is left out: with tool messages, with an empty one, without an
            answer at its end, or whose turns are not user and assistant by turns behind an optional system message.

    Raises:
        DataError: A record is malformed; names the file and the record.
    """
    for record in read_records(path):
        messages = [_message(record, number, item) for number, item in enumerate(record.list_of("messages"), start=1)]
        if any(message["role"] not in _ROLES for message in messages):
            left_out("conversation with other roles")
        elif any(message["role"] != "system" and not message["content"].strip() for message in messages):
            left_out("conversation with an empty message")
        elif not messages or messages[-1]["role"] != "assistant":
            left_out("conversation without an answer")
        elif not _takes_turns([message["role"] for message in messages]):
            left_out("conversation out of turn")
        else:
            identity = record.identity("id")
            line = parse_line({"messages": messages} | ({"id": identity} if identity else {}), record.where)
            if isinstance(line, ChatLine):
                yield line


def _takes_turns(roles: Sequence[str]) -> bool:
    spoken = roles[1:] if roles[0] == "system" else roles
    return all(role == ("user", "assistant")[number % 2] for number, role in enumerate(spoken))


def _message(record: Record, number: int, item: object) -> dict[str, str]:
    if isinstance(item, dict) and isinstance(item.get("role"), str):
        content = item.get("content")
        if content is None or isinstance(content, str):
            return {"role": item["role"], "content": content or ""}
    raise DataError(f"{record.where}, message {number}: must hold a role and a content, got {item!r:.80}")
