"""Finding passages again in a text they were pasted into, when whoever pasted them is known.

Some frameworks hand a language model one flat string although the passages in it were known a moment before. Where
they still are (a framework's own events name them), this puts the structure back. It never guesses: a passage counts
only where its whole text stands, between white space, and outside of what the question itself says.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from blockrag.prompt.message import Excerpt, Part

__all__ = ["cut_excerpts"]


def cut_excerpts(text: str, excerpts: Sequence[Excerpt], *, question: str = "") -> tuple[Part, ...]:
    """Cut a text at the passages it contains.

    Args:
        text: The text passages were pasted into.
        excerpts: The passages that may be in it; each is looked for without the white space at its ends.
        question: A passage whose whole text the question says as well is left alone: the two cannot be told apart.

    Returns:
        The parts, whose texts joined are `text`; the longest passage wins where several begin, and every place counts.
    """
    known: dict[str, Excerpt] = {}
    for excerpt in excerpts:
        body = excerpt.text.strip()
        if body and body not in question:
            known.setdefault(body, Excerpt(body, excerpt.passage))
    if not known:
        return (text,) if text else ()
    longest_first = sorted(known, key=len, reverse=True)
    pattern = re.compile(rf"(?<!\S)(?:{'|'.join(map(re.escape, longest_first))})(?!\S)")
    parts: list[Part] = []
    end = 0
    for match in pattern.finditer(text):
        parts += [text[end : match.start()], known[match[0]]]
        end = match.end()
    parts.append(text[end:])
    return tuple(part for part in parts if part != "")
