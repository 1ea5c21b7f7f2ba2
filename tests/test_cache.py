"""The growing cache layers against transformers' own, step by step; the pool their buffer comes from."""

from __future__ import annotations

import os
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_exactness import LENGTHS, QUERY, prompt_of
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from blockrag.kv import KVLayout, LayerShape
from blockrag.model.block_model import BlockModel
from blockrag.model.cache import GrowingLayer, GrowingSlidingLayer, LayerStructure, PromptCache
from blockrag.model.pool import BufferPool, memory_share
from blockrag.prompt import Block

Make = Callable[..., BlockModel]
CPU = torch.device("cpu")
HEADS, DIM = 2, 4


def room(capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Room filled with NaN: a read of what was never written shows."""
    shape = (1, HEADS, capacity, DIM)
    return torch.full(shape, float("nan")), torch.full((1, 1, capacity, 3), float("nan"))


def states(tokens: int, generator: torch.Generator, batch: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.randn(batch, HEADS, tokens, DIM, generator=generator)
    return keys, torch.randn(batch, 1, tokens, 3, generator=generator)


def pair_of(window: int | None, capacity: int) -> tuple[Any, Any]:
    """Our layer, and transformers'."""
    if window is None:
        return GrowingLayer(*room(capacity)), DynamicLayer()
    return GrowingSlidingLayer(*room(capacity), window=window), DynamicSlidingWindowLayer(sliding_window=window)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 12)),
        st.tuples(st.just("repeat"), st.integers(1, 3)),
        st.tuples(st.just("reorder"), st.integers(0, 100)),
        st.tuples(st.just("select"), st.integers(0, 100)),
    ),
    min_size=1,
    max_size=14,
)


@settings(max_examples=150, deadline=None)
@given(window=st.none() | st.integers(2, 9), capacity=st.integers(1, 30), steps=STEPS, seed=st.integers(0, 100))
def test_step_by_step_as_transformers(
    window: int | None, capacity: int, steps: list[tuple[str, int]], seed: int
) -> None:
    """Same states handed out, same mask sizes, same lengths, whatever the room and through beam search."""
    ours, theirs = pair_of(window, capacity)
    generator = torch.Generator().manual_seed(seed)
    batch = 1
    for step, number in steps:
        if step == "update":
            assert ours.get_mask_sizes(number) == theirs.get_mask_sizes(number)
            keys, values = states(number, generator, batch)
            got, expected = ours.update(keys, values), theirs.update(keys, values)
            assert torch.equal(got[0], expected[0])
            assert torch.equal(got[1], expected[1])
            assert got[0].shape[-2] == expected[0].shape[-2]
        elif not theirs.get_seq_length():
            continue
        elif step == "repeat":
            if batch * number <= 6:
                batch *= number
                ours.batch_repeat_interleave(number)
                theirs.batch_repeat_interleave(number)
        elif step == "reorder":
            order = torch.randint(0, batch, (batch,), generator=torch.Generator().manual_seed(number))
            ours.reorder_cache(order)
            theirs.reorder_cache(order)
        else:
            chosen = torch.randperm(batch, generator=torch.Generator().manual_seed(number))[: max(1, batch - 1)]
            batch = len(chosen)
            ours.batch_select_indices(chosen)
            theirs.batch_select_indices(chosen)
        assert ours.get_seq_length() == theirs.get_seq_length()


@settings(max_examples=80, deadline=None)
@given(
    window=st.none() | st.integers(2, 9),
    capacity=st.integers(1, 40),
    first=st.integers(1, 8),
    removed=st.integers(0, 8),
    then=st.integers(1, 12),
)
def test_crop_as_transformers(window: int | None, capacity: int, first: int, removed: int, then: int) -> None:
    ours, theirs = pair_of(window, capacity)
    if window is not None:
        theirs.activate_past_recording()
    generator = torch.Generator().manual_seed(0)
    keys, values = states(first, generator)
    ours.update(keys, values)
    theirs.update(keys, values)
    removed = min(removed, first - 1)
    try:
        ours.crop(-removed)
    except RuntimeError:
        # Refused only where tokens that the window reaches are gone; transformers recorded them on request.
        assert capacity < first or ours._skipped
        return
    theirs.crop(-removed)
    assert ours.get_seq_length() == first - removed
    assert ours.get_mask_sizes(then) == theirs.get_mask_sizes(then)
    keys, values = states(then, generator)
    got, expected = ours.update(keys, values), theirs.update(keys, values)
    assert torch.equal(got[0], expected[0])
    assert torch.equal(got[1], expected[1])


def test_a_crop_that_would_be_wrong_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = GrowingSlidingLayer(*room(8), window=4)
    layer.update(*states(6, generator))
    layer.update(*states(4, generator))  # drops all but three of the first six
    layer.crop(-4)
    with pytest.raises(RuntimeError, match="cannot forget 1 of the 3 tokens"):
        layer.crop(-1)
    assert layer.get_seq_length() == 6, "a refused crop changes nothing"
    layer.crop(0)
    assert layer.get_mask_sizes(1) == (4, 3)


@pytest.mark.parametrize("window", [None, 4])
def test_crop_takes_a_negative_number(window: int | None) -> None:
    """A positive one meant the final length in older releases: never guess."""
    layer, _ = pair_of(window, 8)
    layer.update(*states(5, torch.Generator().manual_seed(0)))
    with pytest.raises(ValueError, match=r"crop\(2\)"):
        layer.crop(2)
    assert layer.get_seq_length() == 5
    layer.crop(-9)
    assert layer.get_seq_length() == 0


@pytest.mark.parametrize("window", [None, 4])
def test_reset_starts_over_in_the_same_room(window: int | None) -> None:
    layer, fresh = pair_of(window, 8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        layer.update(*states(3, generator))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.get_mask_sizes(3) == fresh.get_mask_sizes(3) == (3, 0)
    keys, values = states(3, generator)
    got = layer.update(keys, values)
    assert torch.equal(got[0], keys)
    assert torch.equal(got[1], values)


def test_growing_within_the_room_moves_nothing() -> None:
    layer = GrowingLayer(*room(10))
    generator = torch.Generator().manual_seed(0)
    place = layer.update(*states(4, generator))[0].data_ptr()
    assert layer.update(*states(6, generator))[0].data_ptr() == place
    assert layer.update(*states(1, generator))[0].data_ptr() != place, "the eleventh token needs a larger room"
    moved = layer._key_room.data_ptr()
    for _ in range(50):
        layer.update(*states(1, generator))
    assert layer._key_room.data_ptr() == moved, "which has room for many more"


def test_a_windowed_layer_never_outgrows_its_window() -> None:
    layer = GrowingSlidingLayer(*room(16), window=8)
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        layer.update(*states(1, generator))
    assert layer._rows._key_room.shape[2] == 16
    assert layer.get_seq_length() == 200


def test_a_window_of_one_token_keeps_nothing() -> None:
    """The layer drops everything when its room is full, and hands out the new tokens alone."""
    generator = torch.Generator().manual_seed(0)
    layer = GrowingSlidingLayer(*room(3), window=1)
    for number in range(7):
        keys, values = states(1, generator)
        assert layer.get_mask_sizes(1) == (1, number)
        assert torch.equal(layer.update(keys, values)[0], keys)


@settings(max_examples=60, deadline=None)
@given(window=st.integers(2, 9), tokens=st.integers(1, 40), then=st.lists(st.integers(1, 10), max_size=5))
def test_skipping_what_no_window_reaches(window: int, tokens: int, then: list[int]) -> None:
    """Composing counts a long prompt's first tokens as seen: from then on all is as if they had been held."""
    generator = torch.Generator().manual_seed(0)
    keys, values = states(tokens, generator)
    whole = DynamicSlidingWindowLayer(sliding_window=window)
    whole.update(keys, values)
    unseen = max(0, tokens - (window - 1))
    layer = GrowingSlidingLayer(*room(max(1, tokens - unseen)), window=window)
    layer.skip(unseen)
    layer.update(keys[:, :, unseen:], values[:, :, unseen:])
    for number in then:
        assert layer.get_mask_sizes(number) == whole.get_mask_sizes(number)
        keys, values = states(number, generator)
        got, expected = layer.update(keys, values), whole.update(keys, values)
        assert torch.equal(got[0], expected[0])
        assert torch.equal(got[1], expected[1])
    assert layer.get_seq_length() == whole.get_seq_length()


@pytest.mark.parametrize("case", ["llama", "mistral", "gemma3"])
@pytest.mark.parametrize("beams", [2, 3])
def test_beam_search_on_a_composed_cache(make_model: Make, case: str, beams: int) -> None:
    """Over one global block the cache is a plain one: transformers' beam search gives what it gives without it."""
    model = make_model(case)
    ids = prompt_of((), 21).token_ids
    arguments: dict[str, Any] = {"num_beams": beams, "max_new_tokens": 12, "do_sample": False}
    tensor = torch.tensor([ids])
    mask = torch.ones_like(tensor)
    expected = model.model.generate(tensor, attention_mask=mask, **arguments)
    running = model.start()
    running.extend([Block(token_ids=ids[:-1], text="", local=False, kind="query")], room=2)  # and growth beyond it
    assert running.cache is not None
    running.cache.batch_repeat_interleave(beams)
    actual = model.model.generate(tensor, attention_mask=mask, past_key_values=running.cache, **arguments)
    assert actual.tolist() == expected.tolist()
    running.close()


@pytest.mark.parametrize("case", ["llama", "mistral"])
def test_beam_search_over_composed_blocks(make_model: Make, case: str) -> None:
    """Local blocks, three beams: as on transformers' own cache with the same states in it."""
    model = make_model(case)
    prompt = prompt_of(LENGTHS, QUERY)
    running = model.start()
    running.extend(prompt.local_blocks, room=4)
    assert isinstance(running.cache, PromptCache)
    plain = DynamicCache(config=model.model.config)
    for ours, theirs in zip(running.cache.kv_layers, plain.layers, strict=True):
        theirs.update(ours.keys.clone(), ours.values.clone())
        if hasattr(theirs, "cumulative_length"):
            theirs.cumulative_length = ours.get_seq_length()
    tensor = torch.tensor([prompt.token_ids])
    outputs = []
    for cache in (running.cache, plain):
        cache.batch_repeat_interleave(3)
        outputs.append(
            model.model.generate(
                tensor,
                attention_mask=torch.ones_like(tensor),
                past_key_values=cache,
                num_beams=3,
                max_new_tokens=10,
                do_sample=False,
            ).tolist()
        )
    assert outputs[0] == outputs[1]
    running.close()


# -- The pool --------------------------------------------------------------------------------------------------------


def test_a_buffer_is_used_again() -> None:
    pool = BufferPool()
    buffer = pool.acquire(1000, CPU)
    assert (buffer.dtype, buffer.numel(), pool.free_bytes) == (torch.uint8, 1000, 0)
    pool.release(buffer)
    assert pool.free_bytes == 1000
    again = pool.acquire(900, CPU)
    assert again.data_ptr() == buffer.data_ptr()
    assert pool.free_bytes == 0


def test_the_smallest_fitting_buffer_is_taken() -> None:
    pool = BufferPool()
    buffers = {size: pool.acquire(size, CPU) for size in (3000, 1000, 2000)}
    for buffer in buffers.values():
        pool.release(buffer)
    assert pool.acquire(1500, CPU).numel() == 2000
    assert pool.acquire(1500, CPU).numel() == 3000
    assert pool.acquire(1500, CPU).numel() == 1500, "the one left is too small"
    assert pool.free_bytes == 1000


def test_a_wastefully_large_buffer_is_left_for_others() -> None:
    pool = BufferPool()
    pool.release(pool.acquire(4 << 20, CPU))
    assert pool.acquire(1 << 20, CPU).numel() == 1 << 20
    assert pool.free_bytes == 4 << 20
    assert pool.acquire(2 << 20, CPU).numel() == 4 << 20


def test_the_cap_bounds_what_is_kept() -> None:
    pool = BufferPool(max_bytes=2500)
    buffers = [pool.acquire(1000, CPU) for _ in range(3)]
    for buffer in buffers:
        pool.release(buffer)
    assert pool.free_bytes == 2000
    nothing = BufferPool(max_bytes=0)
    nothing.release(nothing.acquire(10, CPU))
    assert nothing.free_bytes == 0


REQUESTS = st.lists(st.tuples(st.integers(1, 2000), st.booleans(), st.integers(0, 5)), max_size=40)


@settings(max_examples=150, deadline=None)
@given(requests=REQUESTS, max_bytes=st.integers(0, 5000), kept_bytes=st.none() | st.integers(0, 5000))
def test_whatever_is_asked_for_both_caps_hold(
    requests: list[tuple[int, bool, int]], max_bytes: int, kept_bytes: int | None
) -> None:
    """Sizes of all kinds, several prompts at a time, kept or not: never more than the caps, never one buffer twice."""
    pool = BufferPool(max_bytes, kept_bytes)
    most_kept = max_bytes if kept_bytes is None else min(kept_bytes, max_bytes)
    running: list[torch.Tensor] = []
    for nbytes, ends, key in requests:
        found = pool.take(key, lambda content: True)
        if found is not None:
            assert found[1] == key
        running.append(pool.acquire(nbytes, CPU) if found is None else found[0])
        assert len({buffer.data_ptr() for buffer in running}) == len(running)
        if ends:
            buffer = running.pop(0)
            pool.release(buffer, key=key or None, content=key)
        stats = pool.stats()
        assert stats.kept_bytes + stats.spare_bytes == pool.free_bytes <= max_bytes
        assert stats.kept_bytes <= most_kept


def test_a_kept_prompt_gives_way_only_when_it_must() -> None:
    """Room for three: a fourth takes the oldest one's memory; until then new memory is taken and all stay."""
    pool = BufferPool(max_bytes=3000)
    first = pool.acquire(1000, CPU)
    place = first.data_ptr()
    pool.release(first, key="a", content=1)
    for key in "bc":
        buffer = pool.acquire(1000, CPU)
        assert buffer.data_ptr() != place
        pool.release(buffer, key=key, content=2)
    assert pool.stats().kept_prompts == 3
    fourth = pool.acquire(1000, CPU)
    assert fourth.data_ptr() == place
    assert pool.take("a", lambda content: True) is None
    pool.release(fourth, key="d", content=3)
    assert [pool.take(key, lambda content: True) is not None for key in "bcd"] == [True] * 3


def test_buffers_in_reserve_go_before_kept_prompts() -> None:
    pool = BufferPool(max_bytes=2500)
    kept, spare, third = (pool.acquire(1000, CPU) for _ in range(3))
    pool.release(kept, key="a")
    pool.release(spare)
    pool.release(third, key="b")
    stats = pool.stats()
    assert (stats.kept_prompts, stats.spare_bytes, stats.max_bytes) == (2, 0, 2500)


def test_what_does_not_fit_stays() -> None:
    pool = BufferPool()
    pool.release(pool.acquire(1000, CPU), key="a", content="small")
    assert pool.take("a", lambda content: content == "large") is None
    found = pool.take("a", lambda content: content == "small")
    assert found is not None
    assert pool.take("a", lambda content: True) is None, "for one user"
    assert (pool.stats().hits, pool.stats().misses) == (1, 2)


@pytest.mark.parametrize("nbytes", [1, 4 << 20, (6 << 20) + 13])
def test_large_buffers_are_memory_like_any_other(nbytes: int) -> None:
    """From 4 MiB on they are mapped in large pages, where there are any."""
    buffer = BufferPool().acquire(nbytes, CPU)
    assert (buffer.numel(), buffer.dtype, buffer.is_contiguous()) == (nbytes, torch.uint8, True)
    assert buffer.data_ptr() % 64 == 0
    buffer.fill_(7)
    view = buffer[nbytes // 2 :]
    del buffer
    assert bool((view == 7).all()), "alive as long as a view of it"


def test_the_share_of_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("blockrag.model.pool._CGROUP_LIMIT", limit)
    assert memory_share(CPU) == min(4 << 30, physical // 8)
    for text, expected in (("max", physical), (f"{2 << 30}", 2 << 30), (f"{1 << 62}", physical)):
        limit.write_text(f"{text}\n")
        assert memory_share(CPU) == min(4 << 30, expected // 8)


def test_a_buffer_of_another_device_is_not_handed_out() -> None:
    pool = BufferPool()
    pool.release(torch.empty(1000, dtype=torch.uint8, device="meta"))
    assert pool.acquire(1000, CPU).device == CPU


def test_threads_never_share_a_buffer() -> None:
    pool = BufferPool()
    clashes: list[int] = []

    def work(number: int) -> None:
        rng = random.Random(number)
        for _ in range(300):
            buffer = pool.acquire(rng.randrange(500, 1000), CPU)
            buffer.fill_(number)
            if not bool((buffer == number).all()):
                clashes.append(number)
            pool.release(buffer)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not clashes
    held = [pool.acquire(1, CPU) for _ in range(20)]
    assert len({buffer.data_ptr() for buffer in held}) == 20


# -- The prompt's cache ----------------------------------------------------------------------------------------------


def prompt_cache(pool: BufferPool, *, capacity: int = 10, skipped: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    layout = KVLayout((LayerShape(2, 4, 2, 4), LayerShape(1, 6, 3, 2)))
    structure = LayerStructure(num_layers=3, indices=(0, 2), windows=(None, 4))
    return PromptCache(layout, structure, capacity=capacity, skipped=skipped, dtype=dtype, device=CPU, pool=pool)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_lie_side_by_side_in_one_buffer(dtype: torch.dtype) -> None:
    cache = prompt_cache(BufferPool(), dtype=dtype)
    start, end = cache._buffer.data_ptr(), cache._buffer.data_ptr() + cache.nbytes
    spans = []
    for layer in cache.kv_layers:
        keys, values = layer.extend(10)
        for number, view in enumerate((keys, values)):
            assert view.dtype == dtype
            assert start <= view.data_ptr()
            assert view.data_ptr() + view.numel() * dtype.itemsize <= end
            assert (view.data_ptr() - start) % 64 == 0
            view.fill_(len(spans) + 1)
            spans.append((layer, number))
    for number, (layer, part) in enumerate(spans):
        assert bool(((layer.keys, layer.values)[part] == number + 1).all()), "no view writes into another"
    assert cache.num_tokens == 10


def test_a_windowed_layer_has_no_room_for_what_is_skipped() -> None:
    assert prompt_cache(BufferPool(), capacity=100, skipped=90).nbytes < prompt_cache(BufferPool(), capacity=100).nbytes


def test_release_gives_the_buffer_back_once() -> None:
    pool = BufferPool()
    cache = prompt_cache(pool)
    size = cache.nbytes
    cache.release()
    cache.release()
    assert pool.free_bytes == size, "twice would hand one buffer to two prompts"
    assert cache.nbytes == 0
    first, second = prompt_cache(pool), prompt_cache(pool)
    assert first._buffer.data_ptr() != second._buffer.data_ptr()
