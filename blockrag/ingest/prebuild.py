"""Computing KV states ahead of the question, where one block's failure must not cost the others theirs.

For callers that were handed passages by somebody else and must keep them whatever happens: a passage without stored
KV states still answers, its block is only computed by the first question. A pass that may stop at an error is
`pipeline`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from blockrag.errors import BlockRAGError, InputError

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel
    from blockrag.prompt import Block

__all__ = ["PrebuildReport", "encode_blocks", "prebuild_blocks"]

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrebuildReport:
    """What `prebuild_blocks` did.

    Args:
        blocks_new: Blocks computed and stored.
        blocks_reused: Blocks that were stored already.
        failures: Error by place in the sequence of blocks that was given.
    """

    blocks_new: int
    blocks_reused: int
    failures: Mapping[int, Exception]


def prebuild_blocks(model: BlockModel, blocks: Sequence[Block]) -> PrebuildReport:
    """Make the model's store hold these blocks, as far as each of them can be computed and stored.

    Args:
        model: Computes them; its own store receives them.
        blocks: Non-empty blocks; repeated ones count once.

    Returns:
        What was computed, and what failed: blocks longer than the model can place, that the store refuses, or that
        do not fit the memory alone.
    """
    new = reused = 0
    failures: dict[int, Exception] = {}
    pending = [range(len(blocks))]
    while pending:
        some = pending.pop()
        if not some:
            continue
        try:
            report = model.materialize([blocks[place] for place in some])
        # torch tells that memory is short by a RuntimeError.
        except (BlockRAGError, MemoryError, RuntimeError) as error:
            if len(some) == 1:
                failures[some[0]] = error
                continue
            # Halves, not one by one: those around a bad block are still computed in batches.
            middle = len(some) // 2
            pending += [some[middle:], some[:middle]]
        else:
            new += report.blocks_new
            reused += report.blocks_reused
    return PrebuildReport(new, reused, failures)


def encode_blocks(
    items: Sequence[T], blocks_of: Callable[[Sequence[T]], list[Block]]
) -> tuple[dict[int, Block], dict[int, Exception]]:
    """The blocks of passages, tokenized in one batch if all of them can be.

    Args:
        items: What holds the passages.
        blocks_of: The block of each item, one each and in order.

    Returns:
        Blocks, and errors of items that cannot be tokenized, by place among the items. An item whose block is empty
        is in neither.
    """
    try:
        blocks = blocks_of(items)
    except InputError as error:
        if len(items) == 1:
            return {}, {0: error}
        found: dict[int, Block] = {}
        failures: dict[int, Exception] = {}
        for place in range(len(items)):
            alone, failed = encode_blocks(items[place : place + 1], blocks_of)
            found.update((place, block) for block in alone.values())
            failures.update((place, failure) for failure in failed.values())
        return found, failures
    return {place: block for place, block in enumerate(blocks) if block.token_ids}, {}
