"""Splitting: documents become passages that a model can prefill as one block each.

Length is counted in the language model's own tokens, by the very function that will tokenize the passage, because a
block costs what it has in tokens. Cuts are sought between paragraphs, then sentences, then words, then characters,
by llama-index's `SentenceSplitter`; passages never overlap, since text in two blocks is paid and retrieved twice.
That splitter adds up the lengths of parts, which is not the length of the whole for every tokenizer, so each passage
is counted again and cut further where needed.

A document that fits stays one passage under its own id, so the lines of a passage corpus keep the ids its question
sets refer to. Nothing here knows files, models or indexes.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from blockrag.errors import DocumentError, InputError
from blockrag.ingest.reading import Document
from blockrag.passage import Passage
from blockrag.prompt.encode import Draft, content, encode_drafts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["SPLITTER_VERSION", "split_document", "split_documents"]

# Part of what says whether an indexed document is up to date; count up when the same text would be cut elsewhere.
SPLITTER_VERSION = 1

# What byte-level tokenizers of today need for English text.
_BYTES_PER_TOKEN = 4
# Longer runs of text are cut before they are tokenized: 100 MB in one call take gigabytes.
_MAX_SECTION_CHARACTERS = 1 << 18
# A section is about 16 full passages, at four characters per token.
_SECTION_CHARACTERS_PER_TOKEN = 64


def split_document(
    document: Document, tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int = 256
) -> list[Passage]:
    """Cut one document into passages of at most `max_tokens` tokens; linear in its length.

    Joined in order, the passages hold every character of the text that is not white space, once. The same text gives
    the same passages, and a change in it moves cuts no further than to the next section, about 16 passages on.

    Args:
        document: One with `passages` gives these, as they are.
        tokenizer: The language model's; None where there is no model yet: four bytes then count as one token.
        max_tokens: Most tokens of a passage's text; its title and the template's markup come on top.

    Returns:
        Passages `document.id` (if it is one) or `document.id#0`, `document.id#1`, ... with the document's title and
        metadata; none for a text of white space.

    Raises:
        DocumentError: The title, or a single character, has more than `max_tokens` tokens.
        PromptError: A character can only be encoded as a control token of this tokenizer.
        InputError: `max_tokens` is less than one.
    """
    (passages,) = split_documents([document], tokenizer, max_tokens=max_tokens)
    if isinstance(passages, InputError):
        raise passages
    return passages


def split_documents(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase | None, *, max_tokens: int = 256
) -> list[list[Passage] | InputError]:
    """Cut several documents; those that fit in one passage, most of a passage corpus, are counted in one batch.

    Returns:
        Per document its passages, or the error `split_document` raises for it.

    Raises:
        InputError: `max_tokens` is less than one.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; a passage needs at least one token, the usual size is 256")
    whole = [
        document for document in documents if not document.passages and len(document.text) <= _MAX_SECTION_CHARACTERS
    ]
    try:
        counts = dict(
            zip(map(id, whole), _count(tokenizer, [document.text.strip() for document in whole]), strict=True)
        )
    except InputError:
        # One text cannot be encoded; counted alone below, it fails alone.
        counts = {}
    return [_split(document, tokenizer, max_tokens, counts.get(id(document))) for document in documents]


def _split(
    document: Document, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int, count: int | None
) -> list[Passage] | InputError:
    if document.passages:
        return list(document.passages)
    try:
        title_tokens = _count(tokenizer, [document.title])[0] if document.title else 0
        if title_tokens > max_tokens:
            raise DocumentError(
                f"document {document.id!r}: its title has {title_tokens} tokens, more than a passage's {max_tokens}; "
                f"shorten it ({document.title[:40]!r}...)"
            )
        text = document.text.strip()
        if not text:
            texts = []
        elif count is not None and count <= max_tokens:
            texts = [text]
        else:
            sections = _sections(text, max_tokens * _SECTION_CHARACTERS_PER_TOKEN)
            texts = [piece for section in sections for piece in _pieces(section, tokenizer, max_tokens)]
        return _passages(document, texts)
    except InputError as error:
        return error


def _passages(document: Document, texts: Sequence[str]) -> list[Passage]:
    return [
        Passage(
            id=document.id if len(texts) == 1 else f"{document.id}#{number}",
            text=text,
            title=document.title,
            document_id=document.id,
            metadata=document.metadata,
        )
        for number, text in enumerate(texts)
    ]


def _count(tokenizer: PreTrainedTokenizerBase | None, texts: Sequence[str]) -> list[int]:
    """Tokens of each text as passage content; spelled control tokens count as the plain text they will be."""
    if tokenizer is None:
        return [-(-len(text.encode()) // _BYTES_PER_TOKEN) for text in texts]
    drafts = [Draft(groups=((content(text),),), local=True, kind="passage") for text in texts]
    return [len(block) for block in encode_drafts(tokenizer, drafts)]


def _sections(text: str, size: int) -> Iterator[str]:
    """The text in sections of about `size` characters that begin where the text, not its place, says so.

    Within a section passages are filled one after the other, so a change moves all later cuts of its section; chosen
    by their content, the sections behind it stay as they were, and with them their blocks (content-defined chunking,
    as in rsync and backup programs).
    """
    separator = "\n\n" if "\n\n" in text else "\n"
    start = end = 0
    for unit in text.split(separator):
        if end - start >= size // 4 and zlib.crc32(unit.encode()) % size < len(unit):
            yield from _bounded(text[start:end])
            start = end
        end += len(unit) + len(separator)
    yield from _bounded(text[start:])


def _bounded(section: str) -> Iterator[str]:
    """The section in runs of bounded length, cut at the best separator in the second half of each."""
    start = 0
    while len(section) - start > _MAX_SECTION_CHARACTERS:
        end = start + _MAX_SECTION_CHARACTERS
        cuts = (section.rfind(mark, end - _MAX_SECTION_CHARACTERS // 2, end) for mark in ("\n\n", "\n", " "))
        cut = next((cut for cut in cuts if cut > 0), end)
        yield section[start:cut]
        start = cut
    yield section[start:]


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> Iterator[str]:
    """Stripped, non-empty pieces of at most `max_tokens` tokens.

    Raises:
        DocumentError: A single character has more tokens than that.
    """
    from llama_index.core.node_parser import SentenceSplitter

    @lru_cache(maxsize=1 << 16)
    def count(part: str) -> int:
        # Text without structure is counted character by character, and most of them repeat.
        return _count(tokenizer, [part])[0]

    splitter = SentenceSplitter(
        chunk_size=max_tokens,
        chunk_overlap=0,
        paragraph_separator="\n\n",
        # It only takes the length of what the tokenizer returns.
        tokenizer=lambda part: range(count(part)),
    )
    try:
        chunks = splitter.split_text(text)
    except (ValueError, RecursionError):
        # Some part could not be cut small enough; halving goes down to single characters.
        chunks = [text.strip()]
    for chunk, tokens in zip(chunks, _count(tokenizer, chunks), strict=True):
        if tokens <= max_tokens:
            yield chunk
        else:
            yield from _halves(chunk, tokenizer, max_tokens)


def _halves(text: str, tokenizer: PreTrainedTokenizerBase | None, max_tokens: int) -> Iterator[str]:
    """Halve a text, at the space nearest to its middle if there is one, until all parts fit."""
    stack = [text]
    while stack:
        part = stack.pop()
        count = _count(tokenizer, [part])[0]
        if count <= max_tokens:
            yield part
        elif len(part) == 1:
            raise DocumentError(
                f"the character {part!r} alone has {count} tokens, more than a passage's {max_tokens}; raise max_tokens"
            )
        else:
            middle = len(part) // 2
            spaces = (part.find(" ", middle), part.rfind(" ", 0, middle))
            cut = min((space for space in spaces if space > 0), key=lambda space: abs(space - middle), default=middle)
            stack += [part[cut:].strip(), part[:cut].strip()]
