"""What every block store promises, and what those with a byte budget promise beyond it; how URLs name them."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from reliability.blocks import FINGERPRINT, block
from reliability.blocks import key as block_key

from blockrag import stores
from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.fingerprint import Fingerprint
from blockrag.stores import BlockStore, DiskStore, MemoryStore, StoreStats, open_store, parse_bytes

SMALL, IN_FILE = 100, 40_000


def key(number: int) -> str:
    return f"{number:064x}"


def value(number: int, size: int = SMALL) -> bytes:
    return (number.to_bytes(4, "little") * (size // 4 + 1))[:size]


@pytest.fixture(params=["memory", "disk"])
def make_store(request, tmp_path):
    """Opens new, empty stores of one kind, and closes them."""
    opened: list[BlockStore] = []
    numbers = count()

    def make(max_bytes: int | None = None) -> BlockStore:
        if request.param == "memory":
            store: BlockStore = MemoryStore(max_bytes)
        else:
            store = DiskStore(tmp_path / f"store{next(numbers)}", max_bytes=max_bytes)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(make_store):
    return make_store()


def wrong_reads_in_threads(store: BlockStore, size: int) -> int:
    """Six threads write 50 blocks, three times each, and read each other's; returns how many reads were wrong."""

    def work(worker: int) -> int:
        wrong = 0
        for i in range(25):
            number = worker % 2 * 100 + i
            store.put(key(number), value(number, size))
            for other in (number, i, 100 + i):
                found = store.get(key(other))
                wrong += found is not None and bytes(found) != value(other, size)
            wrong += sum(
                data is not None and bytes(data) != value(i + j, size)
                for j, (_, data) in enumerate(store.get_many([key(i + j) for j in range(3)]))
            )
        return wrong

    with ThreadPoolExecutor(6) as pool:
        return sum(pool.map(work, range(6)))


class TestEveryStore:
    def test_values_of_get_many_stay_as_they_are_while_they_are_held(self, store):
        for number in range(6):
            store.put(key(number), value(number, IN_FILE + number))
        held, tensors = [], []
        for wanted, view in store.get_many([key(number) for number in range(6)]):
            held.append((int(wanted, 16), view[:]))
            tensors.append(torch.frombuffer(view, dtype=torch.uint8))
            del view
        for (number, view), tensor in zip(held, tensors, strict=True):
            assert view == value(number, IN_FILE + number)
            assert bytes(tensor.numpy()) == value(number, IN_FILE + number)

    @pytest.mark.parametrize("size", [0, 1, SMALL, 32 * 1024 - 1, 32 * 1024, IN_FILE, 3_000_000])
    def test_what_is_put_comes_back(self, store, size):
        store.put(key(1), value(1, size))
        found = store.get(key(1))
        assert isinstance(found, memoryview)
        assert bytes(found) == value(1, size)
        assert not found.readonly
        assert found.format == "B"

    @pytest.mark.parametrize(
        "wrap", [bytes, bytearray, memoryview, lambda data: memoryview(data + data[:4]).cast("I")[: len(data) // 4]]
    )
    @pytest.mark.parametrize("size", [SMALL, IN_FILE])
    def test_any_buffer_will_do(self, store, wrap, size):
        store.put(key(1), wrap(value(1, size)))
        assert bytes(store.get(key(1))) == value(1, size)

    @pytest.mark.parametrize("size", [SMALL, IN_FILE])
    def test_the_store_keeps_its_own_copy(self, store, size):
        data = bytearray(value(1, size))
        store.put(key(1), data)
        data[:] = bytes(size)
        assert bytes(store.get(key(1))) == value(1, size)

    @pytest.mark.parametrize("new", [SMALL, IN_FILE])
    @pytest.mark.parametrize("old", [SMALL, IN_FILE])
    def test_put_replaces(self, store, old, new):
        store.put(key(1), value(1, old))
        view = store.get(key(1))
        store.put(key(1), value(2, new))
        assert bytes(store.get(key(1))) == value(2, new)
        assert bytes(view) == value(1, old)
        assert (store.stats().blocks, store.stats().bytes) == (1, new)

    def test_missing_is_none(self, store):
        assert store.get(key(1)) is None
        assert list(store.get_many([])) == []
        assert list(store.get_many([key(1), key(2)])) == [(key(1), None), (key(2), None)]
        assert store.contains_many([key(1)]) == set()
        assert store.delete_many([key(1)]) == 0
        assert list(store.keys()) == []

    def test_get_many_keeps_the_order_over_small_large_and_missing(self, store):
        sizes = [SMALL if i % 3 else IN_FILE for i in range(150)]
        for i, size in enumerate(sizes):
            store.put(key(i), value(i, size))
        wanted = [149, 1000, *range(0, 149, 2), 1001, *range(1, 149, 2)]
        found = list(store.get_many([key(i) for i in wanted]))
        assert [name for name, _ in found] == [key(i) for i in wanted]
        for i, (_, data) in zip(wanted, found, strict=True):
            assert data is None if i >= 1000 else bytes(data) == value(i, sizes[i])

    def test_get_many_may_be_left_early(self, store):
        for i in range(20):
            store.put(key(i), value(i, IN_FILE))
        assert next(iter(store.get_many([key(i) for i in range(20)])))[0] == key(0)
        store.delete_many([key(i) for i in range(20)])

    def test_get_many_refuses_repeated_keys(self, store):
        with pytest.raises(InputError, match="3 keys, 2 distinct"):
            store.get_many([key(1), key(2), key(1)])

    def test_contains_delete_and_keys(self, store):
        for i in range(200):
            store.put(key(i), value(i, SMALL if i % 2 else IN_FILE))
        assert store.contains_many(key(i) for i in range(150, 250)) == {key(i) for i in range(150, 200)}
        assert store.delete_many(key(i) for i in [*range(90), 5, 999]) == 90
        assert set(store.keys()) == {key(i) for i in range(90, 200)}
        assert store.get(key(5)) is None
        assert store.stats().bytes == 55 * SMALL + 55 * IN_FILE

    def test_keys_may_be_deleted_while_they_are_listed(self, store):
        for i in range(150):
            store.put(key(i), value(i))
        for name in iter(store.keys()):
            store.delete_many([name])
        assert list(store.keys()) == []

    def test_stats_count_traffic(self, make_store):
        store = make_store(max_bytes=2 * SMALL)
        for i in range(3):
            store.put(key(i), value(i))
        store.get(key(0))
        list(store.get_many([key(1), key(2), key(3)]))
        store.contains_many([key(1)])
        assert store.stats() == StoreStats(
            blocks=2, bytes=2 * SMALL, max_bytes=2 * SMALL, hits=2, misses=2, puts=3, evictions=1
        )

    @pytest.mark.parametrize("bad", ["", "x", "AB" * 32, "../" * 21 + "a", key(1) + "\n", "\0" * 64, "é" * 64, None, 5])
    def test_malformed_keys_are_refused(self, store, bad):
        calls = [
            lambda: store.get(bad),
            lambda: list(store.get_many([bad])),
            lambda: store.put(bad, b"x"),
            lambda: store.contains_many([bad]),
            lambda: store.delete_many([bad]),
        ]
        for call in calls:
            with pytest.raises(InputError, match="is not a block key"):
                call()
        assert store.stats().blocks == 0

    @pytest.mark.parametrize(
        "bad", ["text", 5, None, [1], memoryview(bytes(8))[::2]], ids=lambda bad: type(bad).__name__
    )
    def test_only_bytes_are_stored(self, store, bad):
        with pytest.raises(InputError, match="a store keeps bytes"):
            store.put(key(1), bad)

    def test_closed_store_says_so(self, store):
        store.put(key(1), b"x")
        store.close()
        store.close()
        calls = [
            lambda: store.get(key(1)),
            lambda: list(store.get_many([key(1), key(2)])),
            lambda: store.put(key(1), b"x"),
            lambda: store.contains_many([key(1)]),
            lambda: store.delete_many([key(1)]),
            lambda: list(store.keys()),
            lambda: store.stats(),
        ]
        for call in calls:
            with pytest.raises(StoreError, match=r"is closed; open it again with open_store"):
                call()

    @pytest.mark.parametrize("size", [SMALL, IN_FILE])
    def test_threads_share_a_store(self, make_store, size):
        store = make_store(max_bytes=20 * size)
        assert wrong_reads_in_threads(store, size) == 0
        stats = store.stats()
        assert stats.bytes == stats.blocks * size <= 20 * size
        assert stats.puts == 150

    def test_url_opens_the_same_kind(self, make_store):
        store = make_store(max_bytes=12345)
        store.put(key(1), b"x")
        again = open_store(store.url)
        assert type(again) is type(store)
        assert again.url == store.url
        assert again.stats().max_bytes == 12345
        again.close()

    def test_pins_may_nest(self, store):
        store.put(key(1), b"x")
        with store.pinned([key(1)]), store.pinned([key(1), key(2)]):
            store.put(key(2), b"y")
        assert bytes(store.get(key(2))) == b"y"

    def test_fingerprints_are_remembered(self, store):
        factors = dict.fromkeys(["weights", "config", "rope", "tokenizer", "template"], "x")
        known = [
            Fingerprint(**factors, compute_dtype=dtype, precision="int8")
            for dtype in ("float32", "bfloat16", "float32")
        ]
        assert store.fingerprints() == {}
        for fingerprint in known:
            store.remember_fingerprint(fingerprint)
        assert store.fingerprints() == {fingerprint.digest: fingerprint for fingerprint in known}
        assert list(store.keys()) == []

    def test_a_sound_store_is_verified(self, store):
        for i in range(5):
            store.put(block_key(i), block(i, 2048))
        report = store.verify()
        assert (report.ok, report.faults, report.blocks, report.bytes) == (True, (), 5, 5 * 2048)
        assert report.fingerprints == {FINGERPRINT: 5}
        assert report.url == store.url

    def test_damage_is_reported_and_removed(self, store):
        for i in range(3):
            store.put(block_key(i), block(i, 2048))
        damaged, other = bytearray(block(3, 2048)), block(4, 2048)
        damaged[1000] ^= 1
        store.put(block_key(3), damaged)
        store.put(block_key(5), other)
        report = store.verify()
        assert {fault.where for fault in report.faults} == {block_key(3), block_key(5)}
        assert {fault.kind for fault in report.faults} == {"damaged"}
        assert not report.ok
        assert report.blocks == 3
        assert store.verify(fix=True).ok
        assert set(store.keys()) == {block_key(i) for i in range(3)}
        assert store.verify().faults == ()


class TestBudget:
    def test_least_recently_used_goes_first(self, make_store):
        store = make_store(max_bytes=5 * SMALL)
        for i in range(5):
            store.put(key(i), value(i))
        store.get(key(0))
        list(store.get_many([key(2), key(1)]))
        store.put(key(4), value(4))
        store.put(key(5), value(5))
        store.put(key(6), value(6))
        assert set(store.keys()) == {key(i) for i in (2, 1, 4, 5, 6)}

    def test_just_enough_is_evicted(self, make_store):
        store = make_store(max_bytes=10 * SMALL)
        for i in range(10):
            store.put(key(i), value(i))
        store.put(key(10), value(10, 2 * SMALL + 1))
        assert set(store.keys()) == {key(i) for i in range(3, 11)}
        assert store.stats().evictions == 3

    def test_exactly_the_budget_fits(self, make_store):
        store = make_store(max_bytes=2 * SMALL)
        store.put(key(1), value(1))
        store.put(key(2), value(2))
        store.put(key(1), value(3))
        assert set(store.keys()) == {key(1), key(2)}
        store.put(key(3), value(3, 2 * SMALL))
        assert set(store.keys()) == {key(3)}

    def test_replacing_evicts_only_for_the_difference(self, make_store):
        store = make_store(max_bytes=3 * SMALL)
        for i in range(3):
            store.put(key(i), value(i))
        store.put(key(2), value(2, 2 * SMALL))
        assert set(store.keys()) == {key(1), key(2)}

    @pytest.mark.parametrize("size", [3 * SMALL + 1, IN_FILE])
    def test_a_block_beyond_the_budget_is_refused_and_costs_nothing(self, make_store, size):
        store = make_store(max_bytes=3 * SMALL)
        for i in range(3):
            store.put(key(i), value(i))
        with pytest.raises(StoreFullError, match=f"{size} bytes exceeds max_bytes=300"):
            store.put(key(1), value(9, size))
        assert bytes(store.get(key(1))) == value(1)
        assert store.stats().blocks == 3

    def test_pinned_blocks_stay(self, make_store):
        store = make_store(max_bytes=3 * SMALL)
        for i in range(3):
            store.put(key(i), value(i))
        with store.pinned([key(0), key(1)]):
            for i in range(3, 8):
                store.put(key(i), value(i))
                assert set(store.keys()) == {key(0), key(1), key(i)}
        store.put(key(8), value(8))
        assert set(store.keys()) == {key(1), key(7), key(8)}

    def test_a_block_that_finds_no_room_beside_pinned_ones_costs_nothing(self, make_store):
        store = make_store(max_bytes=3 * SMALL)
        for i in range(3):
            store.put(key(i), value(i))
        with store.pinned([key(0), key(1), key(9)]):
            with pytest.raises(StoreFullError, match="no room in max_bytes=300 beside the blocks that running"):
                store.put(key(3), value(3, SMALL + 1))
            assert set(store.keys()) == {key(0), key(1), key(2)}
            store.put(key(3), value(3, SMALL))
            assert set(store.keys()) == {key(0), key(1), key(3)}
        assert store.stats().evictions == 1

    def test_a_pinned_block_may_be_replaced(self, make_store):
        store = make_store(max_bytes=3 * SMALL)
        store.put(key(0), value(0))
        store.put(key(1), value(1))
        with store.pinned([key(0)]):
            store.put(key(0), value(5, 3 * SMALL))
            assert list(store.keys()) == [key(0)]
            assert bytes(store.get(key(0))) == value(5, 3 * SMALL)

    def test_pins_nest_and_overlap(self, make_store):
        store = make_store(max_bytes=2 * SMALL)
        outer, inner = store.pinned([key(0), key(0)]), store.pinned([key(0), key(1)])
        store.put(key(0), value(0))
        store.put(key(1), value(1))
        outer.__enter__()
        inner.__enter__()
        with pytest.raises(StoreFullError):
            store.put(key(2), value(2))
        # Not in the order in which they began.
        outer.__exit__(None, None, None)
        with pytest.raises(StoreFullError):
            store.put(key(2), value(2))
        inner.__exit__(None, None, None)
        store.put(key(2), value(2))
        assert set(store.keys()) == {key(1), key(2)}

    def test_pins_end_with_an_error(self, make_store):
        store = make_store(max_bytes=SMALL)
        store.put(key(0), value(0))
        with contextlib.suppress(KeyError), store.pinned([key(0)]):
            raise KeyError
        store.put(key(1), value(1))
        assert list(store.keys()) == [key(1)]

    def test_deleting_and_replacing_ask_no_pins(self, make_store):
        store = make_store(max_bytes=SMALL)
        store.put(key(0), value(0))
        with store.pinned([key(0)]):
            assert store.delete_many([key(0)]) == 1

    @pytest.mark.parametrize("bad", [0, -1])
    @pytest.mark.parametrize("make", [MemoryStore, lambda max_bytes: DiskStore("unused", max_bytes=max_bytes)])
    def test_budget_is_positive(self, make, bad):
        with pytest.raises(InputError, match=f"max_bytes is {bad}"):
            make(bad)


class StoreModel(RuleBasedStateMachine):
    """Any sequence of calls: a store with a budget agrees with a dictionary that is kept in order of use."""

    make: object = None
    BUDGET = 1000

    @initialize()
    def open(self):
        self.store = self.make(self.BUDGET)
        self.model: dict[str, bytes] = {}

    @rule(number=st.integers(0, 7), size=st.integers(0, 1200), fill=st.integers(0, 2))
    def put(self, number, size, fill):
        data = value(fill, size)
        if size > self.BUDGET:
            with pytest.raises(StoreFullError):
                self.store.put(key(number), data)
            return
        self.store.put(key(number), data)
        self.model.pop(key(number), None)
        while sum(map(len, self.model.values())) + size > self.BUDGET:
            del self.model[next(iter(self.model))]
        self.model[key(number)] = data

    @rule(number=st.integers(0, 7))
    def get(self, number):
        found = self.store.get(key(number))
        if key(number) in self.model:
            assert bytes(found) == self.model[key(number)]
            self.model[key(number)] = self.model.pop(key(number))
        else:
            assert found is None

    @rule(pins=st.sets(st.integers(0, 7)), number=st.integers(0, 7), size=st.integers(0, 600))
    def put_beside_pins(self, pins, number, size):
        pinned = set(map(key, pins)) & self.model.keys() - {key(number)}
        with self.store.pinned(map(key, pins)):
            if sum(len(self.model[name]) for name in pinned) + size > self.BUDGET:
                with pytest.raises(StoreFullError):
                    self.store.put(key(number), value(0, size))
                return
            self.store.put(key(number), value(0, size))
        self.model.pop(key(number), None)
        unpinned = iter([name for name in self.model if name not in pinned])
        while sum(map(len, self.model.values())) + size > self.BUDGET:
            del self.model[next(unpinned)]
        self.model[key(number)] = value(0, size)

    @rule(numbers=st.sets(st.integers(0, 7)))
    def delete(self, numbers):
        assert self.store.delete_many(map(key, numbers)) == len(self.model.keys() & set(map(key, numbers)))
        for number in numbers:
            self.model.pop(key(number), None)

    @invariant()
    def agree(self):
        if hasattr(self, "store"):
            assert set(self.store.keys()) == self.model.keys()
            assert self.store.stats().bytes == sum(map(len, self.model.values()))

    def teardown(self):
        if hasattr(self, "store"):
            self.store.close()


def test_any_sequence_of_calls_agrees_with_a_dictionary(make_store):
    class Model(StoreModel):
        make = staticmethod(make_store)

    run_state_machine_as_test(Model, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))


class TestUrls:
    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("1", 1),
            ("512b", 512),
            ("2K", 2000),
            ("2kb", 2000),
            ("2KiB", 2048),
            ("1.5 MB", 1_500_000),
            ("3MiB", 3 << 20),
            ("2GB", 2_000_000_000),
            (" 2 GiB ", 2 << 30),
            ("1T", 10**12),
            ("0.5TiB", 1 << 39),
        ],
    )
    def test_sizes(self, text, expected):
        assert parse_bytes(text) == expected

    @pytest.mark.parametrize("text", ["", "GB", "-1", "1e9", "1XB", "1,5GB", "1 2", "0x10", "nan", "inf", "٣", "1iB"])
    def test_what_is_no_size_is_refused(self, text):
        with pytest.raises(InputError, match="cannot read the size"):
            parse_bytes(text)

    @pytest.mark.parametrize("text", ["0", "0GB", "0.0001KB"])
    def test_less_than_a_byte_is_refused(self, text):
        with pytest.raises(InputError, match="less than one byte"):
            parse_bytes(text)

    def test_memory(self):
        assert open_store("memory://").url == "memory://"
        assert open_store("memory://?max_bytes=2KiB").url == "memory://?max_bytes=2048"

    def test_disk_absolute_relative_and_quoted(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        expected = {
            f"disk://{tmp_path}/absolute": tmp_path / "absolute",
            "disk://relative/path?max_bytes=1MB": tmp_path / "relative/path",
            "disk://~/blocks": tmp_path / "home/blocks",
            "disk://what%3F%20100%25": tmp_path / "what? 100%",
        }
        for url, path in expected.items():
            with contextlib.closing(open_store(url)) as store:
                store.put(key(1), b"x")
                with contextlib.closing(open_store(store.url)) as again:
                    assert again.url == store.url
                    assert again.get(key(1)) == b"x"
            assert (path / "cache.db").is_file()

    @pytest.mark.parametrize(
        "url",
        ["", "memory", "memory:/", "ftp://host", "DISK:///x", "disk:///x?max_byte=1", "disk:///x?a", "disk://",
         "disk://?max_bytes=1", "memory://path", "memory://?max_bytes=1&max_bytes=2", "memory://?max_bytes=",
         "memory://?max_bytes=lots", "memory://?deadline=1"],
    )  # fmt: skip
    def test_what_cannot_be_opened_is_refused_with_what_can(self, url):
        with pytest.raises(InputError, match=r"memory://|disk://|max_bytes|KB, MB"):
            open_store(url)

    def test_unknown_names_are_attribute_errors(self):
        with pytest.raises(AttributeError, match="FloppyStore"):
            _ = stores.FloppyStore

    def test_memory_needs_no_diskcache(self):
        code = "import sys, blockrag.stores as s; s.open_store('memory://'); sys.exit('diskcache' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
