"""Conversations with passages in them, to blocks, in one of two forms.

    chat form   every message as it is, in the markup of the model's chat turns; passages stay where they are
    RAG form    the prompt the model was block-fine-tuned on: prefix, passages, question; then the turns that followed

In the chat form the blocks are: what precedes the first passage; each passage; the text between two passages of one
message; and, as the query block, everything behind the last passage. Joined, their texts are the conversation as
plain rendering gives it. Text between passages of *different* messages (an assistant's turn, say) must see what came
before it, and is therefore a global block. Without passages there is one global block: a plain prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from blockrag.errors import PromptError
from blockrag.prompt.encode import Draft, Span, check_text, content, encode_drafts, markup
from blockrag.prompt.message import Excerpt, Message, Part
from blockrag.prompt.segment import Block, BlockKind, SegmentedPrompt
from blockrag.prompt.tools import render_with_tools, trimmed

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.passage import Passage
    from blockrag.prompt.template import PromptTemplate

__all__ = ["excerpt_blocks", "fits_rag", "segment_chat", "segment_rag"]


def excerpt_blocks(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, source: str = "") -> list[Block]:
    """The blocks of passages shown as they are, one each and in order; the same in every prompt.

    Args:
        tokenizer: The model's tokenizer.
        texts: What is shown; white space at the ends is not part of the block.
        source: Id of the passage, for reports.

    Raises:
        PromptError: A text holds a lone surrogate, or a character that can only be a control token.
    """
    return encode_drafts(tokenizer, [_excerpt_draft(check_text("a passage", text).strip(), source) for text in texts])


def segment_chat(
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    tools: Sequence[Mapping[str, object]] = (),
    question: str = "",
    whole: bool = False,
) -> SegmentedPrompt:
    """A conversation in the chat form.

    Args:
        template: The model's template.
        tokenizer: Its tokenizer.
        messages: At least one.
        tools: JSON schemas of functions the model may call, in the form of the OpenAI API; with them, or with tool
            calls in the messages, the tokenizer's own chat template renders the prompt.
        question: What is asked, where it is known: text that holds it is not worth storing and must see the passages
            before it, and therefore is a global block.
        whole: Do not cut: one global block, tokenized as one string, as for full attention.

    Raises:
        PromptError: There are no messages, a text holds a lone surrogate, or the chat template refuses the messages.
    """
    if not messages:
        raise PromptError("a conversation needs at least one message; got none")
    with_tools = bool(tools) or any(message.role == "tool" or message.tool_calls for message in messages)
    pieces = list(
        render_with_tools(tokenizer, messages, tools) if with_tools else _rendered(template, tokenizer, messages)
    )
    if whole or all(isinstance(piece, Span) for piece in pieces):
        spans = tuple(span for piece in pieces for span in _spans(template, piece))
        return _encoded(template, tokenizer, [Draft(groups=(spans,), local=False, kind="query")])
    first, *drafts = _cut(template, pieces, question)
    if first.kind == "passage":
        # Nothing stands before it; what says that blocks follow then is a block of its own, as in the RAG form.
        first, drafts = Draft(groups=((markup(""),),), local=True, kind="prefix"), [first, *drafts]
    if first.kind == "prefix":
        passing = _is_passing(messages, first, question)
        first = replace(template._open(tokenizer, first), local=not passing, kind="turn" if passing else "prefix")
    return _encoded(template, tokenizer, [first, *drafts])


def fits_rag(messages: Sequence[Message], *, tools: Sequence[Mapping[str, object]] = ()) -> bool:
    """Whether `segment_rag` can show a conversation: answers behind questions, a question last, no tools."""
    said = [message for message in messages if message.role != "system"]
    answers_follow = all(
        before is not None and before.role == "user"
        for before, message in zip([None, *said], said, strict=False)
        if message.role == "assistant"
    )
    calls = bool(tools) or any(message.role == "tool" or message.tool_calls for message in said)
    return bool(messages) and messages[-1].role == "user" and answers_follow and not calls


def segment_rag(
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    question: str = "",
) -> SegmentedPrompt:
    """A conversation in the form the model was block-fine-tuned on.

    A single user message with passages and a question gives exactly `template.segment`. Passages of a system message
    count for the user message behind it, and the rest of such a message is left out, since the form brings its own
    instruction; the text of a system message without passages follows the prefix, in the same block.

    Args:
        template: The model's template.
        tokenizer: Its tokenizer.
        messages: System, user and assistant messages, the last of them the user's.
        question: What is asked last, where the message also holds other text; by default the text of that message.

    Raises:
        PromptError: The last message is not the user's, a question is empty, tools are involved, or the template has no
            form for a conversation that goes on.
    """
    instructions, turns = _turns(messages, question)
    prefix = template._prefix_draft(tokenizer)
    if instructions:
        prefix = replace(prefix, groups=(*prefix.groups[:-1], (*prefix.groups[-1], content(f"{instructions}\n\n"))))
    drafts = [prefix]
    running: list[Span] = []
    for number, (passages, asked, answer) in enumerate(turns):
        if number:
            if not template.follow_up_query:
                raise PromptError(
                    f"template {template.name!r} cannot continue a conversation; give it a follow_up_query"
                )
            running = _opened(drafts, running, markup(template.follow_up_open), has_passages=bool(passages))
        drafts += map(template._passage_draft, passages)
        running += template._query_spans(template.follow_up_query if number else template.query, asked)
        if answer is not None:
            running.append(content(template.answer_opening + answer))
    return _encoded(template, tokenizer, [*drafts, Draft(groups=(tuple(running),), local=False, kind="query")])


# -- the chat form ----------------------------------------------------------------------------------------------------


def _rendered(
    template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> Iterator[Part | Span]:
    """The conversation in the template's markup: spans, and the passages between them."""
    yield markup(template._resolve(tokenizer, template.conversation_start))
    if messages[0].role != "system" and template.default_system and template.system is not None:
        yield from (
            markup(template.system.before),
            content(template.default_system),
            markup(template.system.after),
        )
    previous = ""
    for role, parts in _turns_of(messages):
        turn = template._turn(role, after_system=previous == "system")
        yield markup(turn.before)
        yield from trimmed(parts, strip=template.strip_turns)
        yield markup(turn.after)
        previous = role
    yield markup(template.generation)


def _turns_of(messages: Sequence[Message]) -> Iterator[tuple[str, list[Part]]]:
    """Role and parts of each turn; system messages in a row are one turn, which every template can show."""
    for role, run in groupby(messages, key=lambda message: message.role):
        turns = [list(message.parts) for message in run]
        if role == "system":
            turns = [[part for parts in turns for part in ("\n\n", *parts)][1:]]
        for parts in turns:
            yield role, parts


def _cut(template: PromptTemplate, pieces: Sequence[Part | Span], question: str) -> list[Draft]:
    """Runs of spans, and the passages between them, as drafts; the last one is the query's."""
    drafts: list[Draft] = []
    for is_text, run in groupby(pieces, key=lambda piece: isinstance(piece, Span)):
        if not is_text:
            drafts += [_passage_draft(template, piece) for piece in run]
            continue
        spans = tuple(span for piece in run for span in _spans(template, piece) if span.text)
        if spans:
            # Markup between two passages means that they belong to two messages; a question must see those before it.
            local = not drafts or not (any(span.is_markup for span in spans) or _holds(spans, question))
            kind: BlockKind = "turn" if not local else "separator" if drafts else "prefix"
            drafts.append(Draft(groups=(spans,), local=local, kind=kind))
    return [*drafts[:-1], replace(drafts[-1], local=False, kind="query")]


def _is_passing(messages: Sequence[Message], opening: Draft, question: str) -> bool:
    """Whether what precedes the first passage is this conversation's own and will not come again."""
    for message in messages:
        if message.role in ("assistant", "tool"):
            return True
        if message.passages:
            break
    return _holds(opening.groups[0], question)


def _holds(spans: Sequence[Span], question: str) -> bool:
    asked = question.strip()
    return bool(asked) and asked in "".join(span.text for span in spans)


def _spans(template: PromptTemplate, piece: Part | Span) -> tuple[Span, ...]:
    if isinstance(piece, Span):
        return (piece,)
    return _passage_draft(template, piece).groups[0]


def _passage_draft(template: PromptTemplate, piece: Part | Span) -> Draft:
    if isinstance(piece, Excerpt):
        return _excerpt_draft(piece.text, piece.passage.id)
    if isinstance(piece, (str, Span)):
        raise AssertionError(f"{piece!r} is text")
    return template._passage_draft(piece)


def _excerpt_draft(text: str, source: str) -> Draft:
    return Draft(groups=((content(text),),), local=True, kind="passage", source=source)


# -- the RAG form -----------------------------------------------------------------------------------------------------


def _turns(messages: Sequence[Message], question: str) -> tuple[str, list[tuple[list[Passage], str, str | None]]]:
    """System text, and per user turn its passages, its question and the answer it got (None for the last)."""
    instructions: list[str] = []
    turns: list[tuple[list[Passage], str, str | None]] = []
    passages: list[Passage] = []
    asked: list[str] = []
    for number, message in enumerate(messages):
        if message.role == "tool" or message.tool_calls:
            raise PromptError(
                f"message {number} belongs to a tool call, which the RAG form cannot show; use the chat form"
            )
        if message.role == "assistant":
            if not asked:
                raise PromptError(f"message {number} is an answer without a question before it; begin with the user's")
            turns.append((passages, "\n\n".join(asked), message.text.strip()))
            passages, asked = [], []
            continue
        passages = [*passages, *message.passages]
        if message.role == "user":
            asked.append(message.text.strip())
        elif not message.passages:
            instructions.append(message.text.strip())
    if not messages or messages[-1].role != "user":
        last = messages[-1].role if messages else "missing"
        raise PromptError(f"the last message is {last}; end the conversation with the user's question")
    return "\n\n".join(instructions), [*turns, (passages, question or "\n\n".join(asked), None)]


def _opened(drafts: list[Draft], running: list[Span], opening: Span, *, has_passages: bool) -> list[Span]:
    """Open the next user turn as `PromptTemplate.follow_up` does; returns the text that is running from there on."""
    if not has_passages:
        return [*running, opening]
    drafts.append(Draft(groups=(tuple(running),), local=False, kind="turn"))
    drafts.append(Draft(groups=((opening,),), local=True, kind="turn"))
    return []


def _encoded(template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft]) -> SegmentedPrompt:
    blocks = tuple(block for block in encode_drafts(tokenizer, drafts) if block.token_ids)
    return SegmentedPrompt(blocks=blocks, stop=template.stop)
