"""The pool of hot blocks and the placement that uses it: what is found, what gives way, and that nothing is read late.

Without a CUDA device everything but the streams runs here: copies are over at once, the kernel is interpreted.
"""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import InputError
from blockrag.kernels.device import Link
from blockrag.kernels.place import Rows
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.model.device_pool import DevicePool
from blockrag.rope import RopeSpec, rotate_

HALF = RopeSpec("half", 0, 8, (1.0, 0.5, 0.25, 0.125))


def filled(pool: DevicePool[str], key: str, nbytes: int) -> bool:
    lease = pool.reserve(key, nbytes)
    if lease is None:
        return False
    lease.memory.fill_(ord(key[0]))
    lease.publish(f"content of {key}")
    lease.release()
    return True


def test_a_block_is_found_with_its_bytes_and_content():
    pool: DevicePool[str] = DevicePool(4096, "cpu")
    assert pool.find("a") is None
    assert filled(pool, "a", 1000)
    lease = pool.find("a")
    assert lease is not None
    assert lease.content == "content of a"
    assert lease.memory.tolist() == [ord("a")] * 1000
    assert (pool.stats().hits, pool.stats().misses, pool.stats().blocks, pool.stats().bytes) == (1, 1, 1, 1000)


def test_nobody_finds_a_block_that_is_being_copied():
    pool: DevicePool[str] = DevicePool(4096, "cpu")
    lease = pool.reserve("a", 100)
    assert lease is not None
    assert pool.find("a") is None
    assert pool.reserve("a", 100) is None
    lease.publish("done")
    assert pool.find("a") is not None


def test_a_reservation_that_is_dropped_leaves_nothing():
    pool: DevicePool[str] = DevicePool(4096, "cpu")
    lease = pool.reserve("a", 4096)
    assert lease is not None
    del lease
    gc.collect()
    assert pool.stats().blocks == 0
    assert filled(pool, "b", 4096)


def test_the_least_recently_used_gives_way():
    pool: DevicePool[str] = DevicePool(3 * 1024, "cpu")
    for key in "abc":
        assert filled(pool, key, 1024)
    assert pool.find("a") is not None
    assert filled(pool, "d", 1024)
    assert [key for key in "abcd" if pool.find(key) is not None] == ["a", "c", "d"]
    assert pool.stats().evictions == 1


def test_what_is_in_use_stays():
    pool: DevicePool[str] = DevicePool(2048, "cpu")
    assert filled(pool, "a", 1024)
    assert filled(pool, "b", 1024)
    used = pool.find("a")
    assert filled(pool, "c", 1024)
    assert pool.find("b") is None
    assert not filled(pool, "d", 2048)
    assert used is not None
    assert used.memory.tolist() == [ord("a")] * 1024
    pool.clear()
    assert pool.stats().blocks == 1
    used.release()
    used.release()
    assert filled(pool, "d", 2048)


def test_what_never_fits_drives_nobody_out():
    pool: DevicePool[str] = DevicePool(2048, "cpu")
    assert filled(pool, "a", 1024)
    assert not filled(pool, "b", 2049)
    assert pool.find("a") is not None
    with pytest.raises(InputError, match="255 bytes"):
        DevicePool(255, "cpu")


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 2500), st.booleans()), max_size=40))
def test_memory_of_blocks_never_overlaps(steps):
    pool: DevicePool[str] = DevicePool(8192, "cpu")
    held = []
    for number, nbytes, keep in steps:
        lease = pool.reserve(f"{number}", nbytes)
        if lease is None:
            continue
        lease.memory.fill_(number)
        lease.publish("there")
        if keep:
            held.append((number, lease))
        else:
            lease.release()
        if len(held) > 3:
            held.pop(0)[1].release()
        for mine, other in held:
            assert bool((other.memory == mine).all())
    for key in range(10):
        found = pool.find(f"{key}")
        assert found is None or bool((found.memory == key).all())
    for _, lease in held:
        lease.release()
    del found
    pool.clear()
    assert filled(pool, "all of it", 8192)


def test_threads_share_a_pool():
    pool: DevicePool[str] = DevicePool(16 * 256, "cpu")
    wrong: list[str] = []

    def work(seed: int) -> None:
        for step in range(150):
            key = chr(65 + (seed * 7 + step * 3) % 26)
            lease = pool.find(key)
            if lease is None:
                filled(pool, key, 256)
            elif not bool((lease.memory == ord(key)).all()):
                wrong.append(key)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.stats().bytes <= 16 * 256


class PinnedLink(Link):
    """Host memory as a device sees pinned memory; notes the copies."""

    def __init__(self, pinned: bool) -> None:
        super().__init__(torch.device("cpu"))
        self.pinned = pinned
        self.copies: list[int] = []

    def is_pinned(self, memory: torch.Tensor) -> bool:
        return self.pinned

    def fetch(self, source: torch.Tensor, target: torch.Tensor) -> None:
        self.copies.append(source.numel())
        super().fetch(source, target)

    def fetch_pinned(self, copies):
        self.copies += [source.numel() for source, _ in copies]
        super().fetch_pinned(copies)


LAYERS = 5
LAYOUT = KVLayout(
    (LayerShape(2, 8, 2, 8), LayerShape(1, 8, 1, 4), LayerShape(2, 8, 2, 8)) + (LayerShape(1, 8, 1, 8),) * 2
)


def block(tokens: int, seed: int = 0) -> BlockKV:
    data = torch.randn(LAYOUT.elements_per_token * tokens, generator=torch.Generator().manual_seed(seed))
    return BlockKV(LAYOUT, tokens, data.half())


def rows_of(end: int) -> list[Rows]:
    made = []
    for shape in LAYOUT.layers:
        made.append(Rows(torch.zeros(shape.key_heads, end, shape.key_dim), 0, HALF))
        made.append(Rows(torch.zeros(shape.value_heads, end, shape.value_dim), 0, RopeSpec()))
    return made


def check(rows: list[Rows], blocks: list[tuple[BlockKV, int]], layers: range = range(LAYERS)) -> None:
    for kv, position in blocks:
        for layer in layers:
            for made, states in ((rows[2 * layer], kv.keys(layer)), (rows[2 * layer + 1], kv.values(layer))):
                right = states.float().clone()
                rotate_(right, made.rope, position)
                torch.testing.assert_close(
                    made.states[:, position : position + kv.num_tokens], right, atol=1e-6, rtol=0
                )


class TestPlacement:
    @pytest.fixture(autouse=True)
    def needs_triton(self):
        pytest.importorskip("triton", reason="Triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("the kernel is compiled here; tests/test_gpu.py places on the device")

    @pytest.mark.parametrize("pinned", [False, True])
    @pytest.mark.parametrize("deferred", [False, True])
    def test_blocks_arrive_whole_in_pieces_and_repeated(self, pinned, deferred):
        from blockrag.model.device_place import DevicePlacement

        link = PinnedLink(pinned)
        rows = rows_of(40)
        placement = DevicePlacement(rows, 40, link=link)
        first, second = block(10, 1), block(6, 2)
        placement.place(first, [0, 30])
        for layers in (range(3), range(3, 5)):
            placement.place(second, [12], layers)
        writes: list[list] = [[] for _ in range(LAYERS)]
        placement.finish([write.append for write in writes] if deferred else None)
        for write in (one for layer in writes for one in layer):
            write()
        check(rows, [(first, 0), (first, 30), (second, 12)])
        # Every byte crosses the bus once.
        assert sum(link.copies) == first.nbytes + second.nbytes

    def test_layers_are_written_when_they_are_asked_for(self):
        from blockrag.model.device_place import DevicePlacement

        rows = rows_of(10)
        placement = DevicePlacement(rows, 10, link=PinnedLink(True))
        kv = block(10)
        placement.place(kv, [0])
        writes: list[list] = [[] for _ in range(LAYERS)]
        placement.finish([write.append for write in writes])
        assert [len(layer) for layer in writes] == [1] * LAYERS
        assert not any(bool(made.states.any()) for made in rows)
        writes[0][0]()
        check(rows, [(kv, 0)], range(2))
        assert not any(bool(made.states.any()) for made in rows[4:])
        for layer in (4, 3, 2, 1, 0):
            writes[layer][0]()
        check(rows, [(kv, 0)])

    @pytest.mark.parametrize("pinned", [False, True])
    def test_what_crossed_the_bus_once_is_found(self, pinned):
        from blockrag.model.device_place import DevicePlacement

        link = PinnedLink(pinned)
        pool = DevicePool(1 << 16, "cpu")
        kv = block(10)
        for expected in (False, True):
            rows = rows_of(20)
            placement = DevicePlacement(rows, 20, pool=pool, link=link)
            assert placement.place_pooled("key", [0, 10]) is expected
            if not expected:
                placement.place(kv, [0], key="key")
            placement.finish()
            check(rows, [(kv, 0), *([(kv, 10)] if expected else [])])
        assert sum(link.copies) == kv.nbytes
        assert filled(pool, "all of it", 1 << 16), "a block is still held"

    def test_a_pool_that_is_full_is_gone_around(self):
        from blockrag.model.device_place import DevicePlacement

        kv, other = block(10, 1), block(10, 2)
        pool = DevicePool(kv.nbytes + 256, "cpu")
        rows = rows_of(20)
        placement = DevicePlacement(rows, 20, pool=pool)
        placement.place(kv, [0], key="a")
        placement.place(other, [10], key="b")
        placement.finish()
        check(rows, [(kv, 0), (other, 10)])
        assert [pool.find(key) is not None for key in "ab"] == [True, False]

    def test_an_abandoned_run_leaves_the_pool_as_it_was(self):
        from blockrag.model.device_place import DevicePlacement

        pool = DevicePool(1 << 16, "cpu")
        placement = DevicePlacement(rows_of(20), 20, pool=pool)
        placement.place(block(10), [0], key="key")
        del placement
        gc.collect()
        assert pool.find("key") is None
        assert pool.stats().blocks == 0

    def test_a_block_outside_the_run_is_refused(self):
        from blockrag.model.device_place import DevicePlacement

        placement = DevicePlacement(rows_of(20), 20)
        for position in (-1, 11):
            with pytest.raises(ValueError, match="do not fit a run that ends at 20"):
                placement.place(block(10), [position])

    def test_it_is_chosen_for_a_device_or_a_pool(self):
        from blockrag.model.device_place import DevicePlacement

        assert DevicePlacement.of(rows_of(4), 4, None) is None
        assert DevicePlacement.of(rows_of(4), 4, DevicePool(1024, "cpu")) is not None
