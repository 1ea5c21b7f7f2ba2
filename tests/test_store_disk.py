"""The disk store beyond what every store does: its directory, its budget, its order of use, damage."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
import stat
from pathlib import Path

import pytest
import torch
from disk_stores import execute, run_python, two_blocks, value_files
from test_stores import IN_FILE, SMALL, key, value

from blockrag.errors import InputError, StoreError, StoreFullError, UnsafeStoreError
from blockrag.fingerprint import Fingerprint
from blockrag.stores import DiskStore
from blockrag.stores.disk import values as disk_values
from blockrag.stores.files import StoreFiles


@pytest.fixture
def root(tmp_path):
    """The directory of a store with block 1, in its index, and block 2, in a file."""
    return two_blocks(tmp_path / "store")


@pytest.fixture
def disk(root):
    with contextlib.closing(DiskStore(root)) as store:
        yield store


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


class TestFingerprints:
    KNOWN = tuple(
        Fingerprint(weights="w", config="c", rope="r", tokenizer="t", template="p", compute_dtype="d", precision=name)
        for name in ("float16", "int8")
    )

    def file(self, root: Path, number: int = 0) -> Path:
        return root / "fingerprints" / f"{self.KNOWN[number].digest}.json"

    def test_they_are_remembered_by_every_process(self, disk, root):
        assert disk.fingerprints() == {}
        for fingerprint in (*self.KNOWN, *self.KNOWN):
            disk.remember_fingerprint(fingerprint)
        expected = {fingerprint.digest: fingerprint for fingerprint in self.KNOWN}
        assert disk.fingerprints() == expected
        with contextlib.closing(DiskStore(root)) as other:
            assert other.fingerprints() == expected
        assert stat.S_IMODE(self.file(root).parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(self.file(root).stat().st_mode) == 0o600
        assert len(list(self.file(root).parent.iterdir())) == 2

    def test_noting_one_again_writes_nothing(self, disk, root):
        disk.remember_fingerprint(self.KNOWN[0])
        before = self.file(root).stat()
        disk.remember_fingerprint(self.KNOWN[0])
        with contextlib.closing(DiskStore(root)) as other:
            other.remember_fingerprint(self.KNOWN[0])
        assert self.file(root).stat() == before

    @pytest.mark.parametrize(
        "content",
        [b"", b"{}", b"nonsense", b"\xff\xfe", b"[" * 15_000, b" " * 20_000, KNOWN[1].to_json().encode()],
        ids=["empty", "no factors", "nonsense", "no text", "deep", "long", "another's"],
    )
    def test_what_is_no_fingerprint_is_left_out_and_written_anew(self, root, caplog, content):
        with contextlib.closing(DiskStore(root)) as store:
            store.remember_fingerprint(self.KNOWN[0])
        self.file(root).write_bytes(content)
        with contextlib.closing(DiskStore(root)) as store:
            assert store.fingerprints() == {}
            assert "it is left out" in caplog.text
            store.remember_fingerprint(self.KNOWN[0])
            assert store.fingerprints() == {self.KNOWN[0].digest: self.KNOWN[0]}

    def test_links_and_pipes_are_not_followed(self, disk, root, caplog):
        disk.remember_fingerprint(self.KNOWN[0])
        self.file(root).rename(root.parent / "elsewhere")
        self.file(root).symlink_to(root.parent / "elsewhere")
        os.mkfifo(self.file(root, 1))
        assert disk.fingerprints() == {}
        assert "cannot be opened" in caplog.text
        assert "is not a regular file" in caplog.text

    def test_a_linked_directory_is_refused(self, disk, root):
        (root.parent / "elsewhere").mkdir()
        (root / "fingerprints").symlink_to(root.parent / "elsewhere")
        for call in (disk.fingerprints, lambda: disk.remember_fingerprint(self.KNOWN[0])):
            with pytest.raises(UnsafeStoreError, match="is not a directory"):
                call()
        assert list((root.parent / "elsewhere").iterdir()) == []

    def test_a_full_disk(self, root):
        class Full(StoreFiles):
            def rename(self, old, new):
                raise OSError(errno.ENOSPC, "No space left on device")

        with contextlib.closing(DiskStore(root, files=Full())) as store:
            with pytest.raises(StoreFullError, match="free disk space"):
                store.remember_fingerprint(self.KNOWN[0])
            assert store.fingerprints() == {}
        assert list((root / "fingerprints").iterdir()) == []

    def test_closed_store(self, disk):
        disk.close()
        for call in (disk.fingerprints, lambda: disk.remember_fingerprint(self.KNOWN[0])):
            with pytest.raises(StoreError, match="is closed"):
                call()


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
