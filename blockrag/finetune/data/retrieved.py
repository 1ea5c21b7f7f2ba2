"""NQ and TriviaQA as the retrieval field passes them on: questions with a retriever's candidates, in the form of FiD.

    {"question", "answers": [...] or "answer": ..., "ctxs": [{"title", "text", "score"?, "isgold"?, "hasanswer"?}, ...]}

Source: facebookresearch/FiD (Izacard and Grave, arXiv 2007.01282); DPR's retriever and Liu et al. 2024 (Lost in the
Middle) write the same. Scores are strings in some of these files. NQ-open as Google publishes it has no `ctxs`: such
lines have no passages, and need retrieval before they train anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from blockrag.errors import DataError
from blockrag.finetune.data.lines import RagLine
from blockrag.finetune.data.parts import LeftOut, nobody_asks, rag_line
from blockrag.finetune.data.records import Record, read_records

__all__ = ["read_retrieved"]


def read_retrieved(path: str | Path, *, left_out: LeftOut = nobody_asks) -> Iterator[RagLine]:
    """One line per question, with its candidates in the order given and their scores.

    A passage supports where the file says `isgold`, or else `hasanswer` (or `has_answer`).

    Args:
        path: JSON lines or a JSON list; may be packed with gzip.
        left_out: Told of every candidate without text.

    Raises:
        DataError: A record is malformed; names the file and the record.
    """
    for record in read_records(path):
        candidates = record.list_of("ctxs") if "ctxs" in record.fields else []
        answers = record.fields.get("answers", record.fields.get("answer"))
        yield rag_line(
            record,
            passages=[_candidate(record, number, item) for number, item in enumerate(candidates, start=1)],
            question=record.fields.get("question"),
            answers=answers if isinstance(answers, list) else [answers],
            left_out=left_out,
        )


def _candidate(record: Record, number: int, item: object) -> dict[str, object]:
    where = f"{record.where}, ctxs {number}"
    if not isinstance(item, dict):
        raise DataError(f"{where}: must be an object with a text, got {item!r:.60}")
    fields: dict[str, object] = {"title": item.get("title") or "", "text": item.get("text")}
    fields |= {"id": str(item["id"])} if item.get("id") not in (None, "") else {}
    fields |= {"score": _number(where, item["score"])} if item.get("score") is not None else {}
    marks = [item[name] for name in ("isgold", "hasanswer", "has_answer") if isinstance(item.get(name), bool)]
    return fields | ({"supports": marks[0]} if marks else {})


def _number(where: str, score: Any) -> float:
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise DataError(f"{where}: score must be a finite number, got {score!r:.60}")
    return value
