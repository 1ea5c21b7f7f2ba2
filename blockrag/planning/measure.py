"""A few seconds of this machine: how fast it computes blocks, stores them, and loads them again.

The blocks are some of those that would be stored, so that their lengths are right. Loading is what a prompt does with
its passages: read, check, and place at their positions. What is read was written a moment ago, so that it comes from
the system's memory where the store is a directory: as fast as a store of hot blocks gets, and faster than a cold one.
Computing is the prefill of the same passages, batched, with nothing kept.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import TYPE_CHECKING

from blockrag.codec import encoded_nbytes
from blockrag.errors import InputError, StoreError
from blockrag.evaluation.speed.machine import synchronize

if TYPE_CHECKING:
    from blockrag.encoders import Encoder
    from blockrag.model.block_model import BlockModel
    from blockrag.passage import Passage
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["Rates", "measure_rates"]

# Computing, storing and loading take a third of the time each.
_PARTS = 3
_MOST_RUNS = 1000


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured.

    Args:
        device: What computed, such as "cpu".
        dtype: What it computed in.
        passages: Passages that were computed, or loaded, at a time.
        prefill_tokens_per_s: Computing alone.
        build_tokens_per_s: Computing, encoding and storing.
        load_bytes_per_s: Reading, checking and placing, in bytes at rest.
        encode_passages_per_s: Embedding passages for the index; None without an encoder.
    """

    device: str
    dtype: str
    passages: int
    prefill_tokens_per_s: float
    build_tokens_per_s: float
    load_bytes_per_s: float
    encode_passages_per_s: float | None = None


def measure_rates(
    model: BlockModel,
    blocks: Sequence[Block],
    store: BlockStore,
    *,
    k: int = 5,
    seconds: float = 5.0,
    encoder: Encoder | None = None,
    passages: Sequence[Passage] = (),
) -> Rates:
    """Measure for about some seconds, or as long as one passage takes where that is longer.

    Args:
        model: A model that keeps no finished prompts (`kept_bytes=0`).
        blocks: Distinct blocks to compute, store and load.
        store: Where they go; those that it did not have are deleted from it afterwards.
        k: Passages of a prompt.
        seconds: About how long.
        encoder: Embeds passages.
        passages: What it embeds.

    Raises:
        InputError: There is nothing to measure, or the model keeps finished prompts.
        StoreError: The store cannot be used, or loses what is put into it.

    Warns:
        BeyondTrainingWarning: A prompt has more passages than the model was block-fine-tuned on.
    """
    if not blocks or k < 1 or seconds <= 0:
        raise InputError(
            f"nothing to measure with {len(blocks)} blocks, k={k} and {seconds:g} seconds; pass at least one block, "
            "k of at least 1, and some time"
        )
    by_key = {model.block_key(block.token_ids): block for block in blocks}
    chosen = list(by_key.values())
    clock = _Clock(str(model.model.device.type), seconds / _PARTS)
    # The first forward also pays for what is done once.
    first = min(clock.timed(lambda: model.prefill([chosen[0].token_ids])) for _ in range(2))
    # On a slow machine there is no time for k passages.
    size = max(1, min(k, int(seconds / _PARTS / first), _placeable(model, chosen), len(chosen)))
    groups = [chosen[at : at + size] for at in range(0, len(chosen) - size + 1, size)]
    present = store.contains_many(by_key)
    try:
        prefill = clock.rate(groups, lambda group: _prefill(model, group))
        built: list[Sequence[Block]] = []
        build = clock.rate(groups, lambda group: _build(model, group, store, built), once=True) or prefill
        load = clock.rate(built, lambda group: _load(model, group, store))
    finally:
        store.delete_many(set(by_key) - present)
    encoded = clock.timed(lambda: encoder.encode_passages(passages)) if encoder is not None and passages else None
    return Rates(
        device=str(model.model.device),
        dtype=str(model.model.dtype).removeprefix("torch."),
        passages=size,
        prefill_tokens_per_s=prefill,
        build_tokens_per_s=build,
        load_bytes_per_s=load,
        encode_passages_per_s=None if encoded is None else len(passages) / encoded,
    )


@dataclass(frozen=True, slots=True)
class _Clock:
    """Times work on a device.

    Args:
        device: Its kind; what a GPU was told to do is waited for.
        seconds: How long work is repeated for the sake of one rate.
    """

    device: str
    seconds: float

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds that it takes."""
        synchronize(self.device)
        started = time.perf_counter()
        work()
        synchronize(self.device)
        return time.perf_counter() - started

    def rate(
        self,
        groups: Sequence[Sequence[Block]],
        work: Callable[[Sequence[Block]], int],
        *,
        once: bool = False,
    ) -> float:
        """The median of what is done per second, one group after the other, until the time is up.

        Args:
            groups: At least one.
            work: Returns how much it did.
            once: Whether each group is worked on a single time.
        """
        rates = []
        deadline = time.perf_counter() + self.seconds
        for group in islice(groups if once else cycle(groups), _MOST_RUNS):
            done = 0

            def run(group: Sequence[Block] = group) -> None:
                nonlocal done
                done = work(group)

            seconds = self.timed(run)
            rates.append(done / seconds)
            if time.perf_counter() >= deadline:
                break
        return statistics.median(rates)


def _prefill(model: BlockModel, group: Sequence[Block]) -> int:
    """Compute the blocks; returns their tokens."""
    model.prefill([block.token_ids for block in group])
    return sum(len(block.token_ids) for block in group)


def _build(model: BlockModel, group: Sequence[Block], store: BlockStore, built: list[Sequence[Block]]) -> int:
    """Compute and store the blocks; returns the tokens of those that were not stored already."""
    report = model.materialize(group, store)
    built.append(group)
    return report.tokens_new


def _load(model: BlockModel, group: Sequence[Block], store: BlockStore) -> int:
    """Read, check and place the blocks; returns their bytes at rest."""
    running = model.start(store=store)
    try:
        running.extend(group, room=0)
        usage = running.usage
    finally:
        running.close()
    if usage.blocks_kept:
        raise InputError("the model keeps finished prompts, which hides what loading costs; load it with kept_bytes=0")
    if usage.blocks_computed:
        raise StoreError(f"{store.url} lost {usage.blocks_computed} blocks that were just put into it; check it")
    layout = model.profile.layout if model.profile is not None else None
    if layout is None:
        raise AssertionError("a model that placed blocks has a profile")
    return sum(encoded_nbytes(layout, len(block.token_ids), model.precision) for block in group)


def _placeable(model: BlockModel, blocks: Sequence[Block]) -> int:
    """How many of the blocks one prompt can hold, however long they are."""
    limits = () if model.profile is None else (model.profile.max_tokens, model.profile.regime_limit)
    limit = min((one for one in limits if one is not None), default=None)
    # A prompt that fills the limit to its end has no room for an answer.
    return len(blocks) if limit is None else (limit - 1) // max(len(block.token_ids) for block in blocks)
