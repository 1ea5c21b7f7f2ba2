"""How long a run is: its steps and tokens, counted before it begins."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.finetune.rows import Rows
    from blockrag.finetune.settings import FinetuneSettings

__all__ = ["steps_of", "tokens_of"]


def steps_of(settings: FinetuneSettings, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    return settings.steps or math.ceil(settings.epochs * _steps_of_pass(settings, rows, processes))


def tokens_of(rows: Rows, settings: FinetuneSettings, steps: int, processes: int = 1) -> float:
    """Tokens of all rows of so many steps, padding left out; in a pass that is not finished, of shuffled rows, about.

    With a curriculum they are not the average's: the first rows are the shortest.
    """
    lengths = rows.lengths()
    passes, rest = divmod(steps, _steps_of_pass(settings, len(rows), processes))
    started = min(len(rows), rest * settings.batch_rows * settings.accumulate * processes)
    part = sum(lengths[:started]) if settings.order == "file" else started * sum(lengths) / len(rows)
    return passes * sum(lengths) + part


def _steps_of_pass(settings: FinetuneSettings, rows: int, processes: int) -> int:
    batches = math.ceil(math.ceil(rows / settings.batch_rows) / processes)
    return max(1, math.ceil(batches / settings.accumulate))
