"""Several processes on one directory: competing, stopped, killed, forked; and full disks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from disk_stores import execute, run_python, two_blocks, value_files
from test_stores import IN_FILE, SMALL, key, value

from blockrag.errors import StoreError, StoreFullError
from blockrag.stores import DiskStore
from blockrag.stores.files import StoreFiles


@pytest.fixture
def root(tmp_path):
    """The directory of a store with block 1, in its index, and block 2, in a file."""
    return two_blocks(tmp_path / "store")


@pytest.fixture
def disk(root):
    with contextlib.closing(DiskStore(root)) as store:
        yield store


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

    def test_a_row_that_is_committed_while_the_sweep_looks_saves_its_file(self, root):
        """The index is asked again once the file is locked: its writer may have finished since it was first asked."""
        stray = self.stray(root, age_s=7200)
        name = str(stray.relative_to(root))

        class Committing(StoreFiles):
            armed = False

            def before(self, call):
                if self.armed and call == "lock":
                    self.armed = False
                    execute(root, "UPDATE Cache SET mode = 2, value = NULL, filename = ? WHERE key = ?", name, key(1))

        files = Committing()
        with contextlib.closing(DiskStore(root, files=files)) as store:
            files.armed = True
            assert store.sweep() == 0
            assert not files.armed
            assert stray.exists()

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
