"""A template for a tokenizer: a named one where its chat markup is known, else one read off its chat template.

Reading off means rendering short conversations of sentinel words and cutting the result at the words; what stands
between them is the markup. Dates are fixed while rendering, for a prefix that changed every day would be prefilled
every day.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockrag.prompt.registry import INSTRUCTION, SYSTEM, TEMPLATES
from blockrag.prompt.template import PromptTemplate, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["template_for"]

_logger = logging.getLogger(__name__)

_SYSTEM, _USER, _ASSISTANT, _LAST = "Sentinelsystem", "Sentineluser", "Sentinelassistant", "Sentinellast"
# Shadows the function of that name that chat templates ask for the date.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{ format | replace('%Y', '2024') | replace('%m', '07') | replace('%d', '26')"
    " | replace('%B', 'July') | replace('%b', 'Jul') }}{%- endmacro -%}"
)


def template_for(tokenizer: PreTrainedTokenizerBase, *, name_or_path: str = "") -> PromptTemplate:
    """The prompt template for a model.

    A checkpoint whose name says Tulu gets `tulu` (`tulu-block` if it says block too); Llama 3 headers give `llama3`,
    ChatML gives `chatml`, and the Tulu form gives `tulu`. Any other chat template is read off. A tokenizer without one,
    or with one that cannot be read off (this is logged), gives `plain`.

    Args:
        tokenizer: The model's tokenizer.
        name_or_path: The model's id or directory; only "tulu" and "block" in its last part are looked at.
    """
    name = name_or_path.replace("\\", "/").rstrip("/").rpartition("/")[2].lower()
    if "tulu" in name:
        return TEMPLATES["tulu-block" if "block" in name else "tulu"]
    source = tokenizer.chat_template
    if not source:
        return TEMPLATES["plain"]
    text = "\n".join(map(str, source.values())) if isinstance(source, Mapping) else str(source)
    if "<|start_header_id|>" in text and "<|eot_id|>" in text:
        return TEMPLATES["llama3"]
    if "<|im_start|>" in text and "<|im_end|>" in text:
        return _chatml(tokenizer)
    derived = _derive(tokenizer)
    if derived is None:
        _logger.warning("the chat template of %r cannot be read off; using the plain template", name_or_path)
        return TEMPLATES["plain"]
    return TEMPLATES["tulu"] if _is_tulu(derived) else derived


def _chatml(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate:
    """The ChatML template, with the system text that this chat template adds to conversations without one."""
    derived = _derive(tokenizer)
    if derived is None or not derived.default_system:
        return TEMPLATES["chatml"]
    return replace(TEMPLATES["chatml"], default_system=derived.default_system)


def _is_tulu(template: PromptTemplate) -> bool:
    tulu = TEMPLATES["tulu"]
    return (template.user, template.assistant.before, template.generation) == (
        tulu.user,
        tulu.assistant.before,
        tulu.generation,
    )


@dataclass(frozen=True, slots=True)
class _Joints:
    """What a chat template puts before, between and after the sentinels of a conversation."""

    start: str
    between: tuple[str, ...]
    end: str


def _derive(tokenizer: PreTrainedTokenizerBase) -> PromptTemplate | None:
    """The template read off the chat template, or None if its renderings cannot be cut at the sentinels."""
    dialogue = (("user", _USER), ("assistant", _ASSISTANT), ("user", _LAST))
    closed = _joints(tokenizer, dialogue, opener=False)
    asking = _joints(tokenizer, dialogue, opener=True)
    if closed is None or asking is None or not asking.end.startswith(closed.end):
        return None
    user_to_assistant, assistant_to_user = closed.between
    user_after, eos = closed.end, str(tokenizer.eos_token or "")
    if not user_to_assistant.startswith(user_after):
        return None
    bos = str(tokenizer.bos_token or "")
    start = bos if closed.start.startswith(bos) else ""
    opening = closed.start.removeprefix(start)
    user_before = _user_before(opening, assistant_to_user, closers=(user_after, eos))
    # What stands before the first user turn only: a system turn that the template adds, or fixed text.
    lead = opening.removesuffix(user_before)
    system = _system(tokenizer, start, user_before)
    default_system = ""
    if system and lead.startswith(system.before) and lead.endswith(system.after):
        default_system = lead[len(system.before) : len(lead) - len(system.after)]
    elif lead:
        start, system = start + lead, None
    return _build(
        start=start,
        system=system,
        user=Turn(user_before, user_after),
        assistant=Turn(user_to_assistant.removeprefix(user_after), assistant_to_user.removesuffix(user_before)),
        generation=asking.end.removeprefix(user_after),
        default_system=default_system,
        strip_turns=_strips(tokenizer),
        eos=eos,
    )


def _user_before(opening: str, assistant_to_user: str, *, closers: tuple[str, ...]) -> str:
    """What opens a user turn: all of `opening`, or the end it shares with later turns, less what ends a turn."""
    if assistant_to_user.endswith(opening):
        return opening
    length = 0
    while length < min(len(opening), len(assistant_to_user)) and opening[-length - 1] == assistant_to_user[-length - 1]:
        length += 1
    shared = opening[len(opening) - length :]
    for closer in closers:
        shared = shared.removeprefix(closer)
    return shared


def _system(tokenizer: PreTrainedTokenizerBase, start: str, user_before: str) -> Turn | None:
    """The system turn, or None if the template refuses one, moves it, or folds it into the user turn."""
    roles = (("system", _SYSTEM), ("user", _USER), ("assistant", _ASSISTANT), ("user", _LAST))
    joints = _joints(tokenizer, roles, opener=False)
    if joints is None or not joints.start.startswith(start) or not joints.between[0].endswith(user_before):
        return None
    return Turn(joints.start.removeprefix(start), joints.between[0].removesuffix(user_before))


def _build(
    *,
    start: str,
    system: Turn | None,
    user: Turn,
    assistant: Turn,
    generation: str,
    default_system: str,
    strip_turns: bool,
    eos: str,
) -> PromptTemplate:
    """The RAG prompt takes the system turn for instructions and passages, or opens the user turn with them."""
    closing = user.after + generation
    query = f"{system.after}{user.before}{INSTRUCTION}{closing}" if system else f"\n\n{INSTRUCTION}{closing}"
    return PromptTemplate(
        name="derived",
        version=1,
        prefix=start + (system.before if system else user.before) + SYSTEM,
        query=query,
        conversation_start=start,
        system=system,
        user=user,
        assistant=assistant,
        generation=generation,
        default_system=default_system,
        strip_turns=strip_turns,
        follow_up_open=assistant.after + user.before,
        follow_up_query=INSTRUCTION + closing,
        stop=tuple(dict.fromkeys(text for text in (assistant.after.strip(), eos) if text)),
    )


def _strips(tokenizer: PreTrainedTokenizerBase) -> bool:
    padded = f"  {_USER}  "
    rendered = _render(tokenizer, (("user", padded),), opener=False)
    return rendered is not None and padded not in rendered


def _joints(tokenizer: PreTrainedTokenizerBase, turns: tuple[tuple[str, str], ...], *, opener: bool) -> _Joints | None:
    """Cut a rendering at its sentinels; None if it failed, or they are not all there once and in order."""
    rest = _render(tokenizer, turns, opener=opener)
    if rest is None or any(rest.count(text) != 1 for _, text in turns):
        return None
    pieces = []
    for _, text in turns:
        piece, found, rest = rest.partition(text)
        if not found:
            return None
        pieces.append(piece)
    return _Joints(start=pieces[0], between=tuple(pieces[1:]), end=rest)


def _render(tokenizer: PreTrainedTokenizerBase, turns: tuple[tuple[str, str], ...], *, opener: bool) -> str | None:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        rendered = tokenizer.apply_chat_template(
            messages,
            chat_template=_FIXED_DATE + str(tokenizer.get_chat_template()),
            add_generation_prompt=opener,
            tokenize=False,
            date_string="26 Jul 2024",
        )
    # A chat template is foreign code: it refuses roles by raising whatever it likes.
    except Exception as error:
        _logger.debug("the chat template cannot render the roles %s: %s", [role for role, _ in turns], error)
        return None
    return str(rendered)
