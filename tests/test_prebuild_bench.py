"""The benchmark of prebuilding: that it measures what it says, on a tiny model. No times are judged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
from test_exactness import prompt_of

from blockrag.errors import InputError
from blockrag.evaluation.prebuild import measure_prebuild
from blockrag.model.block_model import BlockModel
from blockrag.prompt import Block
from blockrag.stores import MemoryStore

Make = Callable[..., BlockModel]


class NotingStore(MemoryStore):
    """A memory store that notes what was written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[str] = []

    def put(self, key: str, data: bytes | bytearray | memoryview) -> None:
        self.written.append(key)
        super().put(key, data)


def test_every_block_is_computed_in_every_run_and_nothing_stays(make_model: Make) -> None:
    model, store = make_model(), NotingStore()
    other = prompt_of((5,), 4, seed=9).blocks[0]
    model.materialize([other], store)
    blocks = prompt_of((7, 12, 9, 1), 4).local_blocks
    rows: list[int] = []
    hook = model.model.lm_head.register_forward_hook(lambda module, inputs, _: rows.append(inputs[0].shape[1]))
    try:
        times = measure_prebuild(model, [*blocks, blocks[0]], store, budgets=(16, 64), repeats=2)
    finally:
        hook.remove()

    assert (times.blocks, times.tokens) == (4, 29)
    assert times.bytes_at_rest == _bytes(model, blocks)
    assert len(store.written) == 1 + 4 * 3, "a run to warm up, and two"
    assert list(store.keys()) == [model.block_key(other.token_ids)], "other blocks are left alone"
    assert rows == [7, 12, 9, 1] * 3, "one passage at a time runs the head over all its tokens"
    assert [len(runs) for runs in (times.prebuild, times.one_by_one, *times.batched.values())] == [2] * 4
    assert times.padded_tokens[16] == 29
    assert times.padded_tokens[64] >= 29
    fastest = min(sample.wall_s for sample in times.prebuild)
    assert times.tokens_per_s == 29 / fastest
    assert times.over_one_by_one == min(sample.wall_s for sample in times.one_by_one) / fastest
    assert times.of_batched == min(s.wall_s for runs in times.batched.values() for s in runs) / fastest


def _bytes(model: BlockModel, blocks: Sequence[Block]) -> int:
    store = MemoryStore()
    model.materialize(blocks, store)
    return store.stats().bytes


@pytest.mark.parametrize("arguments", [{"budgets": ()}, {"budgets": (0,)}, {"repeats": 0}])
def test_nothing_to_measure_is_refused(make_model: Make, arguments: dict[str, Any]) -> None:
    model = make_model()
    with pytest.raises(InputError, match="nothing to measure"):
        measure_prebuild(model, prompt_of((3,), 4).local_blocks, MemoryStore(), **arguments)
    with pytest.raises(InputError, match="0 blocks"):
        measure_prebuild(model, [], MemoryStore())
