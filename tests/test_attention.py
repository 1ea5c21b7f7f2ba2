"""The block mask, token by token: one prompt, rows of several; as a tensor, for FlexAttention, as numbers."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.attention import TokenLayout, additive_mask, block_mask, flex_mask, layout_mask
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


# -- Rows of several prompts --------------------------------------------------------------------------------------

# A prompt: its shared blocks as (tokens, local), and the tokens of its branches.
Prompt = tuple[list[tuple[int, bool]], list[int]]
PROMPTS = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=3),
        st.lists(st.integers(1, 4), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
)


def rows_of(
    rows: list[list[Prompt]], *, gap: int = 0
) -> tuple[TokenLayout, list[list[tuple[int, int, int, int] | None]]]:
    """The layout of some rows, and of each token (prompt, block, branch, position), None for padding.

    Every branch starts where the shared blocks end; `gap` positions are left out behind each of them.
    """
    tokens: list[list[tuple[int, int, int, int] | None]] = []
    local: list[list[bool]] = []
    for prompts in rows:
        row: list[tuple[int, int, int, int] | None] = []
        is_local: list[bool] = []
        block = 0
        for prompt, (shared, branches) in enumerate(prompts):
            position = 0
            blocks = [(count, alone, 0) for count, alone in shared]
            blocks += [(count, False, number) for number, count in enumerate(branches, start=1)]
            for count, alone, branch in blocks:
                row += [(prompt, block, branch, position + at) for at in range(count)]
                is_local += [alone] * count
                position += count + gap if branch == 0 else 0
                block += 1
        tokens.append(row)
        local.append(is_local)
    longest = max(map(len, tokens))
    tokens = [row + [None] * (longest - len(row)) for row in tokens]
    columns = [[[-1 if token is None else token[at] for token in row] for row in tokens] for at in range(4)]
    padded = [row + [False] * (longest - len(row)) for row in local]
    prompt, block, branch, position = (torch.tensor(values) for values in columns)
    return TokenLayout(prompt, block, branch.clamp(min=0), torch.tensor(padded), position.clamp(min=0)), tokens


def naive_row(
    tokens: list[tuple[int, int, int, int] | None], local: list[bool], window: int | None
) -> list[list[bool]]:
    """The rule, one pair of tokens at a time."""

    def sees(row: int, column: int) -> bool:
        query, key = tokens[row], tokens[column]
        if column > row or (query is None) != (key is None):
            return False
        if query is None or key is None:
            return True
        if window is not None and query[3] - key[3] >= window:
            return False
        if query[1] == key[1]:
            return True
        return query[0] == key[0] and not local[row] and key[2] in (0, query[2])

    return [[sees(row, column) for column in range(len(tokens))] for row in range(len(tokens))]


@settings(max_examples=80, deadline=None)
@given(rows=st.lists(PROMPTS, min_size=1, max_size=3), window=st.none() | st.integers(1, 9), gap=st.integers(0, 3))
def test_every_pair_of_a_row_follows_the_rule(rows: list[list[Prompt]], window: int | None, gap: int) -> None:
    layout, tokens = rows_of(rows, gap=gap)
    mask = layout_mask(layout, window=window)
    unpadded = window is None or all(None not in row for row in tokens)
    for number, row in enumerate(tokens):
        expected = torch.tensor(naive_row(row, layout.local[number].tolist(), window))
        there = torch.tensor([token is not None for token in row])
        assert torch.equal(mask[number][there], expected[there])
        assert not unpadded or torch.equal(mask[number], expected)
    assert bool(mask.any(-1).all()), "no row of a softmax is empty"


def test_golden_branches() -> None:
    """Two questions about one passage, then a prompt of its own, then padding."""
    layout, _ = rows_of([[([(1, True), (1, True)], [1, 2]), ([], [1])], [([], [7])]])
    assert layout_mask(layout)[0].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert layout.position[0].tolist() == [0, 1, 2, 2, 3, 0, 0]


@pytest.mark.parametrize("window", [None, 3])
def test_each_branch_sees_what_its_prompt_alone_would_show_it(window: int | None) -> None:
    """Cut out of a packed row, a prompt with one of its branches has the mask of inference."""
    prompts: list[Prompt] = [([(3, True), (5, True)], [2, 4]), ([(4, False)], [3, 1])]
    layout, tokens = rows_of([prompts])
    mask = layout_mask(layout, window=window)[0]
    for prompt, (shared, branches) in enumerate(prompts):
        for branch, count in enumerate(branches, start=1):
            kept = [
                at for at, token in enumerate(tokens[0]) if token and token[0] == prompt and token[2] in (0, branch)
            ]
            alone = block_mask(
                [*(n for n, _ in shared), count], [*(is_local for _, is_local in shared), False], window=window
            )
            assert torch.equal(mask[kept][:, kept], alone)


@settings(max_examples=20, deadline=None)
@given(rows=st.lists(PROMPTS, min_size=1, max_size=3), window=st.none() | st.integers(1, 9), gap=st.integers(0, 3))
def test_flex_attention_gets_the_same_rule(rows: list[list[Prompt]], window: int | None, gap: int) -> None:
    from torch.nn.attention.flex_attention import create_mask

    layout, _ = rows_of(rows, gap=gap)
    count, tokens = layout.block.shape
    flexible = flex_mask(layout, window=window)
    mask = create_mask(flexible.mask_mod, count, 1, tokens, tokens, device="cpu")
    assert torch.equal(mask[:, 0], layout_mask(layout, window=window))


def test_flex_blocks_that_nobody_sees_are_skipped() -> None:
    """Two passages of a block of tokens each: the second does not look at the first, the question looks at both."""
    flexible = flex_mask(TokenLayout.of_segments([128, 128, 128]))
    assert flexible.to_dense()[0, 0].tolist() == [[1, 0, 0], [0, 1, 0], [1, 1, 1]]
    assert flexible.sparsity() == pytest.approx(100 * 4 / 9)


def test_flex_attention_computes_what_the_dense_mask_computes() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    layout, _ = rows_of([[([(40, True), (50, True)], [30, 8])], [([(20, False)], [9])]])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 2, layout.block.shape[1], 16, generator=generator) for _ in range(3))
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=layout_mask(layout, window=60)[:, None]
    )
    with warnings.catch_warnings():
        # It says that it is slow without being compiled.
        warnings.simplefilter("ignore")
        actual = flex_attention(query, key, value, block_mask=flex_mask(layout, window=60))
    assert (actual - expected).abs().max() <= 1e-5


def test_a_layout_moves_with_all_its_tensors() -> None:
    layout = TokenLayout.of_segments([2, 1], device=torch.device("cpu"))
    assert layout.to(None).block.tolist() == [[0, 0, 1]]
    assert {getattr(layout.to(torch.device("meta")), name).device.type for name in layout.__slots__} == {"meta"}
