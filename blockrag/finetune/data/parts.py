"""From a record's parts to a line: what the readers share.

The parts go through `parse_line`, so that a line a reader makes can be written and read again, and what is wrong with
it is said once, with the place of the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

from blockrag.errors import DataError
from blockrag.finetune.data.lines import RagLine, parse_line
from blockrag.finetune.data.records import Record

__all__ = ["LeftOut", "distinct", "nobody_asks", "rag_line"]

LeftOut: TypeAlias = Callable[[str], None]
"""Called with what is left out, in two or three words, once for each."""


def nobody_asks(reason: str) -> None:
    """A `LeftOut` for callers who do not count."""


def distinct(answers: Iterable[object]) -> list[object]:
    """Answers without repeats and without empty ones, in order."""
    kept: list[object] = []
    for answer in answers:
        if answer not in kept and not (isinstance(answer, str) and not answer.strip()):
            kept.append(answer)
    return kept


def rag_line(
    record: Record,
    *,
    passages: Sequence[Mapping[str, object]],
    question: object,
    answers: Iterable[object],
    kind: object = None,
    left_out: LeftOut,
) -> RagLine:
    """The line of one question.

    Args:
        record: Where it comes from; its `id` (or `_id`, or `question_id`) is kept.
        passages: In order, as the fields of the format; those without text are left out.
        question: The question.
        answers: Repeated and empty ones are dropped.
        kind: What the data set calls this kind of question; None where it does not.
        left_out: Told of every passage that is left out.

    Raises:
        DataError: A part is malformed.
    """
    kept = []
    for passage in passages:
        text = passage.get("text")
        if isinstance(text, str) and not text.strip():
            left_out("passage without text")
        else:
            kept.append(passage)
    fields: dict[str, object] = {"passages": kept, "question": question, "answers": distinct(answers)}
    fields |= {"kind": kind} if kind else {}
    fields |= {"id": identity} if (identity := record.identity("id", "_id", "question_id")) else {}
    line = parse_line(fields, record.where)
    if not isinstance(line, RagLine):
        raise DataError(f"{record.where}: not a question over passages")
    return line
