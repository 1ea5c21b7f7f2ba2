"""Block stores: one protocol for all of them, then what each promises beyond it.

The disk store is attacked as well: hostile indexes, names and links, full disks, killed and competing processes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import pickle
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from blockrag import stores
from blockrag.errors import InputError, StoreError, StoreFullError, UnsafeStoreError
from blockrag.stores import BlockStore, DiskStore, MemoryStore, StoreStats, open_store, parse_bytes
from blockrag.stores.disk import values as disk_values
from blockrag.stores.files import StoreFiles

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
            assert list(pool.map(work, range(6))) == [0] * 6
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


@pytest.fixture
def root(tmp_path):
    """The directory of a store with one small and one large block, both closed properly."""
    path = tmp_path / "store"
    with contextlib.closing(DiskStore(path)) as store:
        store.put(key(1), value(1))
        store.put(key(2), value(2, IN_FILE))
    return path


@pytest.fixture
def disk(root):
    with contextlib.closing(DiskStore(root)) as store:
        yield store


def execute(root: Path, statement: str, *parameters: object) -> list[tuple[object, ...]]:
    """What an attacker with a file, not a process, can do: change the index behind the store's back."""
    with contextlib.closing(sqlite3.connect(root / "cache.db")) as connection, connection:
        return connection.execute(statement, parameters).fetchall()


def value_files(root: Path) -> list[Path]:
    return sorted(root.glob("??/*.val"))


class TestDiskDirectory:
    def test_permissions(self, tmp_path):
        old = os.umask(0)
        try:
            with contextlib.closing(DiskStore(tmp_path / "a/b")) as store:
                store.put(key(1), value(1, IN_FILE))
                paths = [path for path in (tmp_path / "a/b").rglob("*")]
                modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in paths}
                directories = {path.name for path in paths if path.is_dir()}
        finally:
            os.umask(old)
        assert {"cache.db", "cache.db-wal", "cache.db-shm", "blockrag-store-v1"} <= modes.keys()
        assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700
        assert {modes[name] for name in directories} == {0o700}
        assert {mode for name, mode in modes.items() if name not in directories} == {0o600}

    def test_loosened_permissions_are_tightened(self, root):
        root.chmod(0o777)
        (root / "cache.db").chmod(0o666)
        DiskStore(root).close()
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert stat.S_IMODE((root / "cache.db").stat().st_mode) == 0o600

    def test_reopened_store_has_its_blocks(self, disk):
        assert bytes(disk.get(key(1))) == value(1)
        assert bytes(disk.get(key(2))) == value(2, IN_FILE)
        assert disk.stats().bytes == SMALL + IN_FILE

    def test_small_values_are_rows_and_large_ones_files(self, root):
        assert execute(root, "SELECT key, raw, mode, size, filename IS NULL FROM Cache ORDER BY key") == [
            (key(1), 1, 1, SMALL, 1),
            (key(2), 1, 2, IN_FILE, 0),
        ]
        assert [path.stat().st_size for path in value_files(root)] == [IN_FILE]

    def test_no_value_file_outlives_its_row(self, disk, root):
        disk.put(key(2), value(3, IN_FILE))
        assert len(value_files(root)) == 1
        disk.put(key(2), value(3))
        assert value_files(root) == []
        disk.put(key(3), value(3, IN_FILE))
        disk.delete_many([key(3)])
        assert value_files(root) == []

    def test_foreign_directory_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").write_text("mine")
        with pytest.raises(StoreError, match="is not a blockrag store and holds 1 other files; use an empty directory"):
            DiskStore(tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_plain_diskcache_is_refused(self, tmp_path):
        import diskcache

        diskcache.Cache(str(tmp_path)).close()
        with pytest.raises(StoreError, match="is not a blockrag store"):
            DiskStore(tmp_path)

    def test_another_releases_store_is_refused(self, tmp_path):
        (tmp_path / "blockrag-store-v2").touch()
        with pytest.raises(StoreError, match=r"another release of blockrag \(blockrag-store-v2\)"):
            DiskStore(tmp_path)

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").touch()
        for path in (tmp_path / "file", tmp_path / "file/below"):
            with pytest.raises(StoreError, match="choose a directory that this user can write"):
                DiskStore(path)

    @pytest.mark.parametrize("path", ["a\0b", "~nobody-has-this-name/x"])
    def test_a_path_that_cannot_be(self, path):
        with pytest.raises(StoreError, match="choose another directory"):
            DiskStore(path)

    def test_a_path_that_diskcache_would_expand(self, tmp_path, monkeypatch):
        monkeypatch.setenv("ELSEWHERE", str(tmp_path / "elsewhere"))
        with pytest.raises(InputError, match="use one without"):
            DiskStore(tmp_path / "$ELSEWHERE")
        assert list(tmp_path.iterdir()) == []

    def test_a_link_to_itself(self, tmp_path):
        (tmp_path / "loop").symlink_to(tmp_path / "loop")
        with pytest.raises(StoreError, match="cannot open the store"):
            DiskStore(tmp_path / "loop")

    def test_a_link_to_the_directory_is_followed(self, root, tmp_path):
        (tmp_path / "link").symlink_to(root)
        with contextlib.closing(DiskStore(tmp_path / "link")) as store:
            assert store.url == f"disk://{root}"
            assert bytes(store.get(key(2))) == value(2, IN_FILE)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
    def test_unwritable_directory(self, root):
        code = """
            import os, sys
            from blockrag.errors import StoreError
            from blockrag.stores.disk import DiskStore
            os.setuid(65534)
            try:
                DiskStore(sys.argv[1])
            except StoreError as error:
                sys.exit("choose a directory that this user can write" not in str(error))
        """
        assert run_python(code, root).returncode == 0

    def test_garbage_index(self, root):
        (root / "cache.db").write_bytes(b"not a database" * 1000)
        with pytest.raises(StoreError, match="its index is damaged: let `blockrag verify-store --fix`"):
            DiskStore(root)

    def test_overwritten_index_pages(self, tmp_path):
        with contextlib.closing(DiskStore(tmp_path / "s")) as store:
            for i in range(200):
                store.put(key(i), value(i, 2000))
        pages = bytearray((tmp_path / "s/cache.db").read_bytes())
        for start in range(0, len(pages), 4096):
            pages[start + (100 if start == 0 else 0) : start + (110 if start == 0 else 12)] = b"\xff" * (
                10 if start == 0 else 12
            )
        (tmp_path / "s/cache.db").write_bytes(pages)
        with (
            pytest.raises(StoreError, match="its index is damaged"),
            contextlib.closing(DiskStore(tmp_path / "s")) as store,
        ):
            list(store.keys())


class TestDiskDamage:
    def test_missing_value_file_is_a_miss(self, disk, root, caplog):
        value_files(root)[0].unlink()
        with caplog.at_level(logging.WARNING):
            assert disk.get(key(2)) is None
            assert list(disk.get_many([key(1), key(2)]))[1] == (key(2), None)
        assert disk.stats().misses == 2
        assert "value is gone or short" in caplog.text
        disk.put(key(2), value(2, IN_FILE))
        assert bytes(disk.get(key(2))) == value(2, IN_FILE)

    @pytest.mark.parametrize("size", [0, 1, IN_FILE - 1, IN_FILE + 1, 1 << 40], ids=str)
    def test_value_file_of_another_length_is_a_miss(self, disk, root, size):
        os.truncate(value_files(root)[0], size)
        assert disk.get(key(2)) is None
        assert [data for _, data in disk.get_many([key(2), key(3)])] == [None, None]
        assert disk.stats().misses == 3

    def test_row_of_another_length_is_a_miss(self, disk, root):
        execute(root, "UPDATE Cache SET value = x'00' WHERE key = ?", key(1))
        assert disk.get(key(1)) is None
        assert disk.stats().misses == 1

    def test_unreadable_value_file_is_a_miss(self, disk, root, caplog):
        path = value_files(root)[0]
        path.unlink()
        path.parent.rmdir()
        path.parent.touch()
        assert disk.get(key(2)) is None
        assert "cannot open" in caplog.text

    def test_a_block_without_its_value_file_is_not_contained(self, disk, root):
        """Ingestion asks with contains_many, and must compute again what a lost file took along."""
        assert disk.contains_many([key(1), key(2)]) == {key(1), key(2)}
        (file,) = value_files(root)
        os.truncate(file, IN_FILE // 2)
        assert disk.contains_many([key(1), key(2)]) == {key(1)}
        file.unlink()
        assert disk.contains_many([key(1), key(2)]) == {key(1)}
        file.symlink_to(root / "cache.db")
        assert disk.contains_many([key(1), key(2)]) == {key(1)}
        disk._index.execute("UPDATE Cache SET filename = '../cache.db' WHERE key = ?", (key(2),))
        assert disk.contains_many([key(1), key(2)]) == {key(1)}

    def test_value_file_that_ends_while_it_is_read(self, disk, root):
        """Another process may cut the file between the check of its length and the read."""
        row = disk._rows([key(2)])[key(2)]
        opened = disk._index.values.open(row.filename, row.size)
        os.truncate(value_files(root)[0], IN_FILE // 2)
        assert disk._index.values.read(opened, disk_values.Buffer()) is None

    def test_value_file_that_cannot_be_read(self, disk, root, caplog):
        handle = os.open(value_files(root)[0], os.O_WRONLY)
        assert disk._index.values.read(disk_values.OpenValue(handle, 8), disk_values.Buffer()) is None
        assert "cannot read a value file" in caplog.text
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(handle)

    def test_flipped_bits_are_the_codecs_business(self, disk, root):
        path = value_files(root)[0]
        data = bytearray(path.read_bytes())
        data[7] ^= 1
        path.write_bytes(data)
        assert bytes(disk.get(key(2))) == data

    def test_block_replaced_between_lookup_and_read_is_found(self, disk, root, monkeypatch):
        """The race is made certain: another store replaces the block after the row was read."""
        lookup = type(disk)._rows
        pending = [True]

        def racing(self, keys):
            rows = lookup(self, keys)
            if pending:
                pending.clear()
                with contextlib.closing(DiskStore(root)) as other:
                    other.put(key(2), value(7, IN_FILE))
            return rows

        monkeypatch.setattr(type(disk), "_rows", racing)
        assert bytes(disk.get(key(2))) == value(7, IN_FILE)
        pending.append(True)
        assert [bytes(data) for _, data in disk.get_many([key(2), key(1)])] == [value(7, IN_FILE), value(1)]
        assert disk.stats().misses == 0


class Bomb:
    """Unpickling it leaves a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


class TestHostileDirectory:
    @pytest.fixture
    def bomb(self, tmp_path):
        trace = tmp_path / "executed"
        yield pickle.dumps(Bomb(trace))
        assert not trace.exists()

    def reads(self, store: BlockStore) -> list:
        return [lambda: store.get(key(1)), lambda: list(store.get_many([key(3), key(1)])), lambda: list(store.keys())]

    def assert_refused(self, store: BlockStore) -> None:
        for read in self.reads(store):
            with pytest.raises(UnsafeStoreError, match="delete"):
                read()

    def test_pickled_value_in_a_row(self, disk, root, bomb):
        execute(root, "UPDATE Cache SET mode = 4, value = ? WHERE key = ?", bomb, key(1))
        self.assert_refused(disk)

    def test_pickled_value_in_a_file(self, disk, root, bomb):
        value_files(root)[0].write_bytes(bomb)
        name = str(value_files(root)[0].relative_to(root))
        statement = "UPDATE Cache SET mode = 4, value = NULL, filename = ?, size = ? WHERE key = ?"
        execute(root, statement, name, len(bomb), key(1))
        self.assert_refused(disk)

    def test_pickled_key(self, disk, root, bomb):
        execute(root, "INSERT INTO Cache(key, raw, size, mode, value) VALUES (?, 0, 1, 1, x'00')", bomb)
        with pytest.raises(UnsafeStoreError, match="raw=0"):
            list(disk.keys())
        with pytest.raises(UnsafeStoreError, match="raw=0"):
            list(disk._index)
        assert bytes(disk.get(key(1))) == value(1)

    @pytest.mark.parametrize("name", ["cafe", key(7).upper()[:-1] + "F", b"\0" * 64, 7, None])
    def test_foreign_key(self, disk, root, name):
        execute(root, "UPDATE Cache SET key = ? WHERE key = ?", name, key(1))
        with pytest.raises(UnsafeStoreError, match="delete"):
            list(disk.keys())
        assert disk.get(key(1)) is None

    def test_pickled_marker_on_a_sound_key(self, disk, root):
        execute(root, "UPDATE Cache SET raw = 0 WHERE key = ?", key(1))
        self.assert_refused(disk)

    @pytest.mark.parametrize(
        "columns",
        ["mode = 0", "mode = 3", "mode = 'x'", "mode = NULL", "value = 'text'", "value = 7", "value = NULL",
         "size = -1", "size = 'x'", "size = NULL", "size = 1.5", "filename = 'ab/x'", "raw = 2", "raw = NULL"],
    )  # fmt: skip
    def test_rows_of_other_kinds(self, disk, root, columns):
        execute(root, f"UPDATE Cache SET {columns} WHERE key = ?", key(1))
        self.assert_refused(disk)

    @pytest.mark.parametrize(
        "name",
        ["../../outside", "../outside", "/etc/hostname", "ab/../../outside", "ab/" + "0" * 30,
         "AB/" + "0" * 30 + ".val",
         "ab/" + "0" * 30 + ".val\n", "./ab/" + "0" * 30 + ".val", "ab\\" + "0" * 30 + ".val", "", "cache.db", b"ab/x"],
        ids=repr,
    )  # fmt: skip
    def test_file_names_that_lead_elsewhere(self, disk, root, name):
        outside = root.parent / "outside"
        outside.write_bytes(value(9, IN_FILE))
        execute(
            root, "UPDATE Cache SET filename = ?, value = NULL, mode = 2, size = ? WHERE key = ?", name, IN_FILE, key(1)
        )
        self.assert_refused(disk)
        disk.put(key(1), value(5))
        assert bytes(disk.get(key(1))) == value(5)
        assert outside.read_bytes() == value(9, IN_FILE)
        assert (root / "cache.db").exists()

    def test_deleting_and_evicting_touch_nothing_outside(self, disk, root, caplog):
        outside = root.parent / "outside"
        outside.touch()
        execute(root, "UPDATE Cache SET filename = '../outside', mode = 2, value = NULL")
        assert disk.delete_many([key(1)]) == 1
        with contextlib.closing(DiskStore(root, max_bytes=1)) as small:
            assert small.stats().evictions == 1
        assert outside.exists()
        assert "leads out of" in caplog.text

    def test_links_in_place_of_a_value_file(self, disk, root):
        outside = root.parent / "outside"
        outside.write_bytes(value(9, IN_FILE))
        path = value_files(root)[0]
        path.unlink()
        path.symlink_to(outside)
        with pytest.raises(UnsafeStoreError, match="leads out of"):
            disk.get(key(2))
        with pytest.raises(UnsafeStoreError, match="leads out of"):
            list(disk.get_many([key(1), key(2)]))
        disk.delete_many([key(2)])
        assert outside.exists()

    def test_link_in_place_of_a_value_directory(self, disk, root):
        path = value_files(root)[0]
        path.parent.rename(root.parent / "elsewhere")
        path.parent.symlink_to(root.parent / "elsewhere")
        with pytest.raises(UnsafeStoreError, match="leads out of"):
            disk.get(key(2))
        disk.delete_many([key(2)])
        assert (root.parent / "elsewhere" / path.name).exists()

    def test_writing_through_linked_directories_is_refused(self, disk, root, monkeypatch):
        (root.parent / "elsewhere").mkdir()
        for i in range(256):
            with contextlib.suppress(FileExistsError):
                (root / f"{i:02x}").symlink_to(root.parent / "elsewhere")
        path = value_files(root)[0].parent
        monkeypatch.setattr(os, "urandom", lambda size: bytes([int(path.name, 16) ^ 1]) * size)
        with pytest.raises(UnsafeStoreError, match="symbolic link"):
            disk.put(key(10), value(10, IN_FILE))
        assert list((root.parent / "elsewhere").iterdir()) == []

    @pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "directory"])
    def test_what_is_no_regular_file(self, disk, root, make):
        path = value_files(root)[0]
        path.unlink()
        make(path)
        with pytest.raises(UnsafeStoreError, match="not a regular file"):
            disk.get(key(2))

    @pytest.mark.parametrize("name", ["cache.db", "cache.db-wal"])
    def test_linked_index(self, root, name):
        outside = root.parent / "outside.db"
        (root / "cache.db").rename(outside)
        (root / name).symlink_to(outside)
        before = outside.read_bytes()
        with pytest.raises(UnsafeStoreError, match="not a regular file"):
            DiskStore(root)
        assert outside.read_bytes() == before

    @pytest.mark.parametrize(
        "statement",
        [
            "CREATE VIEW v AS SELECT 1",
            "CREATE TABLE t (x)",
            "CREATE TRIGGER evil AFTER INSERT ON Cache BEGIN DELETE FROM Cache; END",
            "CREATE INDEX evil ON Cache (tag)",
            "INSERT INTO Settings VALUES ('disk_evil', 1)",
            "INSERT INTO Settings VALUES ('sqlite_writable_schema', 1)",
            "INSERT INTO Settings VALUES ('_directory', '/')",
            "INSERT INTO Settings VALUES (x'00', 1)",
        ],
    )
    def test_foreign_schema_and_settings(self, root, statement):
        execute(root, statement)
        with pytest.raises(UnsafeStoreError, match="holds a foreign"):
            DiskStore(root)

    def test_trigger_under_a_known_name(self, root):
        execute(root, "DROP TRIGGER Settings_count_insert")
        execute(
            root, "CREATE TRIGGER Settings_count_insert AFTER INSERT ON Cache FOR EACH ROW BEGIN DELETE FROM Cache; END"
        )
        with pytest.raises(UnsafeStoreError, match="foreign trigger 'Settings_count_insert'"):
            DiskStore(root)

    def test_persisted_settings_weaken_nothing(self, root):
        weak = {
            "eviction_policy": "least-recently-used",
            "size_limit": 1,
            "cull_limit": 10,
            "statistics": 1,
            "tag_index": 1,
            "disk_min_file_size": 1 << 40,
            "disk_pickle_protocol": 5,
            "sqlite_mmap_size": 1 << 40,
            "sqlite_journal_mode": "off",
            "size": 10**15,
            "count": "x",
        }
        for name, setting in weak.items():
            execute(root, "UPDATE Settings SET value = ? WHERE key = ?", setting, name)
        with contextlib.closing(DiskStore(root, max_bytes=10 * IN_FILE)) as store:
            for i in range(3, 8):
                store.put(key(i), value(i, IN_FILE))
            assert store.stats().blocks == 7
            assert store.stats().bytes == SMALL + 6 * IN_FILE
            assert len(value_files(root)) == 6
            assert store._index.execute("PRAGMA mmap_size").fetchall() in ([], [(0,)])
            assert store._index.execute("PRAGMA journal_mode").fetchall() == [("wal",)]
            assert store._index.execute("PRAGMA trusted_schema").fetchall() == [(0,)]

    def test_hostile_sizes_do_not_reach_the_arithmetic(self, root):
        execute(root, "UPDATE Cache SET size = ? WHERE key = ?", "x" * 10, key(1))
        with pytest.raises(UnsafeStoreError, match=r"row of 'x+' bytes"):
            DiskStore(root, max_bytes=1)

    def test_going_through_diskcache_itself_is_as_strict(self, disk, root, bomb):
        """The hardening sits in the `Disk` that diskcache calls, so its own methods are covered too."""
        assert bytes(disk._index.get(key(1))) == value(1)
        assert bytes(disk._index.get(key(2))) == value(2, IN_FILE)
        for name, data in [("text", b"x"), (key(3), "text"), (key(3), {"a": 1}), (7, b"x")]:
            with pytest.raises(InputError):
                disk._index.set(name, data)
        with pytest.raises(InputError, match="not streams"), (root / "cache.db").open("rb") as file:
            disk._index.set(key(3), file, read=True)
        execute(root, "UPDATE Cache SET mode = 4, value = ? WHERE key = ?", bomb, key(1))
        with pytest.raises(UnsafeStoreError):
            disk._index.get(key(1))
        value_files(root)[0].unlink()
        assert disk._index.get(key(2)) is None

    def test_nothing_is_pickled_or_unpickled(self, tmp_path):
        code = """
            import sys
            from pathlib import Path
            import contextlib
            from blockrag.stores import DiskStore, open_store
            events = []
            sys.addaudithook(lambda name, args: events.append(name))
            events.clear()
            for budget in ("", "?max_bytes=200KB"):
                with contextlib.closing(open_store(f"disk://{sys.argv[1]}{budget}")) as store:
                    for i in range(6):
                        store.put(f"{i:064x}", bytes(100 if i % 2 else 40000))
                    list(store.get_many(list(store.keys())))
                    store.get(f"{1:064x}"), store.stats(), store.sweep(older_than_s=-1.0)
                    store.delete_many([f"{2:064x}"])
            assert "sqlite3.connect" in events
            sys.exit("pickle.find_class" in events or "marshal.loads" in events)
        """
        assert run_python(code, tmp_path / "s").returncode == 0
        assert {mode for (mode,) in execute(tmp_path / "s", "SELECT mode FROM Cache")} == {1, 2}
        assert {raw for (raw,) in execute(tmp_path / "s", "SELECT raw FROM Cache")} == {1}


class TestDiskBudget:
    def test_order_of_use_outlives_the_process(self, tmp_path):
        with contextlib.closing(DiskStore(tmp_path / "s", max_bytes=3 * SMALL)) as store:
            for i in range(3):
                store.put(key(i), value(i))
            store.get(key(0))
        with contextlib.closing(DiskStore(tmp_path / "s", max_bytes=3 * SMALL)) as store:
            store.put(key(3), value(3))
            assert set(store.keys()) == {key(0), key(2), key(3)}

    def test_smaller_budget_is_enforced_at_open(self, root):
        with contextlib.closing(DiskStore(root, max_bytes=IN_FILE)) as store:
            assert list(store.keys()) == [key(2)]
            assert store.stats().evictions == 1

    def test_evicted_files_are_removed(self, tmp_path):
        with contextlib.closing(DiskStore(tmp_path / "s", max_bytes=4 * IN_FILE)) as store:
            for i in range(20):
                store.put(key(i), value(i, IN_FILE))
        assert len(value_files(tmp_path / "s")) == 4

    def test_wrong_total_costs_blocks_but_not_the_store(self, root):
        with contextlib.closing(DiskStore(root, max_bytes=3 * IN_FILE)) as store:
            execute(root, "UPDATE Settings SET value = ? WHERE key = 'size'", 10**15)
            store.put(key(3), value(3))
            assert list(store.keys()) == [key(3)]
            assert store.stats().evictions == 2
        with contextlib.closing(DiskStore(root)) as store:
            assert store.stats().bytes == SMALL

    def test_reading_takes_no_write_lock(self, disk, root):
        with contextlib.closing(sqlite3.connect(root / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert bytes(disk.get(key(1))) == value(1)
            assert [name for name, data in disk.get_many([key(2), key(1)]) if data] == [key(2), key(1)]
            assert disk.contains_many([key(1)]) == {key(1)}
            other.execute("ROLLBACK")

    def test_notes_of_use_are_bounded(self, disk, monkeypatch):
        monkeypatch.setattr("blockrag.stores.disk.store._MAX_NOTED_USES", 1)
        disk.get(key(1))
        disk.get(key(2))
        assert list(disk._used) == [key(2)]

    def test_lock_held_by_a_hanging_process(self, root, caplog):
        store = DiskStore(root, files=StoreFiles(patience_s=0.05))
        with contextlib.closing(sqlite3.connect(root / "cache.db", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            with pytest.raises(StoreError, match="another process keeps its lock"):
                store.put(key(3), value(3, IN_FILE))
            store.get(key(1))
            store.close()
            assert "the order of use was not saved" in caplog.text
            other.execute("ROLLBACK")
        assert len(value_files(root)) == 1


class TestSweep:
    def stray(self, root: Path, *, age_s: float) -> Path:
        path = root / "ab" / ("0" * 30 + ".val")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"unfinished")
        os.utime(path, (path.stat().st_mtime - age_s,) * 2)
        return path

    def test_old_strays_go_and_everything_else_stays(self, disk, root):
        old = self.stray(root, age_s=7200)
        foreign = [root / "ab" / "notes.txt", root / "README", root / "abc" / old.name]
        (root / "abc").mkdir()
        (root / "link").symlink_to(root.parent)
        for path in foreign:
            path.touch()
            os.utime(path, (0, 0))
        os.utime(value_files(root)[0], (0, 0))
        for path in value_files(root):
            if path != old:
                os.utime(path, (0, 0))
        assert disk.sweep() == 1
        assert not old.exists()
        assert all(path.exists() for path in foreign)
        assert bytes(disk.get(key(2))) == value(2, IN_FILE)

    def test_young_strays_may_belong_to_a_writer(self, disk, root):
        young = self.stray(root, age_s=60)
        assert disk.sweep() == 0
        assert young.exists()
        assert disk.sweep(older_than_s=30) == 1

    def test_open_sweeps_once_a_day(self, root):
        stray = self.stray(root, age_s=7200)
        DiskStore(root).close()
        assert stray.exists()
        os.utime(root / "blockrag-store-v1", (0, 0))
        DiskStore(root).close()
        assert not stray.exists()
        stray = self.stray(root, age_s=7200)
        DiskStore(root).close()
        assert stray.exists()


def run_python(code: str, *arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


class TestProcesses:
    def test_several_processes_write_and_read_one_directory(self, tmp_path):
        code = """
            import sys
            from blockrag.stores.disk import DiskStore
            worker = int(sys.argv[2])
            store = DiskStore(sys.argv[1], max_bytes=30 * 40_000)
            def data(i):
                return i.to_bytes(4, "little") * (10_000 if i % 2 else 25)
            wrong = hits = 0
            for i in range(40):
                number = i + 20 * (worker % 2)
                store.put(f"{number:064x}", data(number))
                for other, (_, found) in enumerate(store.get_many([f"{j:064x}" for j in range(60)])):
                    hits += found is not None
                    wrong += found is not None and bytes(found) != data(other)
                assert store.stats().bytes <= 30 * 40_000
            store.close()
            print(wrong, hits > 0)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s")]
        workers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)]
        assert [worker.communicate(timeout=120)[0] for worker in workers] == ["0 True\n"] * 3
        with contextlib.closing(DiskStore(tmp_path / "s")) as store:
            rows = execute(tmp_path / "s", "SELECT filename FROM Cache WHERE filename IS NOT NULL")
            assert {name for (name,) in rows} == {
                str(p.relative_to(tmp_path / "s")) for p in value_files(tmp_path / "s")
            }
            assert store.stats().blocks == len(list(store.keys()))

    @pytest.mark.parametrize("writes_before", [0, 1, 3, 8])
    def test_killed_writer_leaves_no_partial_value(self, tmp_path, writes_before):
        """The writer is killed in the middle of a value file: it stops itself there, by counting its own writes."""
        code = """
            import os, signal, sys
            from blockrag.stores.disk import DiskStore
            from blockrag.stores.files import StoreFiles
            left = int(sys.argv[2])
            class Chopped(StoreFiles):
                def write(self, handle, data):
                    global left
                    if len(data) == 40_000:
                        if left < 0:
                            super().write(handle, data[: len(data) // 2])
                            os.kill(os.getpid(), signal.SIGKILL)
                        left -= 1
                    return super().write(handle, data)
            store = DiskStore(sys.argv[1], files=Chopped())
            store.put(f"{0:064x}", bytes(40_000))
            for i in range(1, 100):
                store.put(f"{i:064x}", i.to_bytes(4, "little") * 10_000)
        """
        assert run_python(code, tmp_path / "s", writes_before).returncode == -signal.SIGKILL
        with contextlib.closing(DiskStore(tmp_path / "s")) as store:
            assert set(store.keys()) == {key(i) for i in range(writes_before + 1)}
            for i in range(1, writes_before + 1):
                assert bytes(store.get(key(i))) == value(i, IN_FILE)
            assert len(value_files(tmp_path / "s")) == writes_before + 2
            assert store.sweep() == 0
            assert store.sweep(older_than_s=-1) == 1
            assert len(value_files(tmp_path / "s")) == writes_before + 1

    def test_writer_killed_before_its_row_is_committed(self, tmp_path):
        code = """
            import os, signal, sys
            from blockrag.stores.disk import DiskStore
            store = DiskStore(sys.argv[1])
            store.put(f"{0:064x}", bytes(40_000))
            with store._write():
                store._index.execute("UPDATE Cache SET size = 7")
                store._index.values.write(memoryview(bytes(40_000)))
                os.kill(os.getpid(), signal.SIGKILL)
        """
        assert run_python(code, tmp_path / "s").returncode == -signal.SIGKILL
        with contextlib.closing(DiskStore(tmp_path / "s")) as store:
            assert bytes(store.get(key(0))) == bytes(IN_FILE)
            assert store.sweep(older_than_s=-1) == 1

    def test_forked_child_opens_its_own_connections(self, disk):
        disk.get(key(1))
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            found = disk.get(key(2))
            disk.put(key(3), b"child")
            disk.close()
            os.write(writer, b"ok" if found is not None and bytes(found) == value(2, IN_FILE) else b"no")
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == b"ok"
        os.waitpid(pid, 0)
        assert disk.get(key(3)) == b"child"
        disk.put(key(4), b"parent")

    def test_connections_of_finished_threads_are_closed(self, disk):
        def handles() -> int:
            return len(list(Path("/proc/self/fd").iterdir()))

        def read_in_a_thread() -> None:
            thread = threading.Thread(target=disk.get, args=(key(1),))
            thread.start()
            thread.join()

        # SQLite keeps a closed handle to use it again, for as long as the process has others on the same file.
        read_in_a_thread()
        before = handles()
        for _ in range(10):
            read_in_a_thread()
        assert handles() == before


class TestFullDisk:
    FILL = """
        import json, os, resource, sys
        from blockrag.errors import StoreFullError
        from blockrag.stores.disk import DiskStore
        store = DiskStore(sys.argv[1])
        size, limit = int(sys.argv[2]), int(sys.argv[3])
        stored, failed = [], 0
        def fill(numbers):
            global failed
            for i in numbers:
                try:
                    store.put(f"{i:064x}", i.to_bytes(4, "little") * (size // 4))
                    stored.append(i)
                except StoreFullError as error:
                    assert "free disk space" in str(error), error
                    failed += 1
        fill(range(2))
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        fill(range(0, int(sys.argv[4])))
        readable = all(bytes(store.get(f"{i:064x}")) == i.to_bytes(4, "little") * (size // 4) for i in stored)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        if not limit:
            if sys.argv[5]:
                os.remove(sys.argv[5])
            assert store.delete_many([f"{i:064x}" for i in stored]) == len(set(stored))
            stored.clear()
        fill(range(900, 902))
        print(json.dumps([failed, readable, sorted(set(stored))]))
        store.close()
    """

    def fill(
        self, root: Path, *, size: int, limit: int, blocks: int, filler: Path | str = ""
    ) -> tuple[int, bool, list[int]]:
        done = run_python(self.FILL, root, size, limit, blocks, filler)
        assert done.returncode == 0, done.stderr
        failed, readable, stored = json.loads(done.stdout)
        return failed, readable, stored

    def test_file_size_limit_on_value_files(self, tmp_path):
        failed, readable, stored = self.fill(tmp_path / "s", size=2_000_000, limit=1_000_000, blocks=3)
        assert (failed, readable, stored) == (3, True, [0, 1, 900, 901])
        with contextlib.closing(DiskStore(tmp_path / "s")) as store:
            assert set(store.keys()) == {key(i) for i in stored}
            assert store.sweep(older_than_s=-1) == 0

    def test_file_size_limit_on_the_index(self, tmp_path):
        failed, readable, stored = self.fill(tmp_path / "s", size=20_000, limit=400_000, blocks=60)
        assert failed > 0
        assert readable
        assert {900, 901} <= set(stored)
        with contextlib.closing(DiskStore(tmp_path / "s")) as store:
            assert set(store.keys()) == {key(i) for i in stored}

    def test_index_that_may_not_grow(self, disk, root):
        """SQLite's own page limit reports what a full disk reports, without a disk to fill."""
        disk._index.execute("PRAGMA max_page_count = 1")
        for size in (30_000, IN_FILE):
            with pytest.raises(StoreFullError, match="free disk space"):
                [disk.put(key(i), value(i, size)) for i in range(10, 400)]
        ((rows,),) = execute(root, "SELECT COUNT(*) FROM Cache WHERE filename IS NOT NULL")
        assert len(value_files(root)) == rows
        disk._index.execute("PRAGMA max_page_count = 1000000")
        disk.put(key(3), value(3, 30_000))
        assert bytes(disk.get(key(1))) == value(1)

    def test_read_only_index(self, disk, root):
        disk._index.execute("PRAGMA query_only = ON")
        for size in (SMALL, IN_FILE):
            with pytest.raises(StoreError, match="choose a directory that this user can write"):
                disk.put(key(3), value(3, size))
        with pytest.raises(StoreError, match="choose a directory that this user can write"):
            disk.delete_many([key(1)])
        assert len(value_files(root)) == 1
        disk._index.execute("PRAGMA query_only = OFF")

    @pytest.fixture
    def small_disk(self, tmp_path):
        """A file system of 2 MB."""
        mount = tmp_path / "small"
        mount.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
        if os.geteuid() or subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a file system is not allowed here")
        yield mount
        subprocess.run(["umount", str(mount)], check=True)

    @pytest.mark.parametrize("size", [20_000, 200_000], ids=["rows", "files"])
    def test_full_file_system(self, small_disk, size):
        (small_disk / "filler").write_bytes(bytes(600_000))
        failed, readable, stored = self.fill(
            small_disk / "s", size=size, limit=0, blocks=100, filler=small_disk / "filler"
        )
        assert (failed > 0, readable, stored) == (True, True, [900, 901])

    def test_deleting_makes_room_on_a_full_file_system(self, small_disk):
        """The transaction that deletes needs room as well; the value files it is about make it."""
        with contextlib.closing(DiskStore(small_disk / "s")) as store:
            for i in range(3):
                store.put(key(i), value(i, 200_000))
            with contextlib.suppress(OSError), (small_disk / "filler").open("wb", buffering=0) as filler:
                while filler.write(bytes(4096)):
                    pass
            for size in (SMALL, IN_FILE):
                with pytest.raises(StoreFullError, match="free disk space"):
                    store.put(key(9), value(9, size))
            assert store.delete_many([key(1), key(2), key(7)]) == 2
            assert list(store.keys()) == [key(0)]
            store.put(key(9), value(9, 200_000))
            assert bytes(store.get(key(0))) == value(0, 200_000)


def test_the_disk_store_reads_into_the_same_memory_once_a_value_is_dropped(tmp_path):
    store = DiskStore(tmp_path)
    for number in range(6):
        store.put(key(number), value(number, IN_FILE))
    addresses = set()
    for wanted, view in store.get_many([key(number) for number in range(6)]):
        assert view == value(int(wanted, 16), IN_FILE)
        addresses.add(torch.frombuffer(view, dtype=torch.uint8).data_ptr())
        del view
    store.close()
    # The first buffer may move when its length is changed the first time.
    assert len(addresses) <= 2
