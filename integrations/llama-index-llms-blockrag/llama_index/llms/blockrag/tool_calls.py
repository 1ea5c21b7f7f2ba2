"""Answers in which the model may call a tool: what of them is text, while they are written and when they end."""

from __future__ import annotations

import json
from typing import Any

from llama_index.core.base.llms.types import ToolCallBlock

from blockrag.errors import PromptError
from blockrag.prompt.message import ToolCall
from blockrag.prompt.tools import parse_tool_calls

__all__ = ["arguments_of", "shown_of", "split_calls"]

_MARK = "<tool_call>"
# How an answer begins that is nothing but calls; see blockrag.prompt.tools.
_BARE = ("{", "[", "<|python_tag|>")


def shown_of(said: str) -> str:
    """What is surely text of an answer that is not complete: a prefix of what `split_calls` gives in the end.

    Args:
        said: The answer so far.
    """
    text = said.strip()
    if text.startswith(_BARE) or _BARE[-1].startswith(text):
        return ""
    text, mark, _ = text.partition(_MARK)
    if not mark:
        held = next((size for size in range(len(_MARK) - 1, 0, -1) if text.endswith(_MARK[:size])), 0)
        text = text[: len(text) - held]
    return text.rstrip()


def arguments_of(block: ToolCallBlock) -> dict[str, Any]:
    """The arguments of a call, which some language models leave as JSON text.

    Raises:
        PromptError: They are no JSON object.
    """
    arguments: object = block.tool_kwargs
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except ValueError as error:
            raise PromptError(
                f"the call of {block.tool_name!r} has the arguments {arguments!r:.60}, which are no JSON ({error}); "
                "pass a dict"
            ) from error
    if not isinstance(arguments, dict):
        raise PromptError(f"the call of {block.tool_name!r} has the arguments {arguments!r:.60}; pass a dict")
    return arguments


def split_calls(said: str) -> tuple[str, tuple[ToolCall, ...]]:
    """The text of a complete answer without white space at its ends, and the calls it makes."""
    text, calls = parse_tool_calls(said)
    return text.strip(), calls
