"""Blocks in Redis, against a redis-server of the tests' own."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import closing
from urllib.parse import quote

import pytest
import redis
from reliability.blocks import block, key
from store_servers import Proxy, redis_server

from blockrag.errors import InputError, StoreError, StoreFullError
from blockrag.stores import open_store
from blockrag.stores import redis_store as redis_module

SIZE = 16_384


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("redis")


@pytest.fixture(scope="module")
def port(directory):
    with redis_server(directory) as (_, port):
        yield port


@pytest.fixture
def raw(port):
    """The server itself, emptied."""
    with closing(redis.Redis(port=port)) as client:
        client.flushall()
        client.config_set("maxmemory", 0)
        yield client


@pytest.fixture
def store(raw, port):
    with closing(open_store(f"redis://127.0.0.1:{port}?deadline=30")) as store:
        yield store


@pytest.fixture
def proxy(port):
    proxy = Proxy(port)
    yield proxy
    proxy.close()


def test_values_lie_under_their_keys(store, raw):
    store.put(key(1), block(1, SIZE))
    assert raw.keys() == [f"blockrag:1:{key(1)}".encode()]
    assert raw.get(f"blockrag:1:{key(1)}") == block(1, SIZE)


def test_what_others_keep_there_is_left_alone(store, raw):
    raw.set("theirs", "x")
    raw.set("blockrag:1:nonsense", "x")
    store.put(key(1), block(1, SIZE))
    assert list(store.keys()) == [key(1)]
    assert store.verify(fix=True).ok
    assert store.delete_many(store.keys()) == 1
    assert set(raw.keys()) == {b"theirs", b"blockrag:1:nonsense"}


def test_databases_are_apart(store, port):
    store.put(key(1), block(1, SIZE))
    with closing(open_store(f"redis://127.0.0.1:{port}/3")) as other:
        assert other.get(key(1)) is None


def test_a_socket_will_do(store, directory):
    store.put(key(1), block(1, SIZE))
    with closing(open_store(f"redis+unix://{quote(str(directory))}/redis.sock")) as other:
        assert other.get(key(1)) == block(1, SIZE)
        with closing(open_store(other.url)) as again:
            assert again.url == other.url


def test_many_keys_are_listed_once_each(store):
    for i in range(1500):
        store.put(key(i), b"x")
    assert sorted(store.keys()) == sorted(key(i) for i in range(1500))
    assert store.contains_many(key(i) for i in range(1000, 2000)) == {key(i) for i in range(1000, 1500)}
    assert store.delete_many(key(i) for i in range(2000)) == 1500


def test_a_value_above_the_servers_limit_is_refused_before_it_is_sent(store):
    data = memoryview(bytearray(512 * 1024 * 1024 + 1))
    with pytest.raises(StoreFullError, match=r"exceeds Redis's limit of 536870912 bytes per value; split the passage"):
        store.put(key(1), data)
    assert list(store.keys()) == []


def test_a_server_without_memory_is_full(store, raw):
    store.put(key(1), block(1, SIZE))
    raw.config_set("maxmemory", 1)
    with pytest.raises(StoreFullError, match="raise the server's maxmemory, or set maxmemory-policy allkeys-lru"):
        store.put(key(2), block(2, SIZE))
    assert store.get(key(1)) == block(1, SIZE)
    raw.config_set("maxmemory", 0)
    store.put(key(2), block(2, SIZE))


def test_the_servers_own_eviction_is_a_miss(store, raw):
    raw.config_set("maxmemory", raw.info("memory")["used_memory"] + 500_000)
    raw.config_set("maxmemory-policy", "allkeys-lru")
    for i in range(100):
        store.put(key(i), block(i, SIZE))
    raw.config_set("maxmemory-policy", "noeviction")
    found = list(store.get_many([key(i) for i in range(100)]))
    assert {data is None for _, data in found} == {True, False}
    assert all(data is None or data == block(i, SIZE) for i, (_, data) in enumerate(found))
    assert store.stats().failures == 0


def test_fingerprints_that_are_none_are_left_out(store, raw, caplog):
    raw.hset("blockrag:1:fingerprints", mapping={b"ab": b"nonsense", b"\xff": b"\xff"})
    assert store.fingerprints() == {}
    assert caplog.text.count("cannot be read") == 2


@pytest.mark.parametrize("fault", ["stall", "reset", "partial", "slow", "flip"])
def test_no_wrong_block_and_no_exception(store, proxy, fault):
    wanted = [key(i) for i in range(8)]
    for i in range(8):
        store.put(key(i), block(i, SIZE))
    with closing(open_store(f"redis://127.0.0.1:{proxy.port}?deadline=30")) as behind:
        assert list(behind.get_many(wanted)) == [(key(i), block(i, SIZE)) for i in range(8)]
    with closing(open_store(f"redis://127.0.0.1:{proxy.port}?deadline=0.5")) as behind:
        proxy.fault = fault
        assert list(behind.get_many(wanted)) == [(name, None) for name in wanted]
        assert behind.stats().failures == 8
        if fault != "flip":
            assert list(behind.get_many(wanted)) == [(name, None) for name in wanted]
            assert behind.contains_many(wanted) == set()
            with pytest.raises(StoreError, match="has not been answering"):
                behind.put(key(9), block(9, SIZE))


def test_who_waited_in_vain_does_not_wait_for_fingerprints(store, proxy):
    with closing(open_store(f"redis://127.0.0.1:{proxy.port}?deadline=0.3")) as behind:
        proxy.fault = "stall"
        assert behind.get(key(1)) is None
        with pytest.raises(StoreError, match="has not been answering; try again in some seconds"):
            behind.fingerprints()


def test_what_is_late_is_not_asked_for_again(store, proxy):
    with closing(open_store(f"redis://127.0.0.1:{proxy.port}?deadline=0.3")) as behind:
        proxy.fault = "stall"
        before = proxy.connections
        assert behind.contains_many([key(1)]) == set()
        assert proxy.connections == before + 1


def test_closing_while_others_use_it_raises_nothing_else(store, port):
    for i in range(16):
        store.put(key(i), block(i, 1 << 19))

    def use(call: Callable[[], object]) -> None:
        try:
            while True:
                call()
        except StoreError:
            pass
        except BaseException as error:
            wrong.append(repr(error))

    wrong: list[str] = []
    for _ in range(6):
        shared = open_store(f"redis://127.0.0.1:{port}")
        calls = [
            lambda store=shared: list(store.get_many([key(i) for i in range(16)])),
            lambda store=shared: store.put(key(20), block(20, 1 << 19)),
            lambda store=shared: store.contains_many(key(i) for i in range(2000)),
        ]
        users = [threading.Thread(target=use, args=(call,)) for call in calls]
        for user in users:
            user.start()
        time.sleep(0.1)
        shared.close()
        for user in users:
            user.join()
    assert wrong == []


def test_a_connection_that_the_server_closed_is_made_again(store, raw):
    store.put(key(1), block(1, SIZE))
    raw.client_kill_filter(_type="normal", skipme=True)
    assert store.get(key(1)) == block(1, SIZE)
    raw.client_kill_filter(_type="normal", skipme=True)
    store.put(key(2), block(2, SIZE))
    assert store.stats().failures == 0


def test_a_write_fails_with_the_reason(store, proxy):
    with closing(open_store(f"redis://127.0.0.1:{proxy.port}?deadline=0.3")) as behind:
        proxy.fault = "reset"
        with pytest.raises(StoreError, match=r"failed: .*; check that it can be reached"):
            behind.put(key(9), block(9, SIZE))
        with pytest.raises(StoreError, match="check that it can be reached"):
            list(behind.keys())


def test_nobody_there():
    with pytest.raises(StoreError, match="check that it can be reached"):
        open_store("redis://127.0.0.1:1")


@pytest.fixture(scope="module")
def guarded(tmp_path_factory):
    with redis_server(tmp_path_factory.mktemp("guarded"), "--requirepass", "s3cret") as (_, port):
        yield port


class TestPassword:
    def test_comes_from_the_environment(self, guarded, monkeypatch, caplog):
        monkeypatch.setenv("BLOCKRAG_REDIS_PASSWORD", "s3cret")
        with closing(open_store(f"redis://127.0.0.1:{guarded}")) as store:
            store.put(key(1), block(1, SIZE))
            assert store.get(key(1)) == block(1, SIZE)
            assert "s3cret" not in store.url + caplog.text

    @pytest.mark.parametrize("password", [None, "wr0ng"])
    def test_without_the_right_one_nothing_is_opened(self, guarded, monkeypatch, password):
        if password is not None:
            monkeypatch.setenv("BLOCKRAG_REDIS_PASSWORD", password)
        with pytest.raises(StoreError, match="set BLOCKRAG_REDIS_PASSWORD") as error:
            open_store(f"redis://127.0.0.1:{guarded}")
        assert "wr0ng" not in str(error.value)

    @pytest.mark.parametrize(
        "url",
        ["redis://:s3cret@host", "redis://me:s3?cret@host/1", "rediss://me:s3/cret@host", "reddis://:s3cret@host"],
    )
    def test_in_a_url_is_refused_and_not_repeated(self, url):
        with pytest.raises(InputError) as error:
            open_store(url)
        assert "s3" not in str(error.value).replace("s3://", "")
        assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("redis://", "write redis://host:port/db"),
        ("redis://host/name", "write redis://host:port/db"),
        ("redis://host:port", "write redis://host:port/db"),
        ("rediss://a:1:2", "write rediss://host:port/db"),
        ("redis+unix://relative", "names no socket; write redis+unix:///path"),
        ("redis://host?max_bytes=1GB", "set its maxmemory"),
        ("redis://host?password=x", "set BLOCKRAG_REDIS_PASSWORD in the environment"),
        ("redis://host?db=1", "only deadline may be given"),
    ],
)
def test_urls_that_cannot_be_used(url, said):
    with pytest.raises(InputError) as error:
        open_store(url)
    assert said in str(error.value)


def test_tls_and_six_colons():
    address, shown = redis_module._address("rediss://[::1]:7000/2")
    assert address == {"host": "::1", "port": 7000, "db": 2, "ssl": True}
    assert shown == "rediss://[::1]:7000/2"


def test_without_the_library_the_pip_line_is_said():
    code = """
        import sys
        sys.modules["redis"] = None
        from blockrag.errors import MissingDependencyError
        from blockrag.stores import open_store
        try:
            open_store("redis://host")
        except MissingDependencyError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    assert "needs redis; run: pip install 'blockrag[redis]'" in done.stdout
