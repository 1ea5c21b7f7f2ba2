"""Blocks in buckets and in directories laid out like one: what lies there, who may read it, and what goes wrong."""

from __future__ import annotations

import json
import logging
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import obstore
import pytest
from obstore.exceptions import GenericError
from obstore.store import S3Store
from reliability.blocks import FINGERPRINT, block, key
from store_servers import Proxy, s3_server

from blockrag.errors import InputError, MissingDependencyError, StoreError, StoreFullError, UnsafeStoreError
from blockrag.fingerprint import Fingerprint
from blockrag.stores import ObjectStore, open_store, remote_store
from blockrag.stores.object_backend import ObjectOptions, connect, explain
from blockrag.stores.report import check_blocks

SIZE = 16_384
TESTS = str(Path(__file__).parent)
WRITER = Fingerprint(
    weights="w", config="c", rope="r", tokenizer="t", template="t", compute_dtype="float32", precision="int8"
)


@pytest.fixture(scope="module")
def moto(tmp_path_factory):
    with s3_server(tmp_path_factory.mktemp("s3")) as (_, port):
        yield port


@pytest.fixture(autouse=True)
def credentials(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("AWS_", "AZURE_", "GOOGLE_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")


@pytest.fixture
def prefix(request):
    """A prefix of the bucket for one test."""
    return f"{request.node.name}".replace("[", "-").replace("]", "")


@pytest.fixture
def bucket(moto, prefix):
    """What lies below the prefix, to be read and damaged behind the store's back."""
    return S3Store(
        "bucket",
        prefix=prefix,
        config={"endpoint": f"http://127.0.0.1:{moto}", "region": "us-east-1"},
        client_options={"allow_http": True},
    )


def url(port: int, prefix: str, deadline: float = 30) -> str:
    return f"s3://bucket/{prefix}?endpoint=http://127.0.0.1:{port}&allow_http=true&region=us-east-1&deadline={deadline}"


@pytest.fixture
def store(moto, prefix):
    with closing(open_store(url(moto, prefix))) as store:
        yield store


@pytest.fixture
def proxy(moto):
    proxy = Proxy(moto)
    yield proxy
    proxy.close()


def name_of(number: int) -> str:
    return f"blocks/{key(number)[:2]}/{key(number)[2:]}"


def names(bucket) -> set[str]:
    return {entry["path"] for portion in obstore.list(bucket) for entry in portion}


def flipped(data: bytes, place: int) -> bytes:
    changed = bytearray(data)
    changed[place] ^= 1
    return bytes(changed)


class TestLayout:
    def test_objects_are_where_they_are_said_to_be(self, store, bucket):
        store.put(key(1), block(1, SIZE))
        store.remember_fingerprint(WRITER)
        assert store.write_manifest() == 1
        assert names(bucket) == {
            "format.json",
            name_of(1),
            f"fingerprints/{WRITER.digest}.json",
            "manifest.jsonl",
        }
        assert bytes(obstore.get(bucket, name_of(1)).bytes()) == block(1, SIZE)
        assert json.loads(bytes(obstore.get(bucket, "format.json").bytes())) == {"format": 1}

    def test_opening_and_reading_write_nothing(self, store, bucket):
        assert store.get(key(1)) is None
        assert list(store.keys()) == []
        assert store.verify().ok
        assert names(bucket) == set()

    def test_another_format_is_refused_by_name(self, moto, prefix, bucket):
        obstore.put(bucket, "format.json", b'{"format": 2}')
        with pytest.raises(StoreError, match="has format 2, this release reads 1; upgrade blockrag"):
            open_store(url(moto, prefix))

    @pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b"\xff", b"null", b"[" * 100_000])
    def test_what_is_no_format_is_refused(self, moto, prefix, bucket, text):
        obstore.put(bucket, "format.json", text)
        with pytest.raises(StoreError, match=r"format\.json is not a block store's: use another prefix"):
            open_store(url(moto, prefix))

    def test_foreign_objects_are_no_blocks(self, store, bucket):
        store.put(key(1), block(1, SIZE))
        for name in ("blocks/zz/x", "blocks/readme", f"blocks/{key(2)}"):
            obstore.put(bucket, name, b"x")
        assert list(store.keys()) == [key(1)]
        report = store.verify(fix=True)
        assert {(fault.kind, fault.where, fault.fixed) for fault in report.faults} == {
            ("foreign", "blocks/zz/x", False),
            ("foreign", "blocks/readme", False),
            ("foreign", f"blocks/{key(2)}", False),
        }

    def test_a_fingerprint_that_is_none_is_left_out(self, store, bucket, caplog):
        store.put(key(1), block(1, SIZE))
        obstore.put(bucket, f"fingerprints/{'ab' * 16}.json", b"nonsense")
        obstore.put(bucket, "fingerprints/other.json", b"nonsense")
        assert store.fingerprints() == {}
        assert "cannot be read" in caplog.text


class TestWriteOnce:
    def test_the_same_block_is_not_written_twice(self, store, bucket, moto, prefix):
        store.put(key(1), block(1, SIZE))
        before = obstore.head(bucket, name_of(1))
        with closing(open_store(url(moto, prefix))) as other:
            other.put(key(1), block(1, SIZE))
            assert other.stats().puts == 1
        assert obstore.head(bucket, name_of(1))["last_modified"] == before["last_modified"]

    @pytest.mark.parametrize(
        "damage",
        [lambda data: data[:-1], lambda data: b"", lambda data: flipped(data, 3), lambda data: flipped(data, 20)],
        ids=["short", "empty", "magic", "checksum"],
    )
    def test_what_is_not_the_same_is_replaced(self, store, bucket, damage):
        store.put(key(1), block(1, SIZE))
        obstore.put(bucket, name_of(1), damage(block(1, SIZE)))
        store.put(key(1), block(1, SIZE))
        assert bytes(obstore.get(bucket, name_of(1)).bytes()) == block(1, SIZE)

    def test_a_damaged_block_that_was_seen_is_replaced(self, store, bucket):
        store.put(key(1), block(1, SIZE))
        obstore.put(bucket, name_of(1), flipped(block(1, SIZE), SIZE - 1))
        assert store.get(key(1)) is None
        assert store.stats().failures == 1
        store.put(key(1), block(1, SIZE))
        assert store.get(key(1)) == block(1, SIZE)

    def test_a_server_without_conditions_will_do(self, moto, prefix, bucket, monkeypatch):
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
        obstore.put(bucket, "format.json", b'{"format": 1}')
        with closing(open_store(url(moto, prefix))) as store:
            for _ in range(2):
                store.put(key(1), block(1, SIZE))
            assert store.get(key(1)) == block(1, SIZE)

    def test_a_new_store_can_be_made_there_too(self, moto, prefix, bucket, monkeypatch):
        monkeypatch.setenv("AWS_CONDITIONAL_PUT", "disabled")
        for _ in range(2):
            with closing(open_store(url(moto, prefix))) as store:
                store.remember_fingerprint(WRITER)
                store.put(key(1), block(1, SIZE))
                assert store.fingerprints() == {WRITER.digest: WRITER}
        assert len(names(bucket)) == 3

    def test_two_processes_write_the_same_keys(self, moto, prefix, store):
        code = """
            import sys
            sys.path.insert(0, sys.argv[2])
            from reliability.blocks import block, key
            from blockrag.stores import open_store
            store = open_store(sys.argv[1])
            for i in range(40):
                store.put(key(i), block(i, 16384))
            print(store.stats().puts, store.stats().failures)
            store.close()
        """
        command = [sys.executable, "-c", textwrap.dedent(code), url(moto, prefix), TESTS]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate()[0].split() for process in running] == [["40", "0"]] * 2
        report = store.verify()
        assert (report.blocks, report.faults) == (40, ())


class TestManifest:
    def test_names_bytes_fingerprint_and_checksum(self, store, bucket):
        sizes = {i: 2048 + 32 * i for i in range(30)}
        for i, size in sizes.items():
            store.put(key(i), block(i, size))
        assert store.write_manifest() == 30
        lines = [json.loads(line) for line in bytes(obstore.get(bucket, "manifest.jsonl").bytes()).splitlines()]
        expected = {key(i): (size, FINGERPRINT, block(i, size)[16:32].hex()) for i, size in sizes.items()}
        assert {line["key"]: (line["bytes"], line["fingerprint"], line["checksum"]) for line in lines} == expected
        assert [line["key"] for line in lines] == sorted(expected)

    def test_what_it_names_and_is_not_there_is_missing(self, store, bucket):
        for i in range(3):
            store.put(key(i), block(i, SIZE))
        store.write_manifest()
        obstore.delete(bucket, name_of(1))
        store.put(key(7), block(7, SIZE))
        (fault,) = store.verify().faults
        assert (fault.kind, fault.where, fault.fixed) == ("missing", key(1), False)
        assert store.verify(fix=True).ok
        assert store.verify().faults == ()

    @pytest.mark.parametrize(
        "text", [b"nonsense", b"{}", b"[]", b'{"key": "x", "bytes": 1, "fingerprint": "x", "checksum": "x"}', b"\xff"]
    )
    def test_a_damaged_one_is_written_anew(self, store, bucket, text):
        store.put(key(1), block(1, SIZE))
        store.write_manifest()
        obstore.put(bucket, "manifest.jsonl", bytes(obstore.get(bucket, "manifest.jsonl").bytes()) + text + b"\n")
        (fault,) = store.verify().faults
        assert (fault.kind, fault.where) == ("damaged", "manifest.jsonl")
        assert "line 2" in fault.message
        assert store.verify(fix=True).ok
        assert store.verify().faults == ()

    def test_a_block_without_a_header_is_left_out(self, store, bucket, caplog):
        store.put(key(1), block(1, SIZE))
        obstore.put(bucket, name_of(2), b"x" * 200)
        assert store.write_manifest() == 1
        assert f"block {key(2)[:12]}... is left out of the manifest" in caplog.text

    def test_nor_is_an_empty_one_a_fault_of_the_server(self, store, bucket, caplog):
        store.put(key(1), block(1, SIZE))
        obstore.delete(bucket, name_of(1))
        for i in range(8):
            obstore.put(bucket, name_of(i), b"")
        assert store.write_manifest() == 0
        assert caplog.text.count("is left out of the manifest") == 8
        assert store.stats().failures == 0


class TestFaults:
    """Between store and server a connection that stalls, ends, lies or crawls."""

    @pytest.fixture
    def filled(self, store):
        for i in range(8):
            store.put(key(i), block(i, SIZE))

    @pytest.mark.parametrize("fault", ["stall", "reset", "error", "partial", "slow", "flip"])
    def test_no_wrong_block_and_no_exception(self, filled, proxy, prefix, fault):
        wanted = [key(i) for i in range(8)]
        with closing(open_store(url(proxy.port, prefix, deadline=30))) as store:
            assert list(store.get_many(wanted)) == [(key(i), block(i, SIZE)) for i in range(8)]
        with closing(open_store(url(proxy.port, prefix, deadline=0.5))) as store:
            proxy.fault = fault
            assert list(store.get_many(wanted)) == [(name, None) for name in wanted]
            assert store.stats().failures == 8
            if fault != "flip":
                connections = proxy.connections
                assert list(store.get_many(wanted)) == [(name, None) for name in wanted]
                assert store.contains_many(wanted) == set()
                with pytest.raises(StoreError, match="has not been answering"):
                    store.put(key(9), block(9, SIZE))
                assert proxy.connections == connections

    @pytest.mark.parametrize("fault", ["reset", "error"])
    def test_writes_fail_with_the_reason(self, filled, proxy, prefix, fault):
        with closing(open_store(url(proxy.port, prefix, deadline=2))) as store:
            proxy.fault = fault
            with pytest.raises(StoreError, match=r"failed: .*; check that it can be reached"):
                store.put(key(9), block(9, SIZE))
            proxy.fault = "none"
            assert store.get(key(1)) == block(1, SIZE)
            store.put(key(9), block(9, SIZE))
            assert store.get(key(9)) == block(9, SIZE)

    def test_who_waited_in_vain_does_not_wait_to_write(self, filled, proxy, prefix):
        with closing(open_store(url(proxy.port, prefix, deadline=0.3))) as store:
            proxy.fault = "stall"
            assert store.get(key(1)) is None
            connections = proxy.connections
            with pytest.raises(StoreError, match="has not been answering; try again in some seconds"):
                store.put(key(9), block(9, SIZE))
            assert proxy.connections == connections

    def test_nor_for_fingerprints(self, filled, proxy, prefix):
        with closing(open_store(url(proxy.port, prefix, deadline=0.3))) as store:
            proxy.fault = "stall"
            assert store.get(key(1)) is None
            with pytest.raises(StoreError, match="has not been answering; try again in some seconds"):
                store.fingerprints()

    def test_what_cannot_be_asked_for_is_not_said_to_be_deleted(self, filled, proxy, prefix):
        with closing(open_store(url(proxy.port, prefix, deadline=2))) as store:
            proxy.fault = "reset"
            with pytest.raises(StoreError, match="check that it can be reached"):
                store.delete_many([key(1)])
            proxy.fault = "none"
            assert store.get(key(1)) == block(1, SIZE)

    def test_what_was_replaced_or_deleted_while_it_is_checked_is_left_alone(self, store, bucket, monkeypatch):
        for i in range(4):
            store.put(key(i), block(i, SIZE))
        for i in range(1, 4):
            obstore.put(bucket, name_of(i), flipped(block(i, SIZE), SIZE - 1))

        def check(*arguments, **named):
            """The check itself, after which somebody else was faster with two of its findings."""
            report = check_blocks(*arguments, **named)
            obstore.put(bucket, name_of(1), block(1, SIZE))
            obstore.delete(bucket, name_of(2))
            return report

        monkeypatch.setattr(remote_store, "check_blocks", check)
        report = store.verify(fix=True)
        assert [fault.where for fault in report.faults] == [key(i) for i in sorted(range(1, 4), key=key)]
        assert report.ok
        assert sorted(store.keys()) == sorted([key(0), key(1)])

    def test_a_check_takes_what_cannot_be_read_for_no_damage(self, filled, proxy, prefix, bucket):
        with closing(open_store(url(proxy.port, prefix, deadline=5))) as store:
            proxy.fault = "partial"
            with pytest.raises(StoreError, match="failed"):
                store.verify(fix=True)
            proxy.fault = "none"
            assert store.verify().ok
        assert len(names(bucket)) == 9

    def test_a_check_tells_late_from_damaged_and_removes_neither(self, filled, moto, prefix, bucket):
        # obstore asks for the rest of what ends in the middle, twice.
        proxy = Proxy(moto, after=10_000)
        with closing(open_store(url(proxy.port, prefix))) as store:
            for i in range(8):
                store.put(key(i), block(i, 4 * SIZE))
            # The list arrives, the blocks do not.
            proxy.fault = "partial"
            report = store.verify(fix=True)
            assert (report.blocks, report.ok) == (0, False)
            assert {(fault.kind, fault.fixed) for fault in report.faults} == {("unreadable", False)}
            assert {fault.where for fault in report.faults} == {key(i) for i in range(8)}
        proxy.close()
        assert len(names(bucket)) == 9

    def test_what_is_refused_is_missing_and_says_nothing_about_the_server(self, filled, proxy, prefix, caplog):
        """S3 says 403 for an object that is not there to whoever may not list the bucket."""
        with closing(open_store(url(proxy.port, prefix))) as store:
            proxy.fault = "denied"
            assert list(store.get_many([key(i) for i in range(8)])) == [(key(i), None) for i in range(8)]
            for i in range(6):
                with pytest.raises(StoreError, match=r"set AWS_ACCESS_KEY_ID .*, with the rights it needs"):
                    store.put(key(i), block(i, SIZE))
            proxy.fault = "none"
            assert store.get(key(1)) == block(1, SIZE)
            assert store.stats().failures == 14
            assert "has not been answering" not in caplog.text

    def test_without_any_rights_nothing_is_opened(self, proxy, prefix):
        proxy.fault = "denied"
        with pytest.raises(StoreError, match="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment"):
            open_store(url(proxy.port, prefix))

    def test_without_credentials_they_are_asked_for(self):
        """What obstore says then, on a machine that is none of a cloud's."""
        asked = GenericError("Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 1 ms")
        explained = explain(asked, store="s3://bucket", scheme="s3")
        assert "this machine has no role: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in str(explained.error)
        assert explained.unanswered

    def test_a_server_that_cannot_be_reached_does_not_open(self, proxy, prefix):
        proxy.fault = "reset"
        with pytest.raises(StoreError, match="check that it can be reached"):
            open_store(url(proxy.port, prefix, deadline=0.5))

    def test_a_bucket_that_is_not_there_is_named_when_it_is_written(self, moto):
        with closing(open_store(url(moto, "x").replace("//bucket", "//nowhere"))) as store:
            assert store.get(key(1)) is None
            with pytest.raises(StoreError, match="create the bucket, or correct its name"):
                store.put(key(1), block(1, SIZE))


class TestUrls:
    @pytest.mark.parametrize(
        ("bad", "said"),
        [
            ("s3://key:secret@bucket/x", "no credentials in a URL; set AWS_ACCESS_KEY_ID"),
            ("s3://key:se/cret@bucket/x", "no credentials in a URL"),
            ("az://secret@container", "no credentials in a URL; set AZURE_STORAGE_ACCOUNT_NAME"),
            ("s3://bucket?endpoint=https://key:secret@host", "no credentials in"),
            ("s3://bucket?max_bytes=1GB", "max_bytes is not possible here; nothing is evicted from a bucket"),
            ("memory:///?max_bytes=1GB", "nothing is evicted"),
            ("file:///x?max_bytes=1GB", "nothing is evicted"),
            ("s3://", "names no bucket"),
            ("gs:///x", "names no bucket"),
            ("gs://bucket?endpoint=https://x", "only deadline may be given"),
            ("az://container?region=x", "only allow_http, deadline, endpoint may be given"),
            ("file:///", "write file:///absolute/path"),
            ("file://relative/x", "write file:///absolute/path"),
            ("file://", "write file:///absolute/path"),
            ("memory:///x", "has no path"),
            ("s3://bucket?deadline=soon", "deadline='soon' is not a number"),
            ("s3://bucket?deadline=0", "pass more than 0"),
            ("s3://bucket?allow_http=1", "write true or false"),
            ("s3://bucket?endpoint=host:9000", "is no URL; write https://host:port"),
            ("s3://bucket?endpoint=http://host", "is not encrypted; use https://, or add allow_http=true"),
            ("s3://bucket?endpoint=key:secret@host", "no credentials in the endpoint"),
            ("s3://bucket?password=secret", "unknown or repeated parameters"),
            ("az://container", "Account must be specified"),
        ],
    )
    def test_what_cannot_be_used_is_refused_without_telling_secrets(self, bad, said, tmp_path):
        with pytest.raises(InputError) as error:
            open_store(bad)
        assert said in str(error.value)
        assert "cret" not in str(error.value).replace("password=secret", "")

    def test_parameters_come_back(self, moto, prefix):
        with closing(open_store(url(moto, prefix, deadline=0.25))) as store:
            assert "deadline=0.25" in store.url
            assert f"endpoint=http://127.0.0.1:{moto}" in store.url
            assert "allow_http=true" in store.url
            assert "region=us-east-1" in store.url
            assert "test" not in store.url.replace(prefix, "")

    def test_other_providers_are_known(self, monkeypatch):
        """Nothing of them is here to be asked."""
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "nobody")
        monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "eA==")
        for scheme in ("gs", "az"):
            reads, writes = connect(f"{scheme}://place/some/prefix", scheme, ObjectOptions(None, None, False), 1.0)
            assert reads.prefix == writes.prefix == "some/prefix"
            assert reads.client_options["timeout"] != writes.client_options["timeout"]

    def test_a_slash_at_the_end_means_nothing(self, moto, prefix, store):
        store.put(key(1), block(1, SIZE))
        with closing(open_store(url(moto, f"{prefix}/"))) as again:
            assert again.url == store.url
            assert again.get(key(1)) == block(1, SIZE)

    def test_without_the_library_the_pip_line_is_said(self):
        code = """
            import sys
            sys.modules["obstore"] = None
            from blockrag.errors import MissingDependencyError
            from blockrag.stores import open_store
            try:
                open_store("memory:///")
            except MissingDependencyError as error:
                print(error)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        assert "needs obstore; run: pip install 'blockrag[object]'" in done.stdout

    def test_the_option_is_for_the_class_too(self):
        with pytest.raises(InputError, match="region is for s3:// only"):
            ObjectStore("gs://bucket", region="x")
        with pytest.raises(InputError, match="endpoint and allow_http are for s3:// and az:// only"):
            ObjectStore("gs://bucket", endpoint="https://x")


class TestDirectory:
    @pytest.fixture
    def root(self, tmp_path):
        return tmp_path / "shared"

    @pytest.fixture
    def local(self, root):
        with closing(open_store(f"file://{root}")) as store:
            store.put(key(1), block(1, SIZE))
            yield store

    def test_only_its_owner_reads_it(self, root):
        old = os.umask(0)
        try:
            with closing(open_store(f"file://{root}")) as store:
                store.put(key(1), block(1, SIZE))
                store.put(key(1), b"replaced")
        finally:
            os.umask(old)
        assert stat.S_IMODE(root.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_file()} == {0o600}

    def test_a_directory_with_other_things_is_refused(self, tmp_path):
        (tmp_path / "thesis.txt").write_text("x")
        mode = tmp_path.stat().st_mode
        with pytest.raises(StoreError, match="is neither empty nor a store; choose another directory"):
            open_store(f"file://{tmp_path}")
        assert tmp_path.stat().st_mode == mode

    def test_many_may_make_it_at_the_same_time(self, tmp_path):
        def make(root: Path, number: int) -> None:
            started.wait()
            with closing(open_store(f"file://{root}")) as store:
                store.put(key(number), block(number, SIZE))

        for attempt in range(20):
            root, started = tmp_path / str(attempt), threading.Barrier(8)
            with ThreadPoolExecutor(8) as threads:
                for done in [threads.submit(make, root, number) for number in range(8)]:
                    done.result()

    def test_who_was_killed_while_making_it_does_not_spoil_it(self, root):
        root.mkdir()
        (root / "format.json#1").write_bytes(b"")
        with closing(open_store(f"file://{root}")) as store:
            store.put(key(1), block(1, SIZE))
            assert store.verify().ok

    def test_a_path_that_is_a_file_is_refused(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(StoreError, match="choose a directory that can be written"):
            open_store(f"file://{tmp_path}/file")

    def test_links_and_pipes_are_refused(self, local, root, tmp_path):
        (tmp_path / "secret").write_bytes(block(2, SIZE))
        place = root / name_of(2)
        place.parent.mkdir(exist_ok=True)
        place.symlink_to(tmp_path / "secret")
        calls = [
            lambda: local.get(key(2)),
            lambda: local.contains_many([key(2)]),
            lambda: local.put(key(2), block(2, SIZE)),
            lambda: local.delete_many([key(2)]),
        ]
        for call in calls:
            with pytest.raises(UnsafeStoreError, match="do not trust this directory, delete it"):
                call()
        place.unlink()
        os.mkfifo(place)
        with pytest.raises(UnsafeStoreError, match="is no file of this store"):
            local.get(key(2))
        assert (tmp_path / "secret").read_bytes() == block(2, SIZE)

    def test_a_directory_that_leads_elsewhere_is_refused(self, local, root, tmp_path):
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        (root / "blocks" / key(2)[:2]).symlink_to(elsewhere)
        with pytest.raises(UnsafeStoreError, match="is no file of this store"):
            local.put(key(2), block(2, SIZE))
        assert list(elsewhere.iterdir()) == []

    def test_deleting_goes_on_when_another_was_faster_with_one(self, local, root):
        local.put(key(2), block(2, SIZE))
        local._objects.delete([key(9), key(1), key(2)])
        assert list(local.keys()) == []

    def test_a_full_disk_is_said_to_be_full(self, root):
        code = """
            import resource, sys
            sys.path.insert(0, sys.argv[2])
            from reliability.blocks import block, key
            from blockrag.errors import StoreFullError
            from blockrag.stores import open_store
            store = open_store("file://" + sys.argv[1])
            store.put(key(1), block(1, 16384))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
            try:
                store.put(key(2), block(2, 163840))
            except StoreFullError as error:
                print(error)
            assert store.get(key(1)) == block(1, 16384)
            assert store.get(key(2)) is None
            store.put(key(3), block(3, 16384))
            store.close()
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(root), TESTS]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "free space there" in done.stdout

    def test_a_killed_writer_leaves_no_half_block(self, root):
        code = """
            import sys
            sys.path.insert(0, sys.argv[2])
            from reliability.blocks import block, key
            from blockrag.stores import open_store
            store = open_store("file://" + sys.argv[1])
            print("ready", flush=True)
            for i in range(10_000):
                store.put(key(i), block(i % 20, 1 << 20) if i % 2 else block(i % 20, 1 << 14))
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(root), TESTS]
        for _ in range(2):
            with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
                process.stdout.readline()
                with closing(open_store(f"file://{root}")) as store:
                    while len(list(store.keys())) < 15:
                        assert process.poll() is None
                process.send_signal(signal.SIGKILL)
        with closing(open_store(f"file://{root}")) as store:
            for name in store.keys():
                assert len((root / "blocks" / name[:2] / name[2:]).read_bytes()) in (1 << 20, 1 << 14)


def test_debugging_output_of_the_library_stays_out_of_messages(moto, caplog):
    with (
        caplog.at_level(logging.DEBUG, "blockrag"),
        closing(open_store(url(moto, "x").replace("//bucket", "//nowhere"))) as store,
        pytest.raises(StoreError) as error,
    ):
        store.put(key(1), block(1, SIZE))
    assert "\n" not in str(error.value)
    assert "Debug source" not in caplog.text + str(error.value)
    assert not isinstance(error.value, (StoreFullError, MissingDependencyError))
