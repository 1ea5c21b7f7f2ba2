"""Haystack's documents as passages, and the blocks they become in a prompt.

A document has one block per form of prompt, whoever asks: the generator that shows it, the writer that computes it
beforehand, or the document store that drops it with its last document.

    "rag"    the template's form of a passage, with the title from the document's meta; documents that reach the
             generator through its `documents` input are shown this way
    "chat"   the content as it is; documents that a prompt builder wrote into a message look this way
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from blockrag.passage import Passage
from blockrag.prompt.message import Excerpt

if TYPE_CHECKING:
    from haystack import Document

    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block

__all__ = ["DocumentForm", "checked_form", "document_blocks", "document_excerpt", "document_passage"]

DocumentForm = Literal["rag", "chat"]


def document_passage(document: Document) -> Passage:
    """A document as a passage: its id, `meta["title"]` where there is one, and its content.

    Raises:
        ValueError: The document has no content, or its id, title or content cannot be stored as UTF-8.
    """
    if document.content is None:
        kind = document.blob.mime_type or "binary data" if document.blob is not None else "nothing"
        raise ValueError(
            f"document {document.id!r} has no text content (it holds {kind}); convert it to text, or leave it out"
        )
    title = document.meta.get("title")
    return Passage(id=document.id, title="" if title is None else str(title), text=document.content)


def document_excerpt(document: Document) -> Excerpt:
    """A document shown as it is.

    Raises:
        ValueError: See `document_passage`.
    """
    passage = document_passage(document)
    return Excerpt(passage.text, passage)


def document_blocks(model: BlockModel, passages: Sequence[Passage], form: DocumentForm) -> list[Block]:
    """The blocks of passages, one each and in order.

    Args:
        model: The language model.
        passages: From `document_passage`.
        form: How prompts show them.

    Raises:
        ValueError: A text holds a character that can only be a control token.
    """
    from blockrag.prompt.chat import excerpt_blocks

    if form == "rag":
        return model.template.passage_blocks(model.tokenizer, passages)
    return excerpt_blocks(model.tokenizer, [passage.text for passage in passages])


def checked_form(form: DocumentForm) -> DocumentForm:
    """The form itself.

    Raises:
        ValueError: There is no such form.
    """
    if form not in ("rag", "chat"):
        raise ValueError(f'prompt_form={form!r} is neither "rag" nor "chat"')
    return form
