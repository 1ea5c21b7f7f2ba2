"""`BlockKV` and `KVLayout`: where each layer's keys and values lie in the one tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import InputError
from blockrag.kv import BlockKV, KVLayout, LayerShape

EQUAL = KVLayout((LayerShape(2, 4, 2, 4),) * 3)
# Latent attention, several head sizes, a layer with one head.
RAGGED = KVLayout((LayerShape(1, 6, 1, 2), LayerShape(3, 4, 2, 5), LayerShape(4, 1, 1, 8)))


def test_layer_shape_counts_elements() -> None:
    shape = LayerShape(3, 4, 2, 5)
    assert (shape.key_size, shape.value_size, shape.size) == (12, 10, 22)


def test_layout_arithmetic() -> None:
    assert EQUAL.num_layers == 3
    assert EQUAL.elements_per_token == 3 * 2 * 2 * 4
    assert EQUAL.offsets == (0, 16, 32)
    assert RAGGED.offsets == (0, 8, 30)
    assert RAGGED.elements_per_token == 8 + 22 + 12
    assert RAGGED.nbytes(5, 2) == 42 * 5 * 2


def test_equal_layouts_are_one_key() -> None:
    again = KVLayout(tuple(LayerShape(2, 4, 2, 4) for _ in range(3)))
    assert again == EQUAL
    assert hash(again) == hash(EQUAL)
    assert len({again, EQUAL, RAGGED}) == 2


def test_equal_layers_are_a_plain_contiguous_tensor() -> None:
    tokens = 5
    data = torch.arange(EQUAL.elements_per_token * tokens, dtype=torch.float32)
    kv = BlockKV(EQUAL, tokens, data)
    dense = data.view(3, 2, 2, tokens, 4)
    for layer in range(3):
        assert torch.equal(kv.keys(layer), dense[layer, 0])
        assert torch.equal(kv.values(layer), dense[layer, 1])


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.builds(LayerShape, *(st.integers(1, 4) for _ in range(4))), min_size=1, max_size=5),
    tokens=st.integers(1, 6),
)
def test_views_cover_the_tensor_exactly_once(shapes: list[LayerShape], tokens: int) -> None:
    layout = KVLayout(tuple(shapes))
    data = torch.arange(layout.elements_per_token * tokens)
    kv = BlockKV(layout, tokens, data)
    pieces = []
    for layer, shape in enumerate(shapes):
        assert kv.keys(layer).shape == (shape.key_heads, tokens, shape.key_dim)
        assert kv.values(layer).shape == (shape.value_heads, tokens, shape.value_dim)
        pieces += [kv.keys(layer).reshape(-1), kv.values(layer).reshape(-1)]
    assert torch.equal(torch.cat(pieces), data), "layer after layer, keys before values, nothing between"


def test_views_share_the_memory() -> None:
    kv = BlockKV(RAGGED, 2, torch.zeros(84))
    start = kv.data.data_ptr()
    assert kv.keys(1).data_ptr() == start + 8 * 2 * 4
    assert kv.values(1).data_ptr() == start + (8 + 12) * 2 * 4
    assert kv.values(2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nbytes(dtype: torch.dtype) -> None:
    kv = BlockKV(RAGGED, 3, torch.zeros(126, dtype=dtype))
    assert kv.nbytes == 126 * dtype.itemsize == RAGGED.nbytes(3, dtype.itemsize)


@pytest.mark.parametrize(
    ("tokens", "shape"),
    [(2, (83,)), (2, (85,)), (2, (2, 42)), (3, (84,)), (0, (0,)), (-1, (0,)), (2, ())],
)
def test_another_shape_is_refused(tokens: int, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"one-dimensional tensor of -?\d+ elements.*same KVLayout"):
        BlockKV(RAGGED, tokens, torch.zeros(shape))


def test_layouts_compare_by_value() -> None:
    assert KVLayout((LayerShape(1, 2, 1, 2),)) == KVLayout((LayerShape(1, 2, 1, 2),))
    assert EQUAL != RAGGED
    assert len({EQUAL, KVLayout(EQUAL.layers)}) == 1
