"""What a conversation is made of before it becomes blocks: messages, and the passages inside them.

Frameworks and servers speak in messages. Here a message says what is a passage and what is not, so that nothing has
to be found again in a string. Plain values; nothing here knows templates or tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from blockrag.errors import PromptError
from blockrag.passage import Passage

__all__ = ["Excerpt", "Message", "Part", "Role", "ToolCall"]

Role = Literal["system", "user", "assistant", "tool"]
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True, slots=True)
class Excerpt:
    """A passage as the text of a prompt already shows it.

    Args:
        text: Exactly what is shown. White space at its ends belongs to the text around it, not to the block.
        passage: What it shows, for prompts that show passages in a form of their own.
    """

    text: str
    passage: Passage


Part: TypeAlias = str | Passage | Excerpt
"""Text, a passage to be shown in the template's form, or a passage shown as it is."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call the model made: the function's name, its arguments as JSON values, and an id that results refer to."""

    name: str
    arguments: Mapping[str, object]
    id: str = ""


@dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        parts: What it says, in order.
        tool_calls: Calls an assistant message makes.
        tool_call_id: The call a tool message answers.
        name: The function a tool message answers for.

    Raises:
        PromptError: There is no such role, or a part has another type.
    """

    role: Role
    parts: tuple[Part, ...]
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if self.role not in _ROLES:
            raise PromptError(f"a message has the role {self.role!r}; roles are {', '.join(_ROLES)}")
        if isinstance(self.parts, str):
            raise PromptError(
                f"parts must be a sequence, got the string {self.parts!r:.60}; pass ({self.parts!r:.60},)"
            )
        object.__setattr__(self, "parts", tuple(self.parts))
        for part in self.parts:
            if not isinstance(part, (str, Passage, Excerpt)):
                raise PromptError(f"a part of a message is a {type(part).__name__}; pass str, Passage or Excerpt")

    @property
    def passages(self) -> tuple[Passage, ...]:
        """Its passages, in order."""
        return tuple(
            part.passage if isinstance(part, Excerpt) else part for part in self.parts if not isinstance(part, str)
        )

    @property
    def text(self) -> str:
        """What it says apart from its passages."""
        return "".join(part for part in self.parts if isinstance(part, str))
