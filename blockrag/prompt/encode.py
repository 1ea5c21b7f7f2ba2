"""Text to token ids, with one promise: content never becomes a control token.

Content is what a passage, a title, a question or a message says; the markup of the template around it is recognized.

A `Draft` is a block before tokenization: groups of `Span`s, each marked as markup or content. A group is tokenized as
one string, exactly as a block string was tokenized in training, and the result is accepted only if (a) no content span
holds the spelling of a control token and (b) the control ids that came out are exactly those the markup spells. All
other groups are hostile or exotic: they are cut at the control tokens of their *markup*, the text between them is
tokenized with `split_special_tokens=True`, and where a control id still appears (added tokens that are not special, a
normalizer that changes spelling) the text is cut inside the offending spelling until none does.

Control tokens are a tokenizer's special and other added tokens, except for white space (runs of spaces or newlines),
single characters, and those words among them that are not special (they begin and end with a letter or a digit): these
carry no structure, and training saw them as text. The tokens of a tokenizer must not change once it is in use.
"""

from __future__ import annotations

import re
import threading
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from blockrag.errors import PromptError
from blockrag.prompt.segment import Block, BlockKind

if TYPE_CHECKING:
    from transformers import AddedToken, PreTrainedTokenizerBase

__all__ = ["SPLIT_POLICY", "Draft", "Span", "check_text", "content", "encode_drafts", "markup"]

SPLIT_POLICY = "inert"
"""How control tokens spelled in a text are treated: as plain text. Part of every fingerprint; another way of cutting
texts into blocks needs another name."""

# Fast tokenizers keep `split_special_tokens` as state of the shared backend, so two threads with different values
# would race; the check of the ids below would catch it, but then the ids would depend on timing.
_LOCK = threading.Lock()
# Control tokens by tokenizer, with the tokenizer's size when they were listed.
_KNOWN: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, _ControlTokens]] = WeakKeyDictionary()


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a block's text; only where `is_markup` may control tokens be recognized."""

    text: str
    is_markup: bool


def markup(text: str) -> Span:
    """Text of the template, in which control tokens are recognized."""
    return Span(text, True)


def content(text: str) -> Span:
    """Text from outside, in which they are not."""
    return Span(text, False)


@dataclass(frozen=True, slots=True)
class Draft:
    """A block before tokenization. The groups are tokenized separately and their ids joined.

    Args:
        groups: What is tokenized as one string each.
        local: See `Block`.
        kind: See `Block`.
        source: See `Block`.
        marker: Which group says that blocks follow, if one does.
    """

    groups: tuple[tuple[Span, ...], ...]
    local: bool
    kind: BlockKind
    source: str = ""
    marker: int | None = None

    @property
    def text(self) -> str:
        """The block's text, markup included."""
        return "".join(span.text for group in self.groups for span in group)


@dataclass(frozen=True, slots=True)
class _ControlToken:
    id: int
    text: str
    strips_left: bool
    strips_right: bool


@dataclass(frozen=True, slots=True)
class _ControlTokens:
    """A tokenizer's control tokens, ready to be searched for."""

    by_text: dict[str, _ControlToken]
    ids: frozenset[int]
    pattern: re.Pattern[str]


def check_text(what: str, text: object) -> str:
    """Return `text` if it is a string that can be encoded.

    Raises:
        PromptError: It is no string, or holds a lone surrogate; the message names the position.
    """
    if not isinstance(text, str):
        raise PromptError(f"{what} must be a string, got {type(text).__name__} {text!r:.60}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{what} holds a lone surrogate at character {error.start} ({text[error.start]!r}); "
            "decode its source with errors='replace'"
        ) from None
    return text


def encode_drafts(tokenizer: PreTrainedTokenizerBase, drafts: Sequence[Draft]) -> list[Block]:
    """Tokenize drafts in one batch; each group of each draft on its own, without special tokens added.

    Args:
        tokenizer: Any transformers tokenizer, fast or slow.
        drafts: The blocks to be.

    Returns:
        One block per draft, in order. A draft without text gives a block without tokens.

    Raises:
        PromptError: A text holds a character that this tokenizer can only encode as a control token.
    """
    control = _control_tokens(tokenizer)
    groups = [group for draft in drafts for group in draft.groups]
    encoded = iter(_encode_groups(tokenizer, groups, control))
    return [_block(draft, [next(encoded) for _ in draft.groups]) for draft in drafts]


def _block(draft: Draft, ids: Sequence[Sequence[int]]) -> Block:
    """The block of a draft whose groups have these token ids."""
    marker = (0, 0, 0, 0)
    if (number := draft.marker) is not None:
        texts = ["".join(span.text for span in group) for group in draft.groups]
        tokens, characters = sum(map(len, ids[:number])), sum(map(len, texts[:number]))
        marker = (tokens, tokens + len(ids[number]), characters, characters + len(texts[number]))
    return Block(
        token_ids=tuple(token for group in ids for token in group),
        text=draft.text,
        local=draft.local,
        kind=draft.kind,
        source=draft.source,
        marker=marker,
    )


def _encode_groups(
    tokenizer: PreTrainedTokenizerBase, groups: Sequence[tuple[Span, ...]], control: _ControlTokens
) -> list[list[int]]:
    texts = ["".join(span.text for span in group) for group in groups]
    whole = _tokenize(tokenizer, texts, split=False)
    return [
        ids if _is_faithful(group, ids, tokenizer, control) else _encode_cut(tokenizer, group, control)
        for group, ids in zip(groups, whole, strict=True)
    ]


def _is_faithful(
    group: Iterable[Span], ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, control: _ControlTokens
) -> bool:
    """Whether the control ids among `ids` are exactly those that the markup spells, in its order."""
    expected: list[int] = []
    for span in group:
        found = control.pattern.finditer(span.text)
        if span.is_markup:
            expected.extend(control.by_text[match[0]].id for match in found)
        elif next(found, None) is not None:
            return False
    # An unknown character also gives the unknown id; the spelling of that token was ruled out above.
    unknown = tokenizer.unk_token_id
    expected = [token for token in expected if token != unknown]
    return [token for token in ids if token in control.ids and token != unknown] == expected


def _encode_cut(tokenizer: PreTrainedTokenizerBase, group: Iterable[Span], control: _ControlTokens) -> list[int]:
    """Tokenize one group piece by piece: the markup's control tokens by id, the text between them as plain text."""
    pieces: list[str | _ControlToken] = [""]
    for span in group:
        end = 0
        for match in control.pattern.finditer(span.text) if span.is_markup else ():
            pieces[-1] = f"{pieces[-1]}{span.text[end : match.start()]}"
            pieces += [control.by_text[match[0]], ""]
            end = match.end()
        pieces[-1] = f"{pieces[-1]}{span.text[end:]}"
    ids: list[int] = []
    for number, piece in enumerate(pieces):
        if isinstance(piece, _ControlToken):
            ids.append(piece.id)
            continue
        left, right = pieces[number - 1 : number], pieces[number + 1 : number + 2]
        if left and isinstance(left[0], _ControlToken) and left[0].strips_right:
            piece = piece.lstrip()
        if right and isinstance(right[0], _ControlToken) and right[0].strips_left:
            piece = piece.rstrip()
        ids.extend(_encode_plain(tokenizer, [piece], control))
    return ids


def _encode_plain(tokenizer: PreTrainedTokenizerBase, texts: list[str], control: _ControlTokens) -> list[int]:
    """Tokenize texts in which nothing is a control token, cutting inside the spellings that would give one."""
    ids: list[int] = []
    for text, text_ids in zip(texts, _tokenize(tokenizer, texts, split=True), strict=True):
        if _is_plain(text, text_ids, tokenizer, control):
            ids.extend(text_ids)
        else:
            ids.extend(_encode_plain(tokenizer, _cut_inside(text, control), control))
    return ids


def _is_plain(text: str, ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, control: _ControlTokens) -> bool:
    found = control.ids.intersection(ids)
    if found == {tokenizer.unk_token_id}:
        return str(tokenizer.unk_token) not in text
    return not found


def _cut_inside(text: str, control: _ControlTokens) -> list[str]:
    """Cut after the first character of each spelling; where a normalizer hides it, in the middle.

    Raises:
        PromptError: `text` is a single character.
    """
    cuts = [match.start() + 1 for match in control.pattern.finditer(text)] or [len(text) // 2]
    cuts = [cut for cut in cuts if 0 < cut < len(text)]
    if not cuts:
        raise PromptError(
            f"the character {text!r} becomes a control token of this tokenizer and cannot be shown as text; "
            "remove it from the text"
        )
    return [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def _tokenize(tokenizer: PreTrainedTokenizerBase, texts: list[str], *, split: bool) -> list[list[int]]:
    if not texts:
        return []
    with _LOCK:
        # verbose=False: length is checked where the model's limit is known, not by a warning of the tokenizer.
        encoding = tokenizer(texts, add_special_tokens=False, split_special_tokens=split, verbose=False)
    return [list(ids) for ids in encoding["input_ids"]]


def _control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    """The control tokens; kept per tokenizer, for some have thousands and listing them takes as long as a prompt."""
    size = len(tokenizer)
    known_size, control = _KNOWN.get(tokenizer, (-1, None))
    if control is None or known_size != size:
        control = _list_control_tokens(tokenizer)
        _KNOWN[tokenizer] = (size, control)
    return control


def _list_control_tokens(tokenizer: PreTrainedTokenizerBase) -> _ControlTokens:
    added = tokenizer.added_tokens_decoder.items()
    tokens = [_ControlToken(i, token.content, token.lstrip, token.rstrip) for i, token in added if _is_control(token)]
    # Longest first: the backends match the longest spelling at the leftmost place.
    spellings = sorted((re.escape(token.text) for token in tokens), key=len, reverse=True)
    expression = "|".join(spellings) or "(?!)"
    return _ControlTokens(
        by_text={token.text: token for token in tokens},
        ids=frozenset(token.id for token in tokens),
        pattern=re.compile(expression),
    )


def _is_control(token: AddedToken) -> bool:
    """Whether an added token may carry structure: it is special, or begins or ends with a mark like `<think>`."""
    text = token.content.strip()
    if len(text) < 2:
        return False
    return token.special or not (_is_word_character(text[0]) and _is_word_character(text[-1]))


def _is_word_character(character: str) -> bool:
    return unicodedata.category(character)[0] in "LMN"
