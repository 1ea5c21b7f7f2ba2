"""Tokens per second that prebuilding blocks reaches, with `blockrag.evaluation.prebuild` doing the measuring.

Passages are as long as those of a corpus cut at paragraphs: log-normal around 120 tokens, between 20 and 400. Here
are the settings, the store and the summary.
"""

from __future__ import annotations

import math
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from blockrag.errors import InputError
from blockrag.evaluation.prebuild import PrebuildTimes, Sample
from blockrag.evaluation.prebuild import measure_prebuild as measure
from blockrag.evaluation.speed.bounds import model_shape
from blockrag.evaluation.speed.frame import Frame, Progress, spread
from blockrag.evaluation.speed.prompts import random_blocks
from blockrag.stores import DiskStore, MemoryStore

if TYPE_CHECKING:
    from blockrag.evaluation.speed.machine import Rates
    from blockrag.evaluation.speed.shapes import Subject
    from blockrag.stores.protocol import BlockStore

__all__ = ["PrebuildSettings", "measure_prebuild"]

_LEAST, _TYPICAL, _MOST, _SIGMA = 20, 120, 400, 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class PrebuildSettings:
    """What to measure.

    Args:
        passages: How many are prebuilt, each time anew.
        to: "disk" (a temporary directory) or "memory".
        budgets: Padded tokens per forward that batches are tried with.
        repeats: Measured runs of each way.
        seed: Of lengths and tokens.

    Raises:
        InputError: A number or name is not possible.
    """

    passages: int = 64
    to: str = "disk"
    budgets: tuple[int, ...] = (512, 1024, 2048, 4096)
    repeats: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.to not in ("disk", "memory"):
            raise InputError(f"blocks go to 'disk' or 'memory', not to {self.to!r}")
        if not self.budgets or min(self.passages, self.repeats, *self.budgets) < 1:
            raise InputError(
                f"passages {self.passages}, budgets {self.budgets} and repeats {self.repeats} must be at least 1"
            )


def measure_prebuild(
    subject: Subject, settings: PrebuildSettings, *, note: str = "", progress: Progress = lambda line: None
) -> dict[str, Any]:
    """Prebuilding, the best batched forward and one passage at a time.

    Args:
        subject: The model.
        settings: What to measure.
        note: Kept with the result.
        progress: Told what is going on.

    Returns:
        The result; see docs/benchmarks.md for its keys.

    Raises:
        InputError: The model cannot place the longest passage.
    """
    generator = random.Random(settings.seed)
    lengths = [
        min(_MOST, max(_LEAST, round(generator.lognormvariate(math.log(_TYPICAL), _SIGMA))))
        for _ in range(settings.passages)
    ]
    subject.profile.room_after(max(lengths) + 1)
    frame = Frame("prebuild", subject, settings, note, progress)
    frame.open()
    progress(f"prebuild, {subject.name}: {settings.passages} passages, {sum(lengths):,} tokens, to {settings.to} ...")
    blocks = random_blocks(subject.model, lengths, seed=settings.seed)
    with _opened(settings.to) as store:
        times = measure(subject.model, blocks, store, budgets=settings.budgets, repeats=settings.repeats)
    rates = frame.close()
    return frame.result(
        rates,
        passages=times.blocks,
        tokens=times.tokens,
        bytes_at_rest=times.bytes_at_rest,
        ways={name: _summary(times, runs) for name, runs in _ways(times).items()},
        padded_tokens={str(budget): padded for budget, padded in times.padded_tokens.items()},
        of_batched=times.of_batched,
        over_one_by_one=times.over_one_by_one,
        bound_tokens_per_s=_bound(subject, rates),
    )


@contextmanager
def _opened(to: str) -> Iterator[BlockStore]:
    if to == "memory":
        with closing(MemoryStore()) as memory:
            yield memory
        return
    with tempfile.TemporaryDirectory(prefix="blockrag-bench-") as directory, closing(DiskStore(directory)) as disk:
        yield disk


def _ways(times: PrebuildTimes) -> dict[str, Sequence[Sample]]:
    batched = {f"batched, {budget:,} tokens": runs for budget, runs in times.batched.items()}
    return {"prebuild": times.prebuild, **batched, "one by one": times.one_by_one}


def _summary(times: PrebuildTimes, runs: Sequence[Sample]) -> dict[str, Any]:
    return {
        "seconds": spread([run.wall_s for run in runs]),
        "processor_s": spread([run.processor_s for run in runs]),
        "tokens_per_s": spread([times.tokens / run.wall_s for run in runs]),
    }


def _bound(subject: Subject, rates: Rates) -> float | None:
    """Tokens per second that the products with the weights allow; those of attention are left out.

    Of the last layer only the keys and values are needed.
    """
    shape = model_shape(subject)
    if shape is None:
        return None
    hidden = subject.model.model.config.get_text_config(decoder=True).hidden_size
    last = 2 * hidden * shape.num_kv_heads * shape.head_dim
    needed: float = shape.body_parameters * (shape.num_layers - 1) / shape.num_layers + last
    return rates.matrix_flops_per_s / (2 * needed)
