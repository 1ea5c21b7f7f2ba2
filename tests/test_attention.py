"""The block mask, token by token, and as numbers to add."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.attention import additive_mask, block_mask
from blockrag.errors import InputError


def naive(lengths: list[int], local: list[bool], window: int | None) -> list[list[bool]]:
    """The definition, one pair of tokens at a time."""
    owner = [index for index, length in enumerate(lengths) for _ in range(length)]
    return [
        [
            column <= row
            and (window is None or column > row - window)
            and (not local[owner[row]] or owner[row] == owner[column])
            for column in range(len(owner))
        ]
        for row in range(len(owner))
    ]


def test_golden_example() -> None:
    expected = [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [1, 1, 1, 1]]
    mask = block_mask([1, 2, 1])
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == expected


def test_golden_conversation() -> None:
    """Passage, question, passage, question: the second passage does not see the first question."""
    mask = block_mask([1, 1, 1, 2], [True, False, True, False])
    assert mask.int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 1],
    ]


def test_golden_window() -> None:
    assert block_mask([3, 2], window=2).int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 1, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


@settings(max_examples=150, deadline=None)
@given(
    segments=st.lists(st.tuples(st.integers(0, 6), st.booleans()), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 8),
)
def test_every_pair_follows_the_definition(segments: list[tuple[int, bool]], window: int | None) -> None:
    lengths, local = [n for n, _ in segments], [is_local for _, is_local in segments]
    assert block_mask(lengths, local, window=window).tolist() == naive(lengths, local, window)
    if window is not None and window >= sum(lengths):
        assert torch.equal(block_mask(lengths, local, window=window), block_mask(lengths, local))


def test_one_global_segment_is_causal_attention() -> None:
    assert torch.equal(block_mask([5]), torch.ones(5, 5).tril().bool())
    assert torch.equal(block_mask([2, 3], [False, False]), torch.ones(5, 5).tril().bool())


def test_every_token_sees_itself() -> None:
    assert bool(block_mask([3, 1, 4, 2], window=1).diagonal().all())


@pytest.mark.parametrize(
    ("lengths", "local"),
    [([], None), ([], []), ([1, 2], [True]), ([1], [True, False]), ([2, -1, 3], None)],
)
def test_malformed_segments_are_refused(lengths: list[int], local: list[bool] | None) -> None:
    with pytest.raises(InputError, match="one non-negative length per segment"):
        block_mask(lengths, local)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_mask(dtype: torch.dtype) -> None:
    mask = block_mask([1, 2])
    added = additive_mask(mask, dtype)
    assert added.dtype == dtype
    assert bool((added[mask] == 0).all())
    assert bool((added[~mask] == torch.finfo(dtype).min).all())
    weights = (torch.randn(3, 3).to(dtype) + added).float().softmax(-1)
    assert bool((weights[~mask] == 0).all())
    assert not weights.isnan().any()
