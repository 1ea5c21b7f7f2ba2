"""`PromptTemplate`: what the prompts of one model look like, and how they are cut into blocks.

A template is data: strings with at most one placeholder of each kind, plus the markup of chat turns. Its methods give
blocks of token ids; every block is tokenized on its own. The values of placeholders are inert: they are put in place in
one pass, so a passage that says `{question}` or `<|eot_id|>` shows just that.

The places of a RAG prompt: prefix (block 0, local) - one local block per passage - query (global).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from blockrag.errors import PromptError
from blockrag.prompt.encode import Draft, Span, check_text, content, encode_drafts, markup
from blockrag.prompt.segment import Block, BlockKind, SegmentedPrompt
from blockrag.prompt.splitter import merge_groups, split_by_delimiter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.passage import Passage

__all__ = ["PromptTemplate", "Turn"]

_PLACEHOLDER = re.compile(r"\{(title|text|question|bos)\}")
# Which placeholders a field must hold, each exactly once; `{bos}` is allowed once wherever none is listed.
_REQUIRED = {
    "prefix": (),
    "conversation_start": (),
    "passage": ("title", "text"),
    "passage_untitled": ("text",),
    "query": ("question",),
    "follow_up_query": ("question",),
}
_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True)
class Turn:
    """The markup before and after what one role says."""

    before: str = ""
    after: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTemplate:
    r"""The form of one model's prompts.

    Args:
        name: What it is called.
        version: Counts up whenever one of the strings changes.
        prefix: Block 0 of a RAG prompt, begin-of-sequence text included; `{bos}` stands for the tokenizer's own.
        query: The last block of a RAG prompt, with `{question}`.
        passage: One passage, with `{title}` and `{text}`; both are stripped of white space at their ends.
        passage_untitled: One passage without a title, with `{text}`. No published checkpoint saw such passages; the
            default keeps the list mark and leaves out the empty title.
        conversation_start: What precedes the first turn of a conversation; `{bos}` as in `prefix`.
        system: Markup of a system turn. None: the model has none, and the system text opens the first user turn.
        user: Markup of a user turn.
        assistant: Markup of an assistant turn that is over.
        generation: What asks the model to speak.
        default_system: System text of a conversation that brings none; empty for no system turn.
        strip_turns: Whether the model's chat template strips white space at the ends of every message.
        follow_up_open: What ends an answer and opens the next user turn of a RAG conversation.
        follow_up_query: The last block of that turn, with `{question}`; empty if the template has no such form.
        stop: Strings that end an answer.
        block_attention_prefix: Text that tells the model that blocks follow ("[Block-Attention]" for checkpoints
            trained with it). Opens block 0 and only that, behind a begin-of-sequence token; tokenized on its own.

    Raises:
        PromptError: A field has the wrong type, or a placeholder is missing or given twice.
    """

    name: str
    version: int
    prefix: str
    query: str
    passage: str = "- Title: {title}\n{text}\n"
    passage_untitled: str = "- {text}\n"
    conversation_start: str = ""
    system: Turn | None = None
    user: Turn = Turn()
    assistant: Turn = Turn()
    generation: str = ""
    default_system: str = ""
    strip_turns: bool = False
    follow_up_open: str = ""
    follow_up_query: str = ""
    stop: tuple[str, ...] = ()
    block_attention_prefix: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_field(field.name, getattr(self, field.name))
        if not self.name or self.version < 1:
            raise PromptError(f"a template needs a name and a version from 1 on, got {self.name!r}, {self.version}")
        for field_name, required in _REQUIRED.items():
            if field_name != "follow_up_query" or self.follow_up_query:
                _check_placeholders(field_name, getattr(self, field_name), required)

    # -- RAG prompts ---------------------------------------------------------------------------------------------

    def segment(
        self, tokenizer: PreTrainedTokenizerBase, *, passages: Sequence[Passage], question: str
    ) -> SegmentedPrompt:
        """The blocks of a RAG prompt: prefix, one block per passage, query.

        Args:
            tokenizer: The model's tokenizer.
            passages: In prompt order; may be empty, and may repeat.
            question: White space at its ends is dropped.

        Raises:
            PromptError: The question is empty, or holds a lone surrogate.
        """
        query = Draft(groups=(self._query_spans(self.query, question),), local=False, kind="query")
        drafts = [self._prefix_draft(tokenizer), *map(self._passage_draft, passages), query]
        return self._encode(tokenizer, drafts)

    def prefix_block(self, tokenizer: PreTrainedTokenizerBase) -> Block | None:
        """Block 0 of every RAG prompt, or None if the template has no text for it."""
        (block,) = encode_drafts(tokenizer, [self._prefix_draft(tokenizer)])
        return block if block.token_ids else None

    def passage_block(self, tokenizer: PreTrainedTokenizerBase, passage: Passage) -> Block:
        """The block of one passage, the same in every prompt."""
        return self.passage_blocks(tokenizer, [passage])[0]

    def passage_blocks(self, tokenizer: PreTrainedTokenizerBase, passages: Iterable[Passage]) -> list[Block]:
        """The blocks of passages, one each and in order, tokenized in one batch."""
        return encode_drafts(tokenizer, [self._passage_draft(passage) for passage in passages])

    def follow_up(
        self, tokenizer: PreTrainedTokenizerBase, *, passages: Sequence[Passage], question: str
    ) -> tuple[Block, ...]:
        """The blocks that the next question appends to a conversation whose last answer is in the cache.

        The cache must end with the answer, without the token or string that stopped it: that is the first thing the
        new blocks say. Without new passages there is one global block; with them, a short local block that ends the
        answer and opens the turn, the passages (local), and the question (global).

        Raises:
            PromptError: The question is empty, or the template has no form for a follow-up.
        """
        if not self.follow_up_query:
            raise PromptError(f"template {self.name!r} cannot continue a conversation; give it a follow_up_query")
        opening = (markup(self.follow_up_open),)
        query = self._query_spans(self.follow_up_query, question)
        if not passages:
            return tuple(encode_drafts(tokenizer, [Draft(groups=(opening + query,), local=False, kind="query")]))
        drafts = [
            Draft(groups=(opening,), local=True, kind="turn"),
            *map(self._passage_draft, passages),
            Draft(groups=(query,), local=False, kind="query"),
        ]
        return tuple(block for block in encode_drafts(tokenizer, drafts) if block.token_ids)

    @property
    def answer_opening(self) -> str:
        """What stands between the text that asks for an answer and the answer ("Answer:" and " Thimphu")."""
        before = self.assistant.before
        return before.removeprefix(self.generation) if before.startswith(self.generation) else ""

    def answer_block(self, tokenizer: PreTrainedTokenizerBase, answer: str) -> Block:
        """An answer as the model is trained to write it behind a query block, what ends it included.

        The end is the first of the template's stop strings that is one token of the tokenizer, or the tokenizer's
        end-of-sequence token: what inference stops at.

        Raises:
            PromptError: The answer is empty, or neither the template nor the tokenizer has a token that ends it.
        """
        text = check_text("the answer", answer)
        if not text.strip():
            raise PromptError(f"the answer is empty ({text[:20]!r}); pass the text that the model is to write")
        known = tokenizer.get_added_vocab()
        end = next((stop for stop in self.stop if stop in known), str(tokenizer.eos_token or ""))
        if not end:
            raise PromptError(
                f"nothing ends an answer: the tokenizer has no end-of-sequence token, and none of the stops "
                f"{list(self.stop)} of template {self.name!r} is a token of it; set tokenizer.eos_token"
            )
        said = content(text.strip() if self.strip_turns else text)
        groups = ((markup(self.answer_opening), said), (markup(end),))
        return encode_drafts(tokenizer, [Draft(groups=groups, local=False, kind="answer")])[0]

    # -- Other prompts -------------------------------------------------------------------------------------------

    def segment_blocks(
        self, tokenizer: PreTrainedTokenizerBase, blocks: Sequence[str], *, allow_special: bool = False
    ) -> SegmentedPrompt:
        """Blocks given as strings, the last one global. Nothing is added but the block-attention prefix.

        Args:
            tokenizer: The model's tokenizer.
            blocks: At least one string; empty ones are dropped, the last must not be empty.
            allow_special: Whether control tokens spelled in the strings are recognized. Set it only for strings whose
                markup you wrote and whose content you trust: with it, content can forge turns.

        Raises:
            PromptError: There are no blocks, one is no string, or the last one is empty.
        """
        if isinstance(blocks, str):
            raise PromptError(f"blocks must be a list of strings, got the string {blocks!r:.60}; use segment_text")
        texts = [check_text(f"block {number}", text) for number, text in enumerate(blocks)]
        if not texts or not texts[-1]:
            raise PromptError(f"got {len(texts)} blocks, the last one empty or missing; end them with the question")
        span = markup if allow_special else content
        drafts = [Draft(groups=((span(text),),), local=True, kind="passage") for text in texts]
        drafts[-1] = replace(drafts[-1], local=False, kind="query")
        drafts[0] = self._open(tokenizer, drafts[0])
        return self._encode(tokenizer, drafts)

    def segment_messages(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Mapping[str, str]],
        *,
        max_blocks: int | None = None,
        split: bool = False,
    ) -> SegmentedPrompt:
        """A conversation: one local block per turn; the last turn and the generation opener are the query block.

        Args:
            tokenizer: The model's tokenizer.
            messages: Each with exactly `role` (system, user, assistant) and `content`. Only the first may be a system
                message, and the last must be a user message.
            max_blocks: Merge the shortest local block with its left neighbor until at most this many blocks are left,
                the query block included. None: no limit.
            split: Also cut each message at its delimiters (`split_by_delimiter`).

        Raises:
            PromptError: A message is malformed, the last one is empty, or `max_blocks` is below 1.
        """
        turns = self._validated(messages)
        drafts = _merged(self._turn_drafts(tokenizer, turns, split=split), max_blocks)
        drafts[0] = self._open(tokenizer, drafts[0])
        return self._encode(tokenizer, drafts)

    def segment_text(
        self, tokenizer: PreTrainedTokenizerBase, text: str, *, max_blocks: int | None = None
    ) -> SegmentedPrompt:
        """Free text as one user turn, cut at its delimiters; the last piece is the query block.

        Raises:
            PromptError: The text is empty, or `max_blocks` is below 1.
        """
        message = {"role": "user", "content": check_text("text", text)}
        return self.segment_messages(tokenizer, [message], max_blocks=max_blocks, split=True)

    def segment_demonstrations(
        self,
        tokenizer: PreTrainedTokenizerBase,
        demonstrations: Sequence[str],
        *,
        question: str,
        instruction: str = "",
        separator: str = "\n\n",
    ) -> SegmentedPrompt:
        """In-context learning in one user turn: each demonstration is one local block, the question the query block.

        Args:
            tokenizer: The model's tokenizer.
            demonstrations: Solved examples, in prompt order.
            question: The example to solve; kept as it is.
            instruction: What precedes the demonstrations; part of block 0.
            separator: What follows the instruction and each demonstration.

        Raises:
            PromptError: The question is empty, or a text holds a lone surrogate.
        """
        opening = [markup(self._resolve(tokenizer, self.conversation_start) + self.user.before)]
        if instruction:
            opening.append(content(check_text("instruction", instruction) + separator))
        _require_question(question)
        closing = markup(self.user.after + self.generation)
        drafts = [self._open(tokenizer, Draft(groups=(tuple(opening),), local=True, kind="prefix"))]
        for number, text in enumerate(demonstrations):
            example = content(check_text(f"demonstration {number}", text) + separator)
            drafts.append(Draft(groups=((example,),), local=True, kind="passage"))
        drafts.append(Draft(groups=((content(question), closing),), local=False, kind="query"))
        return self._encode(tokenizer, drafts)

    # -- As data -------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """The template as JSON types, for `from_dict`."""
        return {**asdict(self), "stop": list(self.stop)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PromptTemplate:
        """The template `to_dict` wrote.

        Raises:
            PromptError: A key is unknown or missing, or a value has the wrong type.
        """
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(data) - known)
        missing = sorted({"name", "version", "prefix", "query"} - set(data))
        if unknown or missing:
            raise PromptError(
                f"a template cannot have the keys {unknown} and lacks {missing}; known keys are {sorted(known)}"
            )
        values = dict(data)
        for role in _ROLES:
            if isinstance(values.get(role), Mapping):
                values[role] = _turn_from(role, values[role])
        if isinstance(values.get("stop"), list):
            values["stop"] = tuple(values["stop"])
        return cls(**values)

    def digest(self) -> str:
        """SHA-256 (hex) of what shapes the prefix and passage blocks; queries, turns and stops do not enter."""
        names = ("name", "version", "prefix", "passage", "passage_untitled", "block_attention_prefix")
        shaping = {name: getattr(self, name) for name in names}
        return hashlib.sha256(json.dumps(shaping, sort_keys=True).encode()).hexdigest()

    # -- Drafts --------------------------------------------------------------------------------------------------

    def _encode(self, tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft]) -> SegmentedPrompt:
        return SegmentedPrompt(blocks=tuple(encode_drafts(tokenizer, drafts)), stop=self.stop)

    def _prefix_draft(self, tokenizer: PreTrainedTokenizerBase) -> Draft:
        prefix = markup(self._resolve(tokenizer, self.prefix))
        return self._open(tokenizer, Draft(groups=((prefix,),), local=True, kind="prefix"))

    def _passage_draft(self, passage: Passage) -> Draft:
        values = {"title": passage.title.strip(), "text": passage.text.strip()}
        form = self.passage if values["title"] else self.passage_untitled
        return Draft(groups=(_fill(form, values),), local=True, kind="passage", source=passage.id)

    def _query_spans(self, form: str, question: str) -> tuple[Span, ...]:
        return _fill(form, {"question": _require_question(question).strip()})

    def _turn_drafts(
        self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], *, split: bool
    ) -> list[Draft]:
        pieces: list[list[Span]] = []
        kinds: dict[str, BlockKind] = {"system": "prefix"}
        of_kind: list[BlockKind] = []
        for number, (role, text) in enumerate(turns):
            turn = self._turn(role, after_system=number > 0 and turns[number - 1][0] == "system")
            parts = [[content(part)] for part in (split_by_delimiter(text) if split else [text])]
            parts[0].insert(0, markup(turn.before))
            parts[-1].append(markup(turn.after))
            pieces += parts
            of_kind += [kinds.get(role, "turn")] * len(parts)
        pieces[0].insert(0, markup(self._resolve(tokenizer, self.conversation_start)))
        pieces[-1].append(markup(self.generation))
        of_kind[-1] = "query"
        return [
            Draft(groups=(tuple(spans),), local=kind != "query", kind=kind)
            for spans, kind in zip(pieces, of_kind, strict=True)
        ]

    def _turn(self, role: str, *, after_system: bool) -> Turn:
        if role == "assistant":
            return self.assistant
        if role == "system":
            return self.system if self.system is not None else Turn(self.user.before, "\n\n")
        # Where the model has no system role, the system text has already opened the user turn.
        return Turn("", self.user.after) if after_system and self.system is None else self.user

    def _validated(self, messages: Sequence[Mapping[str, str]]) -> list[tuple[str, str]]:
        turns = [_validated_message(number, message) for number, message in enumerate(messages)]
        if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
            raise PromptError(
                f"a conversation must end with a user message that is not empty; got {len(turns)} messages"
                + (f", the last one {turns[-1]!r:.80}" if turns else "")
            )
        roles = [role for role, _ in turns]
        if "system" in roles[1:] or (self.system is None and roles[:2] == ["system", "assistant"]):
            raise PromptError(
                f"template {self.name!r} cannot show the roles {roles}; begin with at most one system message, "
                "followed by a user message"
            )
        if roles[0] != "system" and self.default_system:
            turns.insert(0, ("system", self.default_system))
        return [(role, text.strip()) for role, text in turns] if self.strip_turns else turns

    def _open(self, tokenizer: PreTrainedTokenizerBase, draft: Draft) -> Draft:
        """Put the block-attention prefix into block 0, as a group of its own, behind a begin-of-sequence token."""
        if not self.block_attention_prefix:
            return draft
        (first, *spans), *groups = draft.groups
        bos = str(tokenizer.bos_token or "")
        start = (markup(bos),) if bos and first.is_markup and first.text.startswith(bos) else ()
        rest = first.text.removeprefix(bos if start else "").removeprefix(self.block_attention_prefix)
        opened = (start, (markup(self.block_attention_prefix),), (Span(rest, first.is_markup), *spans), *groups)
        return replace(draft, groups=tuple(group for group in opened if group), marker=1 if start else 0)

    @staticmethod
    def _resolve(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        return text.replace("{bos}", str(tokenizer.bos_token or ""))


def _fill(form: str, values: Mapping[str, str]) -> tuple[Span, ...]:
    """Put values into a form in one pass; what they hold is never looked at again."""
    parts = _PLACEHOLDER.split(form)
    return tuple(content(values[part]) if number % 2 else markup(part) for number, part in enumerate(parts) if part)


def _merged(drafts: list[Draft], max_blocks: int | None) -> list[Draft]:
    """Merge local drafts so that at most `max_blocks` drafts are left; the query draft joins if only one may be."""
    if max_blocks is None:
        return drafts
    count = len(drafts) - (max_blocks > 1)
    ranges = merge_groups([len(draft.text) for draft in drafts[:count]], max_blocks - (max_blocks > 1))
    merged = [
        replace(drafts[end - 1], groups=(tuple(span for draft in drafts[start:end] for span in draft.groups[0]),))
        for start, end in ranges
    ]
    return [*merged, *drafts[count:]]


def _require_question(question: object) -> str:
    text = check_text("the question", question)
    if not text.strip():
        raise PromptError(f"the question is empty ({text[:20]!r}); pass the text to answer")
    return text


def _validated_message(number: int, message: object) -> tuple[str, str]:
    if not isinstance(message, Mapping) or set(message) != {"role", "content"}:
        keys = sorted(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        raise PromptError(f"message {number} must hold exactly role and content, got {keys}")
    role = message["role"]
    if role not in _ROLES:
        raise PromptError(f"message {number} has the role {role!r}; roles are {', '.join(_ROLES)}")
    return role, check_text(f"message {number}", message["content"])


def _check_field(name: str, value: object) -> None:
    if name == "version":
        valid = isinstance(value, int) and not isinstance(value, bool)
    elif name == "strip_turns":
        valid = isinstance(value, bool)
    elif name in _ROLES:
        valid = isinstance(value, Turn) or (name == "system" and value is None)
    elif name == "stop":
        valid = isinstance(value, tuple) and all(isinstance(text, str) and text for text in value)
    else:
        check_text(f"template field {name}", value)
        return
    if not valid:
        raise PromptError(f"template field {name} cannot be {value!r}; see PromptTemplate for its type")


def _check_placeholders(name: str, form: str, required: tuple[str, ...]) -> None:
    found = sorted(_PLACEHOLDER.findall(form))
    if found != sorted(required) and (required or found != ["bos"]):
        needed = ", ".join(f"{{{placeholder}}}" for placeholder in required) or "at most {bos}"
        raise PromptError(f"template field {name} must hold {needed}, each exactly once; got {form!r:.120}")


def _turn_from(role: str, data: Mapping[str, Any]) -> Turn:
    if set(data) != {"before", "after"} or not all(isinstance(text, str) for text in data.values()):
        raise PromptError(f"template field {role} must hold the strings before and after, got {dict(data)!r}")
    return Turn(before=check_text(f"{role}.before", data["before"]), after=check_text(f"{role}.after", data["after"]))
