"""What is asked: questions, and the passages a model is given with them, from a data file or an index.

A file holds lines of `blockrag.finetune.data.lines`; for questions about one's own index, `passages` may be left out:

    {"question", "answers": [...]}

Which questions, which passages and in which order is settled here, before any model is loaded, so that every model and
mode is asked the same. Knows neither models nor answers.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from blockrag.errors import DataError, InputError
from blockrag.evaluation.metrics import recall_at_k, supporting
from blockrag.finetune.data.lines import Candidate, Question, RagLine, parse_json, parse_line
from blockrag.fingerprint import hash_json
from blockrag.passage import Passage

__all__ = ["TOP_K", "Asked", "EvalQuestion", "PassageOrder", "Retrieve", "Selection", "read_questions"]

TOP_K = 5
"""Passages that are searched for where nothing says how many, as elsewhere."""

PassageOrder = Literal["given", "reversed", "shuffled"]
"""How passages stand in the prompt; "reversed" puts the best-ranked next to the question."""

Retrieve = Callable[[str, int], Sequence[Candidate]]
"""Finds the given number of passages for a question, best first."""

_ALL = "all"
_RECALL_AT = (1, 2, 3, 5, 10, 20, 50, 100)


@dataclass(frozen=True, slots=True)
class Selection:
    """Which questions of a file, and which of their passages.

    Args:
        k: How many passages, the first of the line or the best of the index; None for all of a line and `TOP_K` of an
            index.
        order: How they then stand in the prompt.
        limit: How many questions; None for all.
        seed: Draws them, and shuffles passages. None takes the first questions of the file.

    Raises:
        InputError: A value is out of range.
    """

    k: int | None = None
    order: PassageOrder = "given"
    limit: int | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.k is not None and self.k < 0:
            raise InputError(f"k={self.k} is negative; pass the number of passages per question, 0 for none")
        if self.order not in get_args(PassageOrder):
            raise InputError(f"order={self.order!r} is not one of {', '.join(get_args(PassageOrder))}")
        if self.limit is not None and self.limit < 1:
            raise InputError(f"limit={self.limit} leaves no question; leave it out for all of them")


@dataclass(frozen=True, slots=True)
class EvalQuestion:
    """One question as it is put to a model.

    Args:
        index: Its number among those asked, from 0.
        line: The line it is on, from 1; questions of one line share passages.
        question: The question.
        answers: What counts as right; empty where others will judge.
        id: The data set's; may be empty.
        kind: Questions of one kind are reported together; may be empty.
        passages: In prompt order.
        blocks: A prompt that is already cut into blocks, in place of question and passages.
    """

    index: int
    line: int
    question: str
    answers: tuple[str, ...]
    id: str = ""
    kind: str = ""
    passages: tuple[Passage, ...] = ()
    blocks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Asked:
    """All questions of an evaluation.

    Args:
        name: Of the data file.
        questions: In the order of the file.
        settings: How they were chosen, as JSON types.
        recall: For each way of telling what supports an answer ("flag": the data set's mark, "answer": the passage
            contains it), how many questions, and the share with a supporting passage among their first k.
    """

    name: str
    questions: tuple[EvalQuestion, ...]
    settings: dict[str, Any]
    recall: dict[str, dict[str, Any]]

    def describe(self) -> dict[str, Any]:
        """What a file of predictions says about them; the digest covers every question with all its passages."""
        # One at a time: as one text, a hundred thousand questions with ten passages each would be gigabytes.
        contents = [hash_json(asdict(question)) for question in self.questions]
        return {
            "file": self.name,
            "questions": len(self.questions),
            "digest": hash_json(contents),
            "settings": self.settings,
            "recall": self.recall,
        }


def read_questions(path: str | Path, selection: Selection | None = None, *, retrieve: Retrieve | None = None) -> Asked:
    """Read the questions of a file and settle their passages.

    Args:
        path: The file.
        selection: Which of them; by default all.
        retrieve: Finds passages for questions that bring none.

    Raises:
        DataError: The file cannot be read or a line is malformed; or a question brings no passages and there is no
            index; names the file and the line.
    """
    path, selection = Path(path), selection or Selection()
    found = [(number, line, question) for number, line in _lines(path) for question in line.questions]
    if selection.limit is not None and selection.limit < len(found):
        chosen: Sequence[int] = range(selection.limit)
        if selection.seed is not None:
            chosen = sorted(random.Random(selection.seed).sample(range(len(found)), selection.limit))
        found = [found[number] for number in chosen]
    questions, supports = [], _Supports()
    for index, (number, line, question) in enumerate(found):
        if question.kind == _ALL:
            raise DataError(f"{path}, line {number}: kind {_ALL!r} is what tables call all questions; choose another")
        candidates: Sequence[Candidate] = line.passages
        if not candidates and selection.k != 0:
            if retrieve is None:
                raise DataError(f"{path}, line {number}: has no passages; pass an index to search, or k=0 for none")
            candidates = retrieve(question.question, TOP_K if selection.k is None else selection.k)
        supports.add(candidates, question, selection.k)
        questions.append(_asked(index, number, line, question, candidates[: selection.k], selection))
    return Asked(path.name, tuple(questions), asdict(selection), supports.recall())


def _asked(
    index: int, number: int, line: RagLine, question: Question, candidates: Sequence[Candidate], selection: Selection
) -> EvalQuestion:
    passages = [candidate.passage for candidate in candidates]
    if selection.order == "reversed":
        passages.reverse()
    elif selection.order == "shuffled":
        # Depends on the line alone: a question has the same passages before it whichever others are asked.
        random.Random(f"{selection.seed}:{number}").shuffle(passages)
    return EvalQuestion(
        index=index,
        line=number,
        question=question.question,
        answers=question.answers,
        id=question.id or line.id,
        kind=question.kind,
        # Metadata is no part of a prompt.
        passages=tuple(replace(passage, metadata={}) for passage in passages),
    )


class _Supports:
    """Which passages support their answers, by how that is known."""

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[bool, ...]]] = {}

    def add(self, candidates: Sequence[Candidate], question: Question, k: int | None) -> None:
        # All candidates say whether the data set marks evidence, also where only those behind the first k are marked.
        supports, evidence = supporting(candidates, question.answers)
        if supports[:k]:
            self._found.setdefault(evidence, []).append(supports[:k])

    def recall(self) -> dict[str, dict[str, Any]]:
        result = {}
        for evidence, supports in sorted(self._found.items()):
            most = max(len(one) for one in supports)
            ks = [k for k in _RECALL_AT if k < most] + [most]
            result[evidence] = {"questions": len(supports), "at": {str(k): recall_at_k(supports, k) for k in ks}}
        return result


def _lines(path: Path) -> Iterator[tuple[int, RagLine]]:
    """The lines of the file; a question may come without passages."""
    found = False
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.strip():
                    continue
                found, where = True, f"{path}, line {number}"
                fields = parse_json(data, where)
                if isinstance(fields, dict) and "passages" not in fields and {"question", "questions"} & set(fields):
                    fields = {"passages": [], **fields}
                line = parse_line(fields, where)
                if not isinstance(line, RagLine):
                    raise DataError(
                        f"{where}: has no question to evaluate, got {fields!r:.80}; leave such lines out here"
                    )
                yield number, line
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); pass a file of JSON lines") from error
    if not found:
        raise DataError(f"{path} holds no lines; write one question per line")
