"""Text to pieces of text: free text at its own delimiters, few-shot prompts at their demonstrations.

Every splitter is lossless: the pieces joined are the text. The delimiter rules are those the Block-Attention
checkpoints were trained with (arXiv 2409.15355, section 3.1). They see characters only: a `---` inside a Markdown table
is a delimiter, and a blank line inside a code fence too.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterator, Sequence
from itertools import pairwise

from blockrag.errors import PromptError

__all__ = [
    "merge_groups",
    "merge_pieces",
    "split_bbh_prompt",
    "split_by_delimiter",
    "split_drop_prompt",
    "split_turn_demonstrations",
]

# Found in linear time: a pattern such as `\s*\n\s*` is quadratic on long runs of white space.
_SPACE = re.compile(r"\s+")
_RULES = {"---": re.compile(r"-{3,}\s*"), "===": re.compile(r"={3,}\s*"), "\n\t": re.compile(r"\n\t")}
_PRIORITY = ("\n\n", "---", "===", "\n\t", "\n")


def split_by_delimiter(text: str) -> list[str]:
    r"""Cut free text at the first kind of delimiter that occurs in it; only that kind is used.

    The kinds, by priority: a blank line, `---`, `===`, a newline with a tab, a newline. White space around a delimiter
    belongs to it (except for the newline with a tab). Blank lines and newlines stay at the end of the piece before
    them, or at the front of the first piece if the text begins with one; the other kinds become pieces of their own.

    Returns:
        The pieces, none of them empty, whose join is `text`; `[text]` if no delimiter occurs (`[""]` included).
    """
    mark = next((mark for mark in _PRIORITY if mark in text), None)
    if mark is None:
        return [text]
    separators = _rules(text, mark) if mark in _RULES else _blank_runs(text, mark)
    cuts = {0, len(text)}
    for start, end in separators:
        # A leading separator stays glued to what follows it, a rule is a piece of its own.
        cuts.update((start, end) if mark in _RULES else (end,) if start else ())
    ordered = sorted(cuts)
    return [text[start:end] for start, end in pairwise(ordered)]


def _blank_runs(text: str, mark: str) -> Iterator[tuple[int, int]]:
    """Where the runs of white space are that hold `mark`."""
    return (match.span() for match in _SPACE.finditer(text) if mark in match[0])


def _rules(text: str, mark: str) -> Iterator[tuple[int, int]]:
    """Where the rules are, with the white space on both sides of `---` and `===`."""
    end = 0
    for match in _RULES[mark].finditer(text):
        before = text[end : match.start()]
        start = match.start() if mark.isspace() else end + len(before.rstrip())
        end = match.end()
        yield start, end


def merge_pieces(pieces: Sequence[str], max_blocks: int) -> list[str]:
    """Merge the shortest piece with its left neighbor (the first one with its right) until few enough are left.

    The published code never updates the lengths while it merges, so that it keeps merging at one place; here the
    lengths are those of the merged pieces.

    Args:
        pieces: The pieces in order.
        max_blocks: The most pieces to return, at least 1.

    Returns:
        At most `max_blocks` pieces with the same join.

    Raises:
        PromptError: `max_blocks` is below 1.
    """
    groups = merge_groups([len(piece) for piece in pieces], max_blocks)
    return ["".join(pieces[start:end]) for start, end in groups]


def merge_groups(lengths: Sequence[int], max_blocks: int) -> list[tuple[int, int]]:
    """The half-open ranges of neighbors that `merge_pieces` joins, for pieces of the given lengths.

    Raises:
        PromptError: `max_blocks` is below 1.
    """
    if max_blocks < 1:
        raise PromptError(f"max_blocks must be at least 1, got {max_blocks}; leave it out for no limit")
    count = len(lengths)
    sizes, starts, ends = list(lengths), list(range(count)), list(range(1, count + 1))
    # A merged range lives on under its first piece; `starts[e - 1]` and `ends[s]` lead to its neighbors.
    heap = [(size, number) for number, size in enumerate(sizes)]
    heapq.heapify(heap)
    alive = set(range(count))
    while len(alive) > max_blocks:
        size, shortest = heapq.heappop(heap)
        if shortest not in alive or size != sizes[shortest]:
            continue
        left = starts[shortest - 1] if shortest else 0
        right = shortest if shortest else ends[0]
        sizes[left] += sizes[right]
        ends[left] = ends[right]
        starts[ends[left] - 1] = left
        alive.discard(right)
        heapq.heappush(heap, (sizes[left], left))
    return [(start, ends[start]) for start in sorted(alive)]


def split_turn_demonstrations(prompt: str, *, turn_end: str = "<|end_of_text|>\n") -> list[str]:
    """Cut a few-shot prompt of chat turns (GSM8K, MATH) after each answer, so that each demonstration is one piece.

    Args:
        prompt: Demonstrations, each a user and an assistant turn, then the user turn with the question.
        turn_end: What ends an assistant turn.

    Returns:
        The demonstrations, then the question.
    """
    if not turn_end:
        raise PromptError("turn_end must not be empty; pass the text that ends an assistant turn")
    *demonstrations, query = prompt.split(turn_end)
    pieces = [demonstration + turn_end for demonstration in demonstrations]
    return [*pieces, query] if query or not pieces else pieces


def split_bbh_prompt(prompt: str) -> list[str]:
    r"""Cut a BIG-Bench Hard prompt before each question that follows a blank line.

    Returns:
        The task's preamble, the demonstrations, then the question: k demonstrations give k + 2 pieces.
    """
    return re.split(r"(?<=\n\n)(?=Q: )", prompt)


def split_drop_prompt(prompt: str) -> list[str]:
    r"""Cut a DROP prompt before each `---` that begins a line.

    The header `# Your Task`, which follows the last demonstration, goes to the question it announces.

    Returns:
        The task's preamble, the demonstrations, then the question with its header.
    """
    header = "# Your Task\n\n"
    pieces = re.split(r"(?<=\n)(?=---)", prompt)
    if len(pieces) > 1 and pieces[-2].endswith(header):
        pieces[-2:] = [pieces[-2].removesuffix(header), header + pieces[-1]]
    return [piece for piece in pieces if piece] or [prompt]
