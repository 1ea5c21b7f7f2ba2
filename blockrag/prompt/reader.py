r"""The one reader of prompts that exist only as a single string: the `prompt` field of published training data.

Everywhere else structure is passed as data. Such a string has lost its structure, and this reader can only guess: a
passage that holds `\n- Title: ` is taken for two, one whose title holds a newline loses the rest of its title to its
text. Use it to import old files, never for prompts that hold text from outside.
"""

from __future__ import annotations

from blockrag.errors import PromptError
from blockrag.passage import Passage
from blockrag.prompt.encode import check_text
from blockrag.prompt.template import PromptTemplate

__all__ = ["parse_rag_prompt"]


def parse_rag_prompt(prompt: str, template: PromptTemplate) -> tuple[tuple[Passage, ...], str]:
    r"""Recover passages and question from a RAG prompt written with `template`.

    Args:
        prompt: The whole prompt, without an answer.
        template: The template it was written with; its `{bos}`, if any, must not occur in the string.

    Returns:
        The passages, with their place in the prompt ("0", "1", ...) as id, and the question. If neither has white
        space at its ends, `template.segment` gives blocks whose joined text is `prompt`.

    Raises:
        PromptError: The prompt does not begin with the prefix, end with the query, or hold passages in between.
    """
    rest = check_text("the prompt", prompt).removeprefix(template.block_attention_prefix)
    prefix = template.prefix.replace("{bos}", "")
    if not rest.startswith(prefix):
        raise PromptError(f"the prompt begins with {rest[:60]!r}, but template {template.name!r} with {prefix[:60]!r}")
    head, tail = template.query.split("{question}")
    body = rest[len(prefix) :].removesuffix(tail)
    start = body.rfind(head)
    if start < 0 or len(prefix) + len(body) + len(tail) != len(rest):
        raise PromptError(
            f"the prompt ends with {rest[-60:]!r}, but template {template.name!r} with {template.query!r}"
        )
    return _passages(body[:start], template), body[start + len(head) :]


def _passages(documents: str, template: PromptTemplate) -> tuple[Passage, ...]:
    before_title, between = template.passage.split("{title}")
    before_text, after_text = between.split("{text}")
    if not documents:
        return ()
    if not before_title or not documents.startswith(before_title):
        raise PromptError(
            f"the passages begin with {documents[:60]!r}, but template {template.name!r} titles them "
            f"with {before_title!r}"
        )
    pieces = documents[len(before_title) :].split(after_text + before_title)
    pieces[-1] = pieces[-1].removesuffix(after_text)
    passages = []
    for number, piece in enumerate(pieces):
        title, found, text = piece.partition(before_text)
        if not found:
            raise PromptError(f"passage {number} has a title but no text: {piece[:60]!r}")
        passages.append(Passage(id=str(number), title=title, text=text))
    return tuple(passages)
