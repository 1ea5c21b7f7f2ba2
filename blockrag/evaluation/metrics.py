"""What an answer is worth beside the right ones: exact match, Substr-EM, two kinds of F1, and recall of passages.

All compare normalized text: lower case, without ASCII punctuation and English articles, white space collapsed
(Rajpurkar et al. 2016, SQuAD's evaluation; Liu et al. 2024 and the Block-Attention evaluation use the same function).
A phrase in a script without spaces is one word.

Plain text in, plain numbers out; nothing here knows models, files or tables.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.finetune.data.lines import Candidate

__all__ = [
    "METRICS",
    "Evidence",
    "Scores",
    "exact_match",
    "normalize_answer",
    "recall_at_k",
    "score",
    "substring_match",
    "supporting",
    "token_f1",
    "union_f1",
]

Evidence = Literal["flag", "answer"]
"""How a passage is known to support an answer: the data set marks it, or it contains the answer."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True, slots=True)
class Scores:
    """What one answer is worth, each from 0 to 1; the fields are described at the functions of these names.

    Args:
        em: `exact_match`.
        substr_em: `substring_match`, the accuracy of the paper.
        f1: `token_f1`, that of SQuAD.
        union_f1: `union_f1`, most likely that of the published model cards.
    """

    em: float
    substr_em: float
    f1: float
    union_f1: float

    def as_json(self) -> dict[str, float]:
        """The scores under their names."""
        return asdict(self)


METRICS: tuple[str, ...] = ("em", "substr_em", "f1", "union_f1")
"""The names of the scores."""


def score(prediction: str, answers: Sequence[str]) -> Scores:
    """All scores of one answer.

    Args:
        prediction: What the model wrote.
        answers: What counts as right.

    Raises:
        InputError: There are no answers to compare with.
    """
    return Scores(
        em=float(exact_match(prediction, answers)),
        substr_em=float(substring_match(prediction, answers)),
        f1=token_f1(prediction, answers),
        union_f1=union_f1(prediction, answers),
    )


def normalize_answer(text: str) -> str:
    """Lower case, no ASCII punctuation, no English articles, single spaces.

    Punctuation goes before articles, as published: "a.m." becomes "am", and "the-end" becomes "theend".
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers, both normalized.

    Where nothing of an answer is left ("A", "The The"), the texts themselves must agree but for case and surrounding
    white space; SQuAD's own script takes every prediction of which nothing is left.

    Raises:
        InputError: There are no answers to compare with.
    """
    found = normalize_answer(prediction)
    return any(
        normalize_answer(answer) == found and (found != "" or answer.strip().lower() == prediction.strip().lower())
        for answer in _some(answers)
    )


def substring_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction contains one of the answers, both normalized: Substr-EM, the accuracy of the paper.

    Compared character by character, as published (Liu et al. 2024, `best_subspan_em`): the answer "no" is found in
    "I know". An answer of which nothing is left ("the", "!") never counts; the published code finds it everywhere.

    Raises:
        InputError: There are no answers to compare with.
    """
    found = normalize_answer(prediction)
    return any((answer := normalize_answer(given)) != "" and answer in found for given in _some(answers))


def token_f1(prediction: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of words, each as often as it occurs; the best over the answers.

    Source: Rajpurkar et al. 2016, SQuAD's evaluation script 1.1.

    Raises:
        InputError: There are no answers to compare with.
    """
    found = Counter(normalize_answer(prediction).split())
    wanted = [Counter(normalize_answer(answer).split()) for answer in _some(answers)]
    return max(_f1((found & gold).total(), found.total(), gold.total()) for gold in wanted)


def union_f1(prediction: str, answers: Sequence[str]) -> float:
    """The same of the set of words, against the words of all answers together.

    Not SQuAD's: a question with many spellings of its answer can hardly reach 1 here. So counts the evaluation script
    of those who published block-fine-tuned checkpoints (hxia7); their model cards give an F1 without saying which.

    Raises:
        InputError: There are no answers to compare with.
    """
    found = set(normalize_answer(prediction).split())
    gold = {word for answer in _some(answers) for word in normalize_answer(answer).split()}
    return _f1(len(found & gold), len(found), len(gold))


def supporting(passages: Sequence[Candidate], answers: Sequence[str]) -> tuple[tuple[bool, ...], Evidence]:
    """Which passages support the answer to a question.

    Args:
        passages: In the order to be judged.
        answers: What counts as right.

    Returns:
        One truth value per passage, and what it rests on: the data set's mark where any of them has one (those without
        do not support), else whether title and text contain an answer, normalized.
    """
    if any(candidate.supports is not None for candidate in passages):
        return tuple(bool(candidate.supports) for candidate in passages), "flag"
    texts = (f"{candidate.passage.title} {candidate.passage.text}" for candidate in passages)
    return tuple(substring_match(text, answers) for text in texts), "answer"


def recall_at_k(supports: Sequence[Sequence[bool]], k: int) -> float:
    """The share of questions with a supporting passage among their first k.

    Args:
        supports: For each question, whether each of its passages supports an answer, best passage first.
        k: How many passages count.

    Raises:
        InputError: There is no question, or `k` is below 1.
    """
    if not supports or k < 1:
        raise InputError(f"recall needs questions and at least one passage, got {len(supports)} questions and k={k}")
    return sum(any(one[:k]) for one in supports) / len(supports)


def _f1(common: int, found: int, wanted: int) -> float:
    # 2PR / (P + R) with P = common / found and R = common / wanted.
    return 2 * common / (found + wanted) if common else 0.0


def _some(answers: Sequence[str]) -> Sequence[str]:
    if isinstance(answers, str) or not answers:
        raise InputError(f"answers must be a list of at least one string, got {answers!r:.60}")
    return answers
