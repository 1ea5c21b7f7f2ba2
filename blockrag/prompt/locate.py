"""Finding passages again in a text they were pasted into, when whoever pasted them is known.

Some frameworks hand a language model one flat string although the passages in it were known a moment before. Where
they still are (a framework's own events name them), this puts the structure back. It never guesses: a passage counts
only where its whole text stands, between white space, outside of what the question itself says and, where it is known
what was pasted, inside of that: a passage that says no more than "Answer:" is also a word of most templates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from blockrag.prompt.message import Excerpt, Part

__all__ = ["cut_excerpts"]


def cut_excerpts(
    text: str, excerpts: Sequence[Excerpt], *, question: str = "", pasted: Sequence[str] = ()
) -> tuple[Part, ...]:
    """Cut a text at the passages it contains.

    Args:
        text: The text passages were pasted into.
        excerpts: The passages that may be in it; each is looked for without the white space at its ends.
        question: A passage whose whole text the question says as well is left alone: the two cannot be told apart.
        pasted: Strings, each with one or more passages in it, that were pasted into the text; only where one of them
            stands, without the white space at its ends, are passages looked for. Empty: everywhere.

    Returns:
        The parts, whose texts joined are `text`; the longest passage wins where several begin, and every place counts.
    """
    known: dict[str, Excerpt] = {}
    for excerpt in excerpts:
        body = excerpt.text.strip()
        if body and body not in question:
            known.setdefault(body, Excerpt(body, excerpt.passage))
    places = _places(text, pasted) if pasted else [(0, len(text))]
    found = {
        (start, -len(body)): body
        for first, last in places
        for body in known
        for start in _occurrences(text, body, first, last)
        if _stands_alone(text, start, start + len(body))
    }
    parts: list[Part] = []
    end = 0
    for (start, _), body in sorted(found.items()):
        if start >= end:
            parts += [text[end:start], known[body]]
            end = start + len(body)
    parts.append(text[end:])
    return tuple(part for part in parts if part != "")


def _places(text: str, pasted: Sequence[str]) -> list[tuple[int, int]]:
    """Where in the text the strings stand, as ranges of characters."""
    return [
        (start, start + len(string))
        for string in {string.strip() for string in pasted} - {""}
        for start in _occurrences(text, string, 0, len(text))
    ]


def _occurrences(text: str, string: str, first: int, last: int) -> Iterator[int]:
    # Not by a regular expression: compiling one for a few long passages takes longer than most questions' prefill.
    while (first := text.find(string, first, last)) >= 0:
        yield first
        first += 1


def _stands_alone(text: str, start: int, stop: int) -> bool:
    return not (text[max(start - 1, 0) : start].strip() or text[stop : stop + 1].strip())
