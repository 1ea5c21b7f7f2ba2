"""What every store promises, asked of those behind a network and of tiers, against real servers."""

from __future__ import annotations

from itertools import count

import pytest
import test_stores
from store_servers import redis_server, s3_server
from test_stores import IN_FILE, SMALL, key, value, wrong_reads_in_threads

from blockrag.stores import BlockStore, DiskStore, MemoryStore, TieredStore, open_store

KINDS = ["s3", "file", "memory:///", "redis", "tiered"]


@pytest.fixture(scope="module")
def s3(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as (_, port):
        yield port


@pytest.fixture(scope="module")
def redis(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("redis")) as (_, port):
        yield port


NUMBERS = count()


@pytest.fixture(params=KINDS)
def make_store(request, tmp_path, monkeypatch):
    """Opens new, empty stores of one kind, and closes them."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    opened: list[BlockStore] = []

    def make() -> BlockStore:
        number = next(NUMBERS)
        if request.param == "s3":
            endpoint = f"http://127.0.0.1:{request.getfixturevalue('s3')}"
            store = open_store(f"s3://bucket/{number}?endpoint={endpoint}&allow_http=true&region=us-east-1&deadline=60")
        elif request.param == "file":
            store = open_store(f"file://{tmp_path}/a%20b%3F{number}")
        elif request.param == "redis":
            store = open_store(f"redis://127.0.0.1:{request.getfixturevalue('redis')}/{number % 16}?deadline=60")
            store.delete_many(store.keys())
        elif request.param == "tiered":
            store = TieredStore([MemoryStore(500), DiskStore(tmp_path / f"store{number}")])
        else:
            store = open_store("memory:///")
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def store(make_store):
    return make_store()


class TestContract(test_stores.TestEveryStore):
    """Those that are about counts and budgets are asked in other words: these stores have none, or not of their own."""

    @pytest.mark.parametrize("new", [SMALL, IN_FILE])
    @pytest.mark.parametrize("old", [SMALL, IN_FILE])
    def test_put_replaces(self, store, old, new):
        store.put(key(1), value(1, old))
        view = store.get(key(1))
        store.put(key(1), value(2, new))
        assert bytes(store.get(key(1))) == value(2, new)
        assert bytes(view) == value(1, old)
        assert list(store.keys()) == [key(1)]

    def test_contains_delete_and_keys(self, store):
        for i in range(200):
            store.put(key(i), value(i, SMALL if i % 2 else IN_FILE))
        assert store.contains_many(key(i) for i in range(150, 250)) == {key(i) for i in range(150, 200)}
        assert store.delete_many(key(i) for i in [*range(90), 5, 999]) == 90
        assert sorted(store.keys()) == [key(i) for i in range(90, 200)]
        assert store.get(key(5)) is None

    def test_stats_count_traffic(self, store):
        for i in range(3):
            store.put(key(i), value(i))
        store.get(key(0))
        list(store.get_many([key(1), key(5), key(2)]))
        store.contains_many([key(1)])
        stats = store.stats()
        assert (stats.hits, stats.misses, stats.puts, stats.evictions, stats.failures) == (3, 1, 3, 0, 0)
        assert (stats.blocks, stats.bytes) in ((None, None), (3, 3 * SMALL))
        assert stats.max_bytes is None

    @pytest.mark.parametrize("bad", ["", "x", "AB" * 32, "../" * 21 + "a", key(1) + "\n", "\0" * 64, "é" * 64, None, 5])
    def test_malformed_keys_are_refused(self, make_store, bad):
        store = make_store()
        super().test_malformed_keys_are_refused(_CountedByListing(store), bad)

    @pytest.mark.parametrize("size", [SMALL, IN_FILE])
    def test_threads_share_a_store(self, store, size):
        assert wrong_reads_in_threads(store, size) == 0
        assert set(store.keys()) == {key(i) for i in [*range(25), *range(100, 125)]}
        assert store.stats().puts == 150
        assert store.stats().failures == 0

    def test_url_opens_the_same_kind(self, store):
        store.put(key(1), b"x")
        again = open_store(store.url)
        assert type(again) is type(store)
        assert again.url == store.url
        again.close()


class _CountedByListing:
    """A store whose statistics count its blocks, for a test that asks nothing else of them."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def __getattr__(self, name):
        return getattr(self._store, name)

    def stats(self):
        from types import SimpleNamespace

        return SimpleNamespace(blocks=len(list(self._store.keys())))
