"""What a data file holds, and whether anything is wrong with it, before hours of training say so.

Reads all of it and goes on behind a malformed line. Knows the template and the tokenizer only as arguments.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from blockrag.errors import DataError
from blockrag.evaluation.metrics import substring_match
from blockrag.finetune.data.lines import BlocksLine, ChatLine, Line, RagLine, scan_lines
from blockrag.finetune.samples import samples_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.prompt import PromptTemplate

__all__ = ["FileReport", "Spread", "check_file"]

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number is spread over lines; p95 is the smallest value that 95 % of them do not exceed."""

    least: int
    median: float
    p95: int
    most: int
    total: int

    @classmethod
    def of(cls, values: Sequence[int]) -> Spread | None:
        """The spread of some values; None of none."""
        if not values:
            return None
        ordered = sorted(values)
        p95 = ordered[-(-95 * len(ordered) // 100) - 1]
        return cls(ordered[0], statistics.median(ordered), p95, ordered[-1], sum(ordered))


@dataclass(slots=True)
class FileReport:
    """What a file holds.

    Args:
        forms: Lines by form: "rag", "blocks", "chat".
        kinds: Questions by kind; "" for those without one.
        questions: Questions of RAG lines.
        responses: How many of them bring a response of their own.
        answerable: How many have an answer in the title or text of one of their passages, normalized as Substr-EM.
        with_passages: How many have passages.
        passages: Passages per RAG line; None without such lines.
        tokens: Tokens per line as it is trained in block attention; None where no model was given.
        separate_tokens: Tokens of the same lines with a prompt for every question.
        too_long: Numbers of lines with a question that exceeds the limit together with its passages.
        errors: What is wrong, at most the first 20.
        bad_lines: How many lines are malformed.
    """

    forms: dict[str, int] = field(default_factory=dict)
    kinds: dict[str, int] = field(default_factory=dict)
    questions: int = 0
    responses: int = 0
    answerable: int = 0
    with_passages: int = 0
    passages: Spread | None = None
    tokens: Spread | None = None
    separate_tokens: int | None = None
    too_long: list[int] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    bad_lines: int = 0


def check_file(
    path: str | Path,
    *,
    template: PromptTemplate | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_tokens: int | None = None,
) -> FileReport:
    """Read a data file to its end.

    Args:
        path: The file.
        template: A model's template; with its tokenizer, tokens are counted and lines that it cannot show are errors.
        tokenizer: That model's tokenizer.
        max_tokens: The limit for `too_long`.

    Raises:
        DataError: The file cannot be read, or holds no line.
    """
    report = FileReport()
    passages: list[int] = []
    tokens: list[int] = []
    for number, line in scan_lines(path):
        if isinstance(line, DataError):
            _note(report, line)
            continue
        if isinstance(line, RagLine):
            passages.append(len(line.passages))
        _count(line, report)
        if template is not None and tokenizer is not None:
            try:
                tokens.append(_tokens(line, template, tokenizer, f"{path}, line {number}", number, max_tokens, report))
            except DataError as error:
                _note(report, error)
    report.passages, report.tokens = Spread.of(passages), Spread.of(tokens)
    return report


def _note(report: FileReport, error: DataError) -> None:
    report.bad_lines += 1
    if len(report.errors) < _SHOWN:
        report.errors.append(str(error))


def _count(line: Line, report: FileReport) -> None:
    form = "chat" if isinstance(line, ChatLine) else "blocks" if isinstance(line, BlocksLine) else "rag"
    report.forms[form] = report.forms.get(form, 0) + 1
    if not isinstance(line, RagLine):
        return
    shown = [f"{one.passage.title} {one.passage.text}" for one in line.passages]
    for question in line.questions:
        report.questions += 1
        report.kinds[question.kind] = report.kinds.get(question.kind, 0) + 1
        report.responses += bool(question.response)
        report.with_passages += bool(line.passages)
        report.answerable += any(substring_match(text, question.answers) for text in shown)


def _tokens(
    line: Line,
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    number: int,
    max_tokens: int | None,
    report: FileReport,
) -> int:
    total = separate = longest = 0
    for sample in samples_of(line, template, tokenizer, where):
        total += sample.num_tokens
        alone = [sample.shared_tokens + len(branch) for branch in sample.branches]
        separate += sum(alone)
        longest = max(longest, *alone)
    report.separate_tokens = (report.separate_tokens or 0) + separate
    if max_tokens is not None and longest > max_tokens:
        report.too_long.append(number)
    return total
