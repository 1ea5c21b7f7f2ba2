"""`DiskStore.verify`: what it finds, what it mends, and what it leaves alone; and an index made anew from the files."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from disk_stores import execute, run_python, value_files
from reliability.blocks import FINGERPRINT, block, key

from blockrag.errors import StoreError
from blockrag.fingerprint import Fingerprint
from blockrag.stores import DiskStore
from blockrag.stores.disk import rebuild_index
from blockrag.stores.files import StoreFiles

SMALL, IN_FILE = 2048, 40_960
OLD_S = 7200.0

KNOWN = Fingerprint(
    **dict.fromkeys(["weights", "config", "rope", "tokenizer", "template"], "x"),
    compute_dtype="float32",
    precision="int8",
)


def age(path: Path, seconds: float = OLD_S) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def root(tmp_path):
    """The directory of a store with blocks 0 and 2 in its index, 1 and 3 in files, and a fingerprint."""
    path = tmp_path / "store"
    with contextlib.closing(DiskStore(path)) as store:
        for number in range(4):
            store.put(key(number), block(number, IN_FILE if number % 2 else SMALL))
        store.remember_fingerprint(KNOWN)
    return path


@pytest.fixture
def disk(root):
    with contextlib.closing(DiskStore(root)) as store:
        yield store


def file_of(root: Path, number: int) -> Path:
    ((name,),) = execute(root, "SELECT filename FROM Cache WHERE key = ?", key(number))
    return root / str(name)


def faults(store: DiskStore, *, fix: bool = False) -> list[tuple[str, str, bool]]:
    return [(fault.kind, fault.where, fault.fixed) for fault in store.verify(fix=fix).faults]


class TestVerify:
    def test_a_sound_store(self, disk):
        report = disk.verify()
        assert report.ok
        assert report.faults == ()
        assert (report.blocks, report.bytes) == (4, 2 * SMALL + 2 * IN_FILE)
        assert report.fingerprints == {FINGERPRINT: 4}
        assert disk.verify(fix=True) == report

    @pytest.mark.parametrize("number", [0, 1], ids=["in the index", "in a file"])
    def test_a_flipped_bit(self, disk, root, number):
        data = bytearray(block(number, IN_FILE if number else SMALL))
        data[1000] ^= 4
        if number:
            file_of(root, number).write_bytes(data)
        else:
            execute(root, "UPDATE Cache SET value = ? WHERE key = ?", bytes(data), key(0))
        assert faults(disk) == [("damaged", key(number), False)]
        assert key(number) in set(disk.keys())
        assert faults(disk, fix=True) == [("damaged", key(number), True)]
        assert set(disk.keys()) == {key(other) for other in range(4) if other != number}
        assert faults(disk) == []

    def test_a_block_under_anothers_key(self, disk, root):
        execute(root, "UPDATE Cache SET key = ? WHERE key = ?", key(9), key(0))
        (fault,) = disk.verify().faults
        assert (fault.kind, fault.where) == ("damaged", key(9))
        assert key(0) in fault.message

    @pytest.mark.parametrize("length", [None, 0, IN_FILE - 1, IN_FILE + 1], ids=str)
    def test_a_file_that_is_gone_or_has_another_length(self, disk, root, length):
        file_of(root, 1).unlink() if length is None else os.truncate(file_of(root, 1), length)
        assert faults(disk) == [("missing", key(1), False)]
        assert faults(disk, fix=True) == [("missing", key(1), True)]
        assert faults(disk) == []
        assert disk.stats().blocks == 3

    def test_files_that_cannot_be_read_just_now_are_no_reason_to_delete_blocks(self, root):
        class NoHandles(StoreFiles):
            def read_into(self, handle, buffer, offset):
                raise OSError(errno.EMFILE, "Too many open files")

        with contextlib.closing(DiskStore(root, files=NoHandles())) as store:
            report = store.verify(fix=True)
        assert {(fault.kind, fault.where, fault.fixed) for fault in report.faults if fault.kind == "unreadable"} == {
            ("unreadable", key(1), False),
            ("unreadable", key(3), False),
        }
        assert not report.ok
        with contextlib.closing(DiskStore(root)) as store:
            assert set(store.keys()) == {key(number) for number in range(4)}
            assert bytes(store.get(key(1))) == block(1, IN_FILE)

    @pytest.mark.parametrize(
        "change",
        ["mode = 4", "raw = 0", "raw = 0, key = x'80'", "value = 'text'", "size = -1", "filename = '../../outside'"],
    )
    def test_foreign_rows_are_reported_and_hide_nothing(self, disk, root, change):
        execute(root, f"UPDATE Cache SET {change} WHERE key = ?", key(0))
        data = bytearray(block(1, IN_FILE))
        data[200] ^= 1
        file_of(root, 1).write_bytes(data)
        found = disk.verify().faults
        assert [fault.kind for fault in found][:2] == ["damaged", "foreign"]
        assert "blockrag never writes such a row" in found[1].message
        assert disk.verify(fix=True).ok
        assert disk.verify().faults == ()
        assert set(disk.keys()) == {key(2), key(3)}

    def test_a_foreign_row_does_not_take_a_sound_blocks_file_along(self, disk, root):
        name = str(file_of(root, 1).relative_to(root))
        execute(root, "UPDATE Cache SET mode = 4, value = NULL, filename = ? WHERE key = ?", name, key(0))
        assert disk.verify(fix=True).ok
        assert bytes(disk.get(key(1))) == block(1, IN_FILE)

    def test_two_rows_of_one_file(self, disk, root):
        name = str(file_of(root, 1).relative_to(root))
        file_of(root, 3).unlink()
        execute(root, "UPDATE Cache SET filename = ? WHERE key = ?", name, key(3))
        report = disk.verify(fix=True)
        assert [(fault.kind, fault.fixed) for fault in report.faults] == [("foreign", True)]
        assert "names the file of row" in report.faults[0].message
        assert bytes(disk.get(key(1))) == block(1, IN_FILE)
        assert disk.get(key(3)) is None

    def test_files_of_killed_writers(self, disk, root):
        names = ["00/" + "1" * 30 + ".val", f"fingerprints/{'a' * 32}.json.{'b' * 16}"]
        for name in names:
            (root / name).parent.mkdir(mode=0o700, exist_ok=True)
            (root / name).touch(mode=0o600)
        assert faults(disk, fix=True) == []
        for name in names:
            age(root / name)
        assert faults(disk) == [("stray", name, False) for name in names]
        assert faults(disk, fix=True) == [("stray", name, True) for name in names]
        assert not any((root / name).exists() for name in names)
        assert faults(disk) == []

    def test_an_index_that_was_not_finished(self, disk, root):
        (root / "rebuilding").mkdir(mode=0o700)
        (root / "rebuilding/cache.db").touch(mode=0o600)
        assert faults(disk) == []
        age(root / "rebuilding")
        assert faults(disk) == [("stray", "rebuilding", False)]
        assert faults(disk, fix=True) == [("stray", "rebuilding", True)]
        assert not (root / "rebuilding").exists()

    def test_what_blockrag_never_wrote_stays(self, disk, root):
        folder = file_of(root, 1).parent
        (root / "README").write_text("mine")
        (root / "old").mkdir(mode=0o700)
        (folder / "notes.txt").touch()
        (root / "fingerprints/a.json").touch()
        (root / "link").symlink_to(root.parent)
        taken = file_of(root, 3)
        taken.unlink()
        taken.symlink_to(root / "README")
        taken_name = str(taken.relative_to(root))
        names = ["README", f"{folder.name}/notes.txt", "link", "old", taken_name, "fingerprints/a.json"]
        ((rowid,),) = execute(root, "SELECT rowid FROM Cache WHERE key = ?", key(3))
        for path in root.rglob("*"):
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else 0o600)
        report = disk.verify(fix=True)
        assert {(fault.kind, fault.where, fault.fixed) for fault in report.faults} == {
            ("foreign", f"row {rowid}", True),
            *(("foreign", name, False) for name in names),
        }
        assert set(disk.keys()) == {key(number) for number in range(3)}
        assert (root / "README").read_text() == "mine"

    def test_totals(self, disk, root):
        execute(root, "UPDATE Settings SET value = value + 7 WHERE key IN ('size', 'count')")
        report = disk.verify()
        assert [(fault.kind, fault.where) for fault in report.faults] == [("totals", "cache.db")] * 2
        assert "a count of 11, its rows make 4" in report.faults[0].message
        assert disk.verify(fix=True).ok
        assert (disk.stats().blocks, disk.stats().bytes) == (4, 2 * SMALL + 2 * IN_FILE)

    def test_permissions(self, disk, root):
        loose = [root, root / "cache.db", file_of(root, 1), file_of(root, 1).parent, root / "fingerprints"]
        for path in loose:
            path.chmod(0o755 if path.is_dir() else 0o644)
        report = disk.verify()
        assert {(fault.kind, fault.where) for fault in report.faults} == {
            ("exposed", str(path.relative_to(root))) for path in loose
        }
        assert any("mode 0644" in fault.message for fault in report.faults)
        assert disk.verify(fix=True).ok
        for path in loose:
            assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600)
        assert faults(disk) == []

    def test_fingerprints(self, disk, root):
        name = f"fingerprints/{KNOWN.digest}.json"
        (root / name).write_text("{}")
        assert faults(disk) == [("damaged", name, False)]
        assert faults(disk, fix=True) == [("damaged", name, True)]
        assert faults(disk) == []

    def test_blocks_that_come_and_go_meanwhile_are_no_faults(self, tmp_path):
        code = """
            import sys
            sys.path.insert(0, sys.argv[2])
            from reliability.blocks import block, key
            from blockrag.stores.disk import DiskStore
            store = DiskStore(sys.argv[1], max_bytes=8 * 40_960)
            number = 0
            while True:
                store.put(key(number % 24), block(number % 24, 40_960))
                number += 1
                if number == 24:
                    print("ready", flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s"), str(Path(__file__).parent)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
            try:
                assert writer.stdout.readline() == "ready\n"
                with contextlib.closing(DiskStore(tmp_path / "s")) as store:
                    seen = [store.verify(fix=bool(number % 2)) for number in range(10)]
            finally:
                writer.kill()
        assert [report.faults for report in seen] == [()] * 10
        assert any(report.blocks for report in seen)

    def test_a_block_that_was_evicted_and_written_again_is_no_fault(self, root):
        """Between the list of the keys, the reading and the second list, at the worst moments."""

        class Neighbour(StoreFiles):
            reads = 0

            def read_into(self, handle, buffer, offset):
                if len(buffer) == IN_FILE:
                    with contextlib.closing(DiskStore(root)) as other:
                        if self.reads == 0:
                            assert other.delete_many([key(3)]) == 1
                        elif self.reads == 1:
                            other.put(key(3), block(3, IN_FILE))
                    self.reads += 1
                return super().read_into(handle, buffer, offset)

        with contextlib.closing(DiskStore(root)) as store:
            store.put(key(5), block(5, IN_FILE))
        with contextlib.closing(DiskStore(root, files=(files := Neighbour()))) as store:
            assert store.verify(fix=True).faults == ()
        assert files.reads == 2, "blocks 1 and 5; block 3 was away"
        with contextlib.closing(DiskStore(root)) as store:
            assert bytes(store.get(key(3))) == block(3, IN_FILE)

    def test_closed_store(self, root):
        store = DiskStore(root)
        store.close()
        with pytest.raises(StoreError, match="is closed"):
            store.verify()


class TestDamagedIndex:
    def test_a_lookup_table_that_disagrees_is_built_anew(self, root):
        """SQLite then finds rows by one order and not by another; nothing is lost."""
        with contextlib.closing(DiskStore(root)) as store:
            store._index.execute("PRAGMA writable_schema = ON")
            sql = "UPDATE sqlite_master SET sql = 'CREATE INDEX Cache_use ON Cache (size, access_time)' WHERE name = ?"
            store._index.execute(sql, ("Cache_use",))
        with contextlib.closing(DiskStore(root)) as store:
            found = store.verify().faults
            assert {(fault.kind, fault.where) for fault in found} == {("damaged", "cache.db")}
            assert store.verify(fix=True).ok
            assert store.verify().faults == ()
            assert store.stats().blocks == 4

    def test_pages_that_are_overwritten_cost_the_small_blocks_only(self, tmp_path):
        root = tmp_path / "s"
        with contextlib.closing(DiskStore(root)) as store:
            for number in range(40):
                store.put(key(number), block(number, IN_FILE if number < 5 else SMALL))
        ((page, size),) = execute(root, "SELECT rootpage, (SELECT page_size FROM pragma_page_size()) FROM sqlite_master"
                                        " WHERE name = 'Cache'")  # fmt: skip
        data = bytearray((root / "cache.db").read_bytes())
        data[(page - 1) * size : page * size] = b"\xff" * size
        (root / "cache.db").write_bytes(data)
        with contextlib.closing(DiskStore(root, max_bytes=10**6)) as store:
            with pytest.raises(StoreError, match=r"its index is damaged: let `blockrag verify-store --fix`"):
                store.verify()
            report = store.verify(fix=True)
            assert report.ok
            assert report.blocks == 5
            assert {fault.where for fault in report.faults} == {"cache.db"}
            assert set(store.keys()) == {key(number) for number in range(5)}
            store.put(key(30), block(30, SMALL))
            assert store.verify().faults == ()
            assert store.stats().max_bytes == 10**6


class TestRebuild:
    @pytest.fixture
    def broken(self, root):
        for name in ("cache.db", "cache.db-wal"):
            (root / name).write_bytes(b"not a database" * 1000)
        with pytest.raises(StoreError, match="its index is damaged"):
            DiskStore(root)
        return root

    def test_blocks_in_files_are_back(self, broken):
        assert rebuild_index(broken) == 2
        with contextlib.closing(DiskStore(broken)) as store:
            assert set(store.keys()) == {key(1), key(3)}
            assert bytes(store.get(key(3))) == block(3, IN_FILE)
            assert store.fingerprints() == {KNOWN.digest: KNOWN}
            assert store.verify().faults == ()
            assert stat.S_IMODE((broken / "cache.db").stat().st_mode) == 0o600
            assert not (broken / "rebuilding").exists()

    def test_files_that_hold_no_sound_block_are_left_out(self, broken):
        first, second = value_files(broken)
        os.truncate(first, 100)
        (broken / "ff").mkdir(exist_ok=True)
        (broken / "ff" / ("0" * 30 + ".val")).write_bytes(b"nonsense")
        (broken / "ff" / ("1" * 30 + ".val")).symlink_to(second)
        assert rebuild_index(broken) == 1

    def test_of_two_copies_the_younger_one_counts(self, broken):
        newer = broken / "00" / ("0" * 30 + ".val")
        newer.parent.mkdir(exist_ok=True)
        newer.write_bytes(block(1, IN_FILE + 32))
        older = [path for path in value_files(broken) if path != newer]
        for path in older:
            age(path)
        rebuild_index(broken)
        with contextlib.closing(DiskStore(broken)) as store:
            assert bytes(store.get(key(1))) == block(1, IN_FILE + 32)
            assert store.sweep() == 1
            assert len(value_files(broken)) == 2

    def test_the_oldest_files_are_evicted_first(self, broken):
        for path in value_files(broken):
            age(path, 100.0 if path.read_bytes() == block(1, IN_FILE) else 50.0)
        rebuild_index(broken)
        with contextlib.closing(DiskStore(broken, max_bytes=IN_FILE)) as store:
            assert list(store.keys()) == [key(3)]

    def test_a_file_that_cannot_be_read_stops_it(self, broken):
        class Broken(StoreFiles):
            def read_into(self, handle, buffer, offset):
                raise OSError(errno.EIO, "Input/output error")

        before = (broken / "cache.db").read_bytes()
        with pytest.raises(StoreError, match=r"cannot read .*\.val, see the log"):
            rebuild_index(broken, files=Broken())
        assert (broken / "cache.db").read_bytes() == before

    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
    def test_a_directory_that_cannot_be_written(self, broken, number):
        class Full(StoreFiles):
            def rename(self, old, new):
                raise OSError(number, os.strerror(number))

        with pytest.raises(StoreError, match=r"free disk space|choose a directory"):
            rebuild_index(broken, files=Full())
        assert rebuild_index(broken) == 2

    def test_what_is_no_store_is_left_alone(self, tmp_path):
        with pytest.raises(StoreError, match="there is no blockrag-store-v1 in it"):
            rebuild_index(tmp_path / "nothing")
        assert list(tmp_path.iterdir()) == []

    def test_killed_at_any_call_it_can_be_done_again(self, broken):
        """Each child dies seven calls later than the one before it, until one gets through."""
        code = """
            import os, signal, sys
            from blockrag.stores.disk import rebuild_index
            from blockrag.stores.files import StoreFiles
            class Dying(StoreFiles):
                left = 0
                def before(self, call):
                    self.left -= 1
                    if self.left < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
            rebuild_index(sys.argv[2])
            garbage = b"not a database" * 1000
            deaths = 0
            while True:
                open(sys.argv[1] + "/cache.db", "wb").write(garbage)
                files = Dying()
                files.left = deaths
                pid = os.fork()
                if pid == 0:
                    rebuild_index(sys.argv[1], files=files)
                    os._exit(0)
                if os.waitpid(pid, 0)[1] == 0:
                    break
                deaths += 7
                if open(sys.argv[1] + "/cache.db", "rb").read() == garbage:
                    assert rebuild_index(sys.argv[1]) == 2
            print(deaths)
        """
        other = broken.parent / "other"
        DiskStore(other).close()
        done = run_python(code, broken, other)
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) > 50
        with contextlib.closing(DiskStore(broken)) as store:
            assert store.verify().faults == ()
            assert store.stats().blocks == 2


def test_the_file_of_a_stopped_writer_is_nobodys_stray(root, disk):
    """However old it is: its writer holds its lock, and finishes when it goes on. Killed, it is swept."""
    code = """
        import os, signal, sys
        sys.path.insert(0, sys.argv[2])
        from reliability.blocks import block, key
        from blockrag.stores.disk import DiskStore
        from blockrag.stores.files import StoreFiles
        class Stopping(StoreFiles):
            armed = False
            def before(self, call):
                if self.armed and call == "execute BEGIN":
                    os.kill(os.getpid(), signal.SIGSTOP)
        files = Stopping()
        store = DiskStore(sys.argv[1], files=files)
        files.armed = True
        for number in (5, 7):
            store.put(key(number), block(number, 40_960))
    """
    known = set(value_files(root))
    command = [sys.executable, "-c", textwrap.dedent(code), str(root), str(Path(__file__).parent)]
    with subprocess.Popen(command) as writer:
        try:
            assert os.WIFSTOPPED(os.waitpid(writer.pid, os.WUNTRACED)[1])
            (unfinished,) = set(value_files(root)) - known
            age(unfinished)
            assert disk.sweep(older_than_s=3600.0) == 0
            assert disk.verify(fix=True).faults == ()
            assert unfinished.exists()
            os.kill(writer.pid, signal.SIGCONT)
            assert os.WIFSTOPPED(os.waitpid(writer.pid, os.WUNTRACED)[1])
            assert bytes(disk.get(key(5))) == block(5, IN_FILE)
            (abandoned,) = set(value_files(root)) - known - {unfinished}
            age(abandoned)
        finally:
            writer.kill()
    assert disk.sweep(older_than_s=3600.0) == 1
    assert not abandoned.exists()
    assert disk.verify().faults == ()
