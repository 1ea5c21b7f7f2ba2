"""How fast blocks are prebuilt, beside the fastest forward of the same tokens and the plainest way to do it.

Three things take turns, and every passage is computed anew each time:

    prebuild     `BlockModel.materialize`: forwards, un-rotation, encoding, storing
    batched      the same tokens through the model without its language-model head, in batches of similar length, and
                 nothing kept; one for each token budget, with the batches that `plan_batches` makes, and with the
                 same linear layers and attention as blockrag's own forwards
    one by one   each passage alone through the whole model, with its head, and with the linear layers and the cache
                 of transformers

Rates count the tokens of the passages, not the padding beside them. Nothing here knows how blocks are computed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from blockrag.errors import InputError
from blockrag.model.guard import ForwardGuard
from blockrag.model.prefill import plan_batches

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["PrebuildTimes", "Sample", "measure_prebuild"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One run: seconds that passed, and seconds of processor time of all threads."""

    wall_s: float
    processor_s: float


@dataclass(frozen=True, slots=True)
class PrebuildTimes:
    """What was measured.

    Args:
        blocks: Distinct blocks.
        tokens: Their tokens.
        bytes_at_rest: Bytes the store took for them.
        prebuild: Runs of `BlockModel.materialize` into the store.
        batched: Padded tokens per forward to the runs with that budget.
        padded_tokens: Padded tokens per forward to the tokens computed with that budget, padding included.
        one_by_one: Runs of one passage at a time.
    """

    blocks: int
    tokens: int
    bytes_at_rest: int
    prebuild: tuple[Sample, ...]
    batched: dict[int, tuple[Sample, ...]]
    padded_tokens: dict[int, int]
    one_by_one: tuple[Sample, ...]

    @property
    def tokens_per_s(self) -> float:
        """Tokens prebuilt per second, in the fastest run."""
        return self.tokens / _fastest(self.prebuild)

    @property
    def of_batched(self) -> float:
        """Rate of prebuilding as a part of the best batched forward's, fastest runs of both."""
        return min(map(_fastest, self.batched.values())) / _fastest(self.prebuild)

    @property
    def over_one_by_one(self) -> float:
        """How many times as fast as one passage at a time, fastest runs of both."""
        return _fastest(self.one_by_one) / _fastest(self.prebuild)


def measure_prebuild(
    model: BlockModel,
    blocks: Sequence[Block],
    store: BlockStore,
    *,
    budgets: Sequence[int] = (512, 1024, 2048, 4096),
    repeats: int = 3,
) -> PrebuildTimes:
    """Prebuild blocks, and run their tokens through the model in the other ways.

    Args:
        model: A model that can be composed.
        blocks: What to prebuild; repeated blocks count once.
        store: Where they go; blocks of these keys are deleted from it before each run, and afterwards.
        budgets: Padded tokens per batched forward; the best counts.
        repeats: Runs of each, after one that is not counted.

    Returns:
        All runs.

    Raises:
        InputError: There are no blocks, no budgets or no repeats.
        StoreFullError: A block does not fit the store.
    """
    if not blocks or not budgets or repeats < 1 or min(budgets) < 1:
        raise InputError(
            f"nothing to measure with {len(blocks)} blocks, budgets {tuple(budgets)} and {repeats} repeats; "
            "pass at least one of each"
        )
    by_key = {model.block_key(block.token_ids): block for block in blocks}
    token_ids = [block.token_ids for block in by_key.values()]
    lengths = [len(ids) for ids in token_ids]
    plans = {budget: plan_batches(lengths, budget) for budget in budgets}
    batches = {budget: [_padded(token_ids, rows) for rows in plan] for budget, plan in plans.items()}
    guard = ForwardGuard(model.model)
    bytes_new = 0

    def prebuild() -> None:
        nonlocal bytes_new
        bytes_new = model.materialize(list(by_key.values()), store).bytes_new

    def batched(budget: int) -> Callable[[], None]:
        return lambda: _forward_all(model, guard, batches[budget])

    ways: dict[object, Callable[[], None]] = {"prebuild": prebuild, "one by one": lambda: _one_by_one(model, token_ids)}
    ways |= {budget: batched(budget) for budget in budgets}
    samples: dict[object, list[Sample]] = {name: [] for name in ways}
    order = list(ways)
    for repeat in range(repeats + 1):
        for name in order:
            store.delete_many(by_key)
            sample = _timed(model, ways[name])
            if repeat > 0:
                samples[name].append(sample)
        # A slow minute of the machine shall not fall on one of them only.
        order = order[1:] + order[:1]
    store.delete_many(by_key)
    return PrebuildTimes(
        blocks=len(by_key),
        tokens=sum(lengths),
        bytes_at_rest=bytes_new,
        prebuild=tuple(samples["prebuild"]),
        batched={budget: tuple(samples[budget]) for budget in budgets},
        padded_tokens={budget: sum(ids.numel() for ids in batches[budget]) for budget in budgets},
        one_by_one=tuple(samples["one by one"]),
    )


def _padded(token_ids: Sequence[Sequence[int]], rows: Sequence[int]) -> torch.Tensor:
    """Token ids of one batch, shape (rows, longest), zeros behind the shorter ones."""
    ids = torch.zeros(len(rows), max(len(token_ids[row]) for row in rows), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(token_ids[row])] = torch.tensor(list(token_ids[row]))
    return ids


@torch.no_grad()
def _forward_all(model: BlockModel, guard: ForwardGuard, batches: Sequence[torch.Tensor]) -> None:
    device = model.model.device
    for ids in batches:
        positions = torch.arange(ids.shape[1], device=device)[None]
        with guard:
            model.model.base_model(input_ids=ids.to(device), position_ids=positions, use_cache=False)


@torch.no_grad()
def _one_by_one(model: BlockModel, token_ids: Sequence[Sequence[int]]) -> None:
    for ids in token_ids:
        model.model(input_ids=torch.tensor([list(ids)], device=model.model.device), use_cache=True)


def _timed(model: BlockModel, run: Callable[[], None]) -> Sample:
    _wait(model)
    wall, processor = time.perf_counter(), time.process_time()
    run()
    _wait(model)
    return Sample(time.perf_counter() - wall, time.process_time() - processor)


def _wait(model: BlockModel) -> None:
    """For what a GPU has been told to do."""
    if model.model.device.type == "cuda":
        torch.cuda.synchronize(model.model.device)


def _fastest(samples: Sequence[Sample]) -> float:
    return min(sample.wall_s for sample in samples)
