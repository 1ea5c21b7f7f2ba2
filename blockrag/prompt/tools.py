"""Functions a model may call: prompts that offer them, in the model's own chat template, and calls read from answers.

A chat template is asked to render the messages with a marker in the place of everything that comes from outside; what
stands around the markers is markup, and what they stand for is content, which can never act as markup. Names, ids and
schemas, which chat templates may look at, get a marker only where they could act as markup.
Source: https://huggingface.co/docs/transformers/chat_extras
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from blockrag.errors import PromptError
from blockrag.prompt.encode import Span, _control_tokens, check_text, content, markup
from blockrag.prompt.message import Excerpt, Message, Part, ToolCall

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["parse_tool_calls", "render_with_tools", "supports_tools", "trimmed"]

# Hermes and Qwen mark each call; Mistral marks a list of them; Llama 3 answers with the bare call.
_MARKED = re.compile(r"<tool_call>\s*(.*?)\s*(?:</tool_call>|$)", re.DOTALL)
_LEADS = ("[TOOL_CALLS]", "<|python_tag|>")
# What is no part of a control token, whatever stands beside it.
_HARMLESS = re.compile(r"[A-Za-z0-9_.-]*")
_LONE_SURROGATE = re.compile(r"[\ud800-\udfff]")


def supports_tools(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template shows tools."""
    template = tokenizer.chat_template
    sources = template.values() if isinstance(template, Mapping) else [template]
    return any("tools" in str(source) for source in sources if source)


def render_with_tools(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Mapping[str, object]] = ()
) -> Iterator[Part | Span]:
    """A conversation in the tokenizer's own chat template: spans, and the passages between them.

    Raises:
        PromptError: The chat template has no place for tools, refuses the messages, or leaves out what one says.
    """
    if not supports_tools(tokenizer):
        raise PromptError(
            "the model's chat template shows no tools; use a model whose template does, or call this one without tools"
        )
    markers = _Markers(tokenizer)
    rows = [_row(message, markers) for message in messages]
    schemas = [markers.in_schema(tool) for tool in tools]
    try:
        text = tokenizer.apply_chat_template(rows, tools=schemas or None, add_generation_prompt=True, tokenize=False)
    # A chat template is foreign code: it refuses messages by raising whatever it likes.
    except Exception as error:
        roles = [message.role for message in messages]
        raise PromptError(f"the model's chat template cannot show the roles {roles}: {error}") from error
    yield from markers.replaced(str(text))


class _Markers:
    """What stands for text from outside while a chat template renders."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._control = _control_tokens(tokenizer).pattern
        self._nonce = secrets.token_hex(4)
        self._fills: dict[str, list[Part | Span]] = {}
        self._required: set[str] = set()

    def of(self, pieces: list[Part | Span], *, required: bool = True) -> str:
        """A marker for these pieces, which a chat template may leave out only if they are not required."""
        name = f"Filler{self._nonce}N{len(self._fills)}E"
        self._fills[name] = pieces
        if required and pieces:
            self._required.add(name)
        return name

    def of_label(self, text: str) -> str:
        """A name or an id as it is, or the marker of one that could act as markup."""
        return text if _HARMLESS.fullmatch(text) else self.of([_json_content(text)], required=False)

    def in_arguments(self, value: object) -> object:
        """Arguments with markers for their strings, which are written as JSON strings without their quotes."""
        if isinstance(value, str):
            return self.of([_json_content(value)]) if value else value
        if isinstance(value, Mapping):
            return {self.of_label(str(name)): self.in_arguments(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.in_arguments(inner) for inner in value]
        return value

    def in_schema(self, value: object) -> Any:
        """A schema with markers for the strings that spell control tokens."""
        if isinstance(value, str):
            spells = self._control.search(value) or _LONE_SURROGATE.search(value)
            return self.of([_json_content(value)], required=False) if spells else value
        if isinstance(value, Mapping):
            return {self.in_schema(name): self.in_schema(inner) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.in_schema(inner) for inner in value]
        return value

    def replaced(self, text: str) -> Iterator[Part | Span]:
        """What was rendered, with what the markers stand for.

        Raises:
            PromptError: What is required was left out.
        """
        shown = re.split(rf"(Filler{self._nonce}N\d+E)", text)
        for name in sorted(self._required.difference(shown)):
            said = "".join(piece.text for piece in self._fills[name] if isinstance(piece, (Span, Excerpt)))
            raise PromptError(
                f"the model's chat template leaves out {said[:60]!r}; use a model whose template shows it"
            )
        for piece in shown:
            if piece in self._fills:
                yield from self._fills[piece]
            elif piece:
                yield markup(piece)


def _row(message: Message, markers: _Markers) -> dict[str, object]:
    """One message as chat templates take it."""
    row: dict[str, object] = {
        "role": message.role,
        "content": markers.of(trimmed(message.parts)) if message.parts else "",
    }
    if message.tool_calls:
        row["tool_calls"] = [
            {
                "type": "function",
                "id": markers.of_label(call.id),
                "function": {
                    "name": markers.of_label(call.name),
                    "arguments": markers.in_arguments(call.arguments),
                },
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        row |= {"tool_call_id": markers.of_label(message.tool_call_id), "name": markers.of_label(message.name)}
    return row


def _json_content(text: str) -> Span:
    """A string as it stands between the quotes of JSON; a lone surrogate, which cannot be encoded, as its escape."""
    written = json.dumps(text, ensure_ascii=False)[1:-1]
    return content(_LONE_SURROGATE.sub(lambda match: f"\\u{ord(match[0]):04x}", written))


def trimmed(parts: Sequence[Part], *, strip: bool = False) -> list[Part | Span]:
    """Parts with text as content spans; white space at the ends of excerpts is moved out of them.

    Args:
        parts: What a message says.
        strip: Drop the white space at the ends of the message.

    Raises:
        PromptError: A text holds a lone surrogate.
    """
    pieces: list[Part | Span] = []
    for part in parts:
        if isinstance(part, Excerpt):
            body = check_text("a passage", part.text).strip()
            before, _, after = part.text.partition(body) if body else (part.text, "", "")
            pieces += [content(before), Excerpt(body, part.passage), content(after)]
        else:
            pieces.append(content(check_text("a message", part)) if isinstance(part, str) else part)
    pieces = [piece for piece in pieces if not isinstance(piece, (Span, Excerpt)) or piece.text]
    if strip and pieces and isinstance(pieces[0], Span):
        pieces[0] = content(pieces[0].text.lstrip())
    if strip and pieces and isinstance(pieces[-1], Span):
        pieces[-1] = content(pieces[-1].text.rstrip())
    return pieces


def parse_tool_calls(text: str) -> tuple[str, tuple[ToolCall, ...]]:
    """Read the calls from an answer.

    Understands `<tool_call>{...}</tool_call>` (Hermes, Qwen), a JSON object or list of them as the whole answer
    (Llama 3, and Mistral behind its mark).

    Args:
        text: The answer.

    Returns:
        The text apart from the calls, and the calls with ids made here; no calls, and the whole text, if what looks
        like one is not valid JSON with a name.
    """
    if "<tool_call>" in text:
        found = [call for match in _MARKED.finditer(text) for call in _calls(match[1])]
        return (_MARKED.sub("", text).strip(), tuple(found)) if found else (text, ())
    bare = text.strip()
    for lead in _LEADS:
        bare = bare.removeprefix(lead).strip()
    calls = _calls(bare) if bare.startswith(("{", "[")) else []
    return ("", tuple(calls)) if calls else (text, ())


def _calls(source: str) -> list[ToolCall]:
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        return []
    calls = []
    for item in value if isinstance(value, list) else [value]:
        arguments = item.get("arguments", item.get("parameters")) if isinstance(item, dict) else None
        if not isinstance(arguments, dict) or not isinstance(item.get("name"), str):
            return []
        # Mistral's chat templates take nine letters and digits, and nothing else.
        calls.append(ToolCall(item["name"], arguments, id=secrets.token_hex(5)[:9]))
    return calls
