"""Samples to rows: nothing is lost, nothing is too long, and the seed alone says what stands where."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import DataError, InputError
from blockrag.finetune.rows import Rows
from blockrag.finetune.samples import Branch, Ids, Sample

MARKER = 2


def make_samples(lengths: list[int], *, blocks: int = 2) -> list[Sample]:
    """Samples of so many tokens; block 0 opens with a marker of two tokens, and the first token is the number."""
    return [
        Sample(
            blocks=tuple(Ids("i", [number] * (4 if at == 0 else 1)) for at in range(blocks)),
            branches=(Branch(Ids("i", [number] * (length - 4 - blocks)), Ids("i", [number])),),
            marker=(1, 1 + MARKER),
            where=f"line {number}",
        )
        for number, length in enumerate(lengths)
    ]


def drawn() -> list[tuple[str, str, tuple[int, ...]]]:
    """What the seed decides: order, rows, attentions, gaps."""
    rows = Rows(make_samples(list(range(8, 60))), pack_tokens=90, max_gap=50, seed=7)
    return [(item.sample.where, item.attention, item.gaps) for row in rows for item in row]


def held(rows: Rows) -> list[tuple[int, str]]:
    return [(item.sample.blocks[0][0], item.attention) for row in rows for item in row]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(8, 40), min_size=1, max_size=60),
    variants=st.sampled_from(["both", "alternate", "block", "full"]),
    order=st.sampled_from(["shuffled", "file"]),
    pack=st.none() | st.integers(40, 90),
)
def test_every_sample_stands_in_its_attentions_once_and_no_row_is_too_long(
    lengths: list[int], variants: str, order: str, pack: int | None
) -> None:
    rows = Rows(make_samples(lengths), variants=variants, pack_tokens=pack, order=order, seed=3)
    numbers = range(len(lengths))
    expected = {
        "both": [(number, attention) for number in numbers for attention in ("block", "full")],
        "alternate": [(number, ("block", "full")[number % 2]) for number in numbers],
        "block": [(number, "block") for number in numbers],
        "full": [(number, "full") for number in numbers],
    }[variants]
    assert Counter(held(rows)) == Counter(expected)
    assert len(rows) == len(list(rows))
    if pack is None:
        assert len(rows) == len(expected)
        assert order == "shuffled" or held(rows) == expected
    else:
        assert all(sum(item.sample.num_tokens for item in row) <= pack for row in rows)
    assert rows.lengths() == [sum(item.sample.num_tokens for item in row) for row in rows]


def test_packing_fills_rows() -> None:
    rng = random.Random(0)
    lengths = [rng.randint(8, 60) for _ in range(600)]
    rows = Rows(make_samples(lengths), variants="block", pack_tokens=120)
    assert sum(lengths) / (len(rows) * 120) > 0.9


def test_packing_keeps_mixed_samples_mixed() -> None:
    """An item is at most eight rows away from where it was drawn, so that a curriculum survives packing."""
    rng = random.Random(1)
    rows = Rows(make_samples([rng.randint(8, 60) for _ in range(400)]), variants="block", pack_tokens=120, order="file")
    newest = -1
    for row in rows:
        numbers = [item.sample.blocks[0][0] for item in row]
        assert numbers == sorted(numbers)
        newest = max(newest, numbers[0])
        assert numbers[0] > newest - 60


def test_full_attention_has_no_marker() -> None:
    rows = Rows(make_samples([12]), variants="both", order="file")
    block, full = (item for row in rows for item in row)
    assert len(block.sample.blocks[0]) == 4
    assert len(full.sample.blocks[0]) == 4 - MARKER
    assert sum(rows.lengths()) == 12 + 12 - MARKER


def test_shuffling_mixes_and_the_seed_decides() -> None:
    samples = make_samples([10] * 50)
    first, again, other = (held(Rows(samples, seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != held(Rows(samples, order="file"))


def test_gaps_are_left_out_in_half_of_the_items_and_within_bounds() -> None:
    samples = make_samples([12] * 300, blocks=3)
    items = [item for row in Rows(samples, variants="block", max_gap=90, seed=4) for item in row]
    moved = [item for item in items if any(item.gaps)]
    assert 100 < len(moved) < 190
    assert all(len(item.gaps) == 3 and sum(item.gaps) <= 90 and min(item.gaps) >= 0 for item in items if item.gaps)
    assert max(sum(item.gaps) for item in moved) > 50
    assert not any(item.gaps for row in Rows(samples, variants="block") for item in row)


def test_longest_counts_what_block_attention_saw() -> None:
    """Most blocks and most positions, by hand: 5 + 3 tokens of blocks, gaps, and a question with its answer."""
    samples = [
        Sample((Ids("i", [1] * 5), Ids("i", [1] * 3)), (Branch(Ids("i", [2] * 4), Ids("i", [3])),), (0, 0), "line 1"),
        Sample((Ids("i", [1] * 2),) * 6, (Branch(Ids("i", [2]), Ids("i", [3])),), (0, 0), "line 2"),
        Sample((Ids("i", [1]),), (Branch(Ids("i", [2] * 2), Ids("i", [3] * 9)),) * 3, (0, 0), "line 3"),
    ]
    assert Rows(samples, variants="block").longest() == (6, 14)
    assert Rows(samples, variants="alternate").longest() == (2, 13)
    rows = Rows(samples, variants="block", max_gap=100, seed=2)
    assert rows.longest()[1] == max(
        item.sample.shared_tokens + sum(item.gaps) + max(map(len, item.sample.branches)) for row in rows for item in row
    )
    assert rows.longest()[1] > 14


def test_nothing_to_train_on_and_unknown_values_are_refused() -> None:
    with pytest.raises(DataError, match="no sample to train on"):
        Rows([])
    for changes in ({"variants": "none"}, {"order": "backwards"}):
        with pytest.raises(InputError, match=next(iter(changes.values()))):
            Rows(make_samples([10]), **changes)
