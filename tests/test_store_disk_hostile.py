"""A directory that somebody else prepared: nothing of it is executed, followed or believed."""

from __future__ import annotations

import contextlib
import os
import pickle
from pathlib import Path

import pytest
from disk_stores import execute, run_python, two_blocks, value_files
from test_stores import IN_FILE, SMALL, key, value

from blockrag.errors import InputError, StoreError, UnsafeStoreError
from blockrag.stores import BlockStore, DiskStore


@pytest.fixture
def root(tmp_path):
    """The directory of a store with block 1, in its index, and block 2, in a file."""
    return two_blocks(tmp_path / "store")


@pytest.fixture
def disk(root):
    with contextlib.closing(DiskStore(root)) as store:
        yield store


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

    @pytest.mark.parametrize("statement", ["UPDATE Settings SET value = 'x'", "DELETE FROM Settings"])
    def test_totals_that_are_no_numbers(self, disk, root, statement):
        execute(root, f"{statement} WHERE key IN ('size', 'count')")
        with pytest.raises(StoreError, match="its index is damaged"):
            disk.stats()
        assert bytes(disk.get(key(1))) == value(1)
        assert {fault.kind for fault in disk.verify().faults} >= {"totals"}
        disk.verify(fix=True)
        assert disk.stats().blocks == 0

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
