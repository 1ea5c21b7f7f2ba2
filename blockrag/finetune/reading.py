"""Data files to the rows that a run trains on, and to the samples that it scores.

What is too long is refused by its file and line, or left out and counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from blockrag.errors import DataError
from blockrag.finetune.data.lines import read_lines
from blockrag.finetune.rows import Rows
from blockrag.finetune.samples import Sample, fitted, samples_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.finetune.settings import FinetuneSettings
    from blockrag.prompt import PromptTemplate

__all__ = ["TooLong", "read_evaluated", "read_samples", "rows_of"]

logger = logging.getLogger(__name__)

TooLong = Literal["error", "skip"]


def read_samples(
    paths: Sequence[str | Path],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: TooLong,
    *,
    window: int | None = None,
    limit: int | None = None,
) -> tuple[list[Sample], int]:
    """The samples of data files.

    Args:
        paths: The files.
        template: The template.
        tokenizer: The tokenizer.
        max_tokens: Longest sample; the questions of a line are shared out to several where they do not fit into one.
        too_long: Whether a question that does not fit with its passages is an error or left out.
        window: Positions the model was made for; None for any.
        limit: Most lines.

    Returns:
        The samples, and how many lines had something left out.

    Raises:
        DataError: A line cannot be used; names the file and the line.
    """
    lines = ((f"{path}, line {number}", line) for path in paths for number, line in read_lines(path))
    samples: list[Sample] = []
    skipped = 0
    for where, line in islice(lines, limit):
        found = samples_of(line, template, tokenizer, where)
        if too_long == "error":
            samples.extend(fitted(found, max_tokens, window))
            continue
        kept, left_out = _that_fit(found, max_tokens, window)
        samples.extend(kept)
        skipped += left_out
    if skipped:
        logger.warning(
            "%s: questions of more than %d tokens, passages included, were left out in %d lines",
            ", ".join(map(str, paths)),
            min(max_tokens, window or max_tokens),
            skipped,
        )
    return samples, skipped


def read_evaluated(
    paths: Sequence[str | Path],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    *,
    window: int | None,
    limit: int,
) -> list[Sample]:
    """The samples to score while training, without those that are too long; all as in `read_samples`.

    Raises:
        DataError: A line cannot be used; or there are files, and no line of them can be scored.
    """
    samples, _ = read_samples(paths, template, tokenizer, max_tokens, "skip", window=window, limit=limit)
    if paths and not samples:
        raise DataError(
            f"no line of {', '.join(map(str, paths))} can be scored, all are longer than {max_tokens} tokens or the "
            "model's positions; raise --max-tokens, or keep fewer passages (blockrag data rerank -k)"
        )
    return samples


def rows_of(samples: Sequence[Sample], settings: FinetuneSettings) -> Rows:
    """The rows to train on.

    Raises:
        DataError: There is no sample.
    """
    return Rows(
        samples,
        variants=settings.variants,
        pack_tokens=settings.max_tokens if settings.pack else None,
        order=settings.order,
        max_gap=settings.max_gap,
        seed=settings.seed,
    )


def _that_fit(samples: Iterator[Sample], max_tokens: int, window: int | None) -> tuple[list[Sample], bool]:
    longest = min(max_tokens, window or max_tokens)
    kept: list[Sample] = []
    left_out = False
    for sample in samples:
        branches = tuple(branch for branch in sample.branches if sample.shared_tokens + len(branch) <= longest)
        left_out |= len(branches) < len(sample.branches)
        if branches:
            kept.extend(fitted([replace(sample, branches=branches)], max_tokens))
    return kept, left_out
