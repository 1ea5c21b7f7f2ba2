"""Samples in both attentions, as the rows of batches.

Every sample can be trained under the block mask, under full attention, or both (the published recipe: both, as two
samples). Rows may hold several samples behind each other; they do not see each other. Which sample stands where, in
which attention, is a function of the seed alone, so that a run that is resumed goes on with the rows it would have had.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch.utils.data import Dataset

from blockrag.errors import DataError, InputError
from blockrag.finetune.samples import Sample
from blockrag.model.block_model import Attention

__all__ = ["Item", "Order", "Row", "Rows", "Variants"]

Variants: TypeAlias = Literal["both", "alternate", "block", "full"]
Order: TypeAlias = Literal["shuffled", "file"]


@dataclass(frozen=True, slots=True)
class Item:
    """A sample in one attention.

    Args:
        sample: The sample; under full attention without the marker.
        attention: "block" or "full".
        gaps: Positions to leave out behind each block; empty for none.
    """

    sample: Sample
    attention: Attention
    gaps: tuple[int, ...] = ()


Row: TypeAlias = tuple[Item, ...]
"""What stands behind each other in one row of a batch."""


class Rows(Dataset[Row]):
    """The rows of a training set.

    Args:
        samples: At least one.
        variants: "both": every sample in both attentions; "alternate": every sample once, block and full in turn;
            "block" or "full": every sample once, so.
        pack_tokens: Put samples behind each other in rows of up to so many tokens; None gives each a row of its own.
        order: "shuffled" mixes the samples; "file" keeps their order, for a curriculum.
        max_gap: In half of the items, leave out up to so many positions between the blocks: distances beyond the
            length of the rows are seen. (Shifting a whole prompt would change nothing: rotary positions are relative.)
        seed: Draws all of it.

    Raises:
        DataError: There is no sample.
        InputError: A value there is not.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        *,
        variants: Variants = "both",
        pack_tokens: int | None = None,
        order: Order = "shuffled",
        max_gap: int = 0,
        seed: int = 0,
    ) -> None:
        if not samples:
            raise DataError("there is no sample to train on; see what was left out, and why, in the messages before")
        if variants not in get_args(Variants) or order not in get_args(Order):
            raise InputError(f"variants={variants!r} and order={order!r}: see Rows for what there is")
        self._samples = samples
        self._max_gap = max_gap
        self._seed = seed
        items = _variants(len(samples), variants)
        if order == "shuffled":
            random.Random(f"order-{seed}").shuffle(items)
        lengths = [samples[number].num_tokens for number, _ in items]
        self._rows = [[items[at] for at in row] for row in _packed(lengths, pack_tokens)]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Row]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Row:
        return tuple(self._item(number, attention) for number, attention in self._rows[index])

    def lengths(self) -> list[int]:
        """Tokens of each row, padding left out."""
        return [sum(item.sample.num_tokens for item in row) for row in self]

    def longest(self) -> tuple[int, int]:
        """Most local blocks, and most positions from the first block to the end of an answer, under block attention."""
        seen = [item for row in self for item in row if item.attention == "block"]
        blocks = max((len(item.sample.blocks) for item in seen), default=0)
        positions = (item.sample.shared_tokens + sum(item.gaps) + max(map(len, item.sample.branches)) for item in seen)
        return blocks, max(positions, default=0)

    def _item(self, number: int, attention: Attention) -> Item:
        sample = self._samples[number]
        if attention == "full":
            sample = sample.without_marker()
        gaps: tuple[int, ...] = ()
        if self._max_gap and sample.blocks:
            rng = random.Random(f"gaps-{self._seed}-{number}-{attention}")
            if rng.random() < 0.5:
                share = rng.randint(0, self._max_gap) // len(sample.blocks)
                gaps = tuple(rng.randint(0, share) for _ in sample.blocks)
        return Item(sample, attention, gaps)


def _variants(count: int, variants: Variants) -> list[tuple[int, Attention]]:
    both: tuple[Attention, Attention] = ("block", "full")
    if variants == "both":
        return [(number, attention) for number in range(count) for attention in both]
    if variants == "alternate":
        return [(number, both[number % 2]) for number in range(count)]
    return [(number, variants) for number in range(count)]


def _packed(lengths: Sequence[int], pack_tokens: int | None) -> list[list[int]]:
    """Rows of items that stay within `pack_tokens`, in order: an item goes to the first open row it fits.

    Only the last few rows are open, so that samples that were mixed stay mixed and packing takes linear time.
    """
    if pack_tokens is None:
        return [[at] for at in range(len(lengths))]
    rows: list[list[int]] = []
    room: list[int] = []
    for at, length in enumerate(lengths):
        first = max(0, len(rows) - _OPEN_ROWS)
        fits = next((row for row in range(first, len(rows)) if room[row] >= length), None)
        if fits is None:
            rows.append([])
            room.append(pack_tokens)
            fits = len(rows) - 1
        rows[fits].append(at)
        room[fits] -= length
    return rows


_OPEN_ROWS = 8
