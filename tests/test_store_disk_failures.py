"""The disk store when a call fails at the seam, or is interrupted, or another writer has its turn."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from disk_stores import run_python, two_blocks, value_files
from test_stores import IN_FILE, key, value

from blockrag.errors import StoreError, StoreFullError
from blockrag.stores import DiskStore
from blockrag.stores.disk.directory import only_writer
from blockrag.stores.files import StoreFiles


@pytest.fixture
def root(tmp_path):
    """The directory of a store with block 1, in its index, and block 2, in a file."""
    return two_blocks(tmp_path / "store")


class Failing(StoreFiles):
    """The next call of a name raises what `fail` was given for it."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        self.errors: dict[str, BaseException] = {}

    def fail(self, call: str, error: BaseException) -> None:
        self.errors[call] = error

    def before(self, call: str) -> None:
        if call in self.errors:
            raise self.errors.pop(call)


class TestFailures:
    @pytest.fixture
    def files(self):
        return Failing()

    @pytest.fixture
    def failing(self, root, files):
        with contextlib.closing(DiskStore(root, max_bytes=10 * IN_FILE, files=files)) as store:
            yield store

    @pytest.mark.parametrize(
        ("call", "error", "kind", "advice"),
        [
            ("open", OSError(errno.EMFILE, "Too many open files"), StoreError, "raise its limit"),
            ("open", OSError(errno.ENFILE, "Too many open files in system"), StoreError, "has no file handles left"),
            ("open", OSError(errno.EACCES, "Permission denied"), StoreError, "this user can write"),
            ("write", OSError(errno.EIO, "Input/output error"), StoreError, "the medium fails"),
            ("write", OSError(errno.ESTALE, "Stale file handle"), StoreError, "keep the store on a local one"),
            ("write", OSError(errno.EDQUOT, "Disk quota exceeded"), StoreFullError, "free disk space"),
            ("execute INSERT", sqlite3.OperationalError("disk I/O error"), StoreFullError, "free disk space"),
            ("execute COMMIT", sqlite3.OperationalError("database or disk is full"), StoreFullError, "free disk space"),
            ("execute BEGIN", sqlite3.OperationalError("database is locked"), StoreError, "another process keeps"),
            ("execute ROLLBACK", sqlite3.OperationalError("disk I/O error"), StoreError, "disk I/O error"),
        ],
        ids=str,
    )
    def test_a_failed_put_says_what_to_do_and_leaves_nothing(self, failing, files, root, call, error, kind, advice):
        files.fail(call, error)
        if call == "execute ROLLBACK":
            files.fail("execute INSERT", sqlite3.OperationalError("out of memory"))
        with pytest.raises(kind, match=advice):
            failing.put(key(3), value(3, IN_FILE))
        assert not files.errors
        assert len(value_files(root)) == 1
        assert set(failing.keys()) == {key(1), key(2)}
        failing.put(key(3), value(3, IN_FILE))
        assert bytes(failing.get(key(3))) == value(3, IN_FILE)

    def test_a_sweep_that_fails_keeps_nobody_from_opening(self, root, files, caplog):
        os.utime(root / "blockrag-store-v1", (0, 0))

        class Unlistable(StoreFiles):
            def names(self, directory):
                if Path(directory) == root:
                    return super().names(directory)
                raise PermissionError(errno.EACCES, "Permission denied")

        with contextlib.closing(DiskStore(root, files=Unlistable())) as store:
            assert bytes(store.get(key(2))) == value(2, IN_FILE)
        assert "files of killed writers stay" in caplog.text

    def test_a_failing_read_of_the_index(self, failing, files):
        files.fail("execute SELECT", sqlite3.OperationalError("disk I/O error"))
        with pytest.raises(StoreError, match="the medium fails"):
            failing.get(key(1))

    @pytest.mark.parametrize("call", ["open", "status", "read_into"])
    def test_a_value_file_that_fails_is_a_miss(self, failing, files, call, caplog):
        before = len(list(Path("/proc/self/fd").iterdir()))
        files.fail(call, OSError(errno.EIO, "Input/output error"))
        assert failing.get(key(2)) is None
        assert "the block counts as missing" in caplog.text
        assert bytes(failing.get(key(2))) == value(2, IN_FILE)
        files.fail(call, OSError(errno.EIO, "Input/output error"))
        assert [name for name, _ in failing.get_many([key(2), key(1)])] == [key(2), key(1)]
        assert len(list(Path("/proc/self/fd").iterdir())) == before

    def test_interrupted_after_the_commit_the_block_is_whole(self, failing, files, root):
        """Ctrl-C may come while the replaced block's file is removed; the new one's must stay."""
        files.fail("remove", KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            failing.put(key(2), value(7, IN_FILE))
        assert bytes(failing.get(key(2))) == value(7, IN_FILE)
        assert len(value_files(root)) == 2
        assert failing.sweep(older_than_s=-1.0) == 1
        assert bytes(failing.get(key(2))) == value(7, IN_FILE)

    def test_a_swept_file_is_written_again(self, root):
        """A sweeper may find the file before its writer has locked it, should it think that it is old."""

        known, taken = set(value_files(root)), []

        class Swept(StoreFiles):
            def before(self, call):
                if call == "lock" and not taken and (new := set(value_files(root)) - known):
                    taken.append(new.pop())
                    taken[0].unlink()

        with contextlib.closing(DiskStore(root, files=Swept())) as store:
            store.put(key(3), value(3, IN_FILE))
            assert len(taken) == 1
            assert bytes(store.get(key(3))) == value(3, IN_FILE)

    def test_no_call_goes_past_the_seam(self, tmp_path):
        """Python's own audit events of a store's whole life are as many as the calls that the seam was told of."""
        code = """
            import contextlib, sys
            from collections import Counter
            from blockrag.fingerprint import Fingerprint
            from blockrag.stores.disk import DiskStore
            from blockrag.stores.files import StoreFiles
            told = Counter()
            class Told(StoreFiles):
                def before(self, call):
                    told[call.split()[0]] += 1
            names = {"open": "open", "os.listdir": "names", "os.remove": "remove", "os.rename": "rename",
                     "os.chmod": "permit", "os.utime": "touch", "sqlite3.connect": "connect"}
            seen = Counter()
            root = sys.argv[1]
            def hook(name, args):
                if name in names and str(args[0]).startswith(root):
                    seen[names[name]] += 1
            # What is imported later opens files of its own.
            import blockrag.stores.disk.checking
            fingerprint = Fingerprint(weights="a", config="b", rope="c", tokenizer="d", template="e",
                                      compute_dtype="f", precision="g")
            sys.addaudithook(hook)
            for budget in (None, 100_000):
                with contextlib.closing(DiskStore(root, max_bytes=budget, files=Told())) as store:
                    for i in range(6):
                        store.put(f"{i:064x}", bytes(100 if i % 2 else 40000))
                    store.remember_fingerprint(fingerprint)
                    store.fingerprints(), store.stats(), list(store.keys())
                    list(store.get_many(list(store.keys()))), store.get(f"{1:064x}")
                    store.contains_many([f"{2:064x}"])
                    store.delete_many([f"{2:064x}"])
                    store.verify(fix=True), store.sweep(older_than_s=-1.0)
            assert seen["open"] > 20, seen
            differing = {name: (seen[name], told[name]) for name in names.values() if seen[name] != told[name]}
            sys.exit(str(differing) if differing else 0)
        """
        done = run_python(code, tmp_path / "s")
        assert done.returncode == 0, done.stderr


class TestTurns:
    def test_a_writer_that_hangs_is_named(self, root):
        impatient = StoreFiles(patience_s=0.05)
        with (
            contextlib.closing(DiskStore(root, max_bytes=10 * IN_FILE, files=impatient)) as store,
            contextlib.closing(DiskStore(root, files=impatient)) as unlimited,
        ):
            with only_writer(str(root), StoreFiles()):
                for call in (lambda: store.put(key(3), value(3)), lambda: store.delete_many([key(1)])):
                    with pytest.raises(StoreError, match="another process keeps its lock, look for one that hangs"):
                        call()
                assert bytes(store.get(key(2))) == value(2, IN_FILE)
                # Who has no budget evicts nothing, and needs no turn.
                unlimited.put(key(4), value(4, IN_FILE))
            store.put(key(3), value(3))
            assert set(store.keys()) == {key(number) for number in (1, 2, 3, 4)}

    def test_a_child_that_was_forked_meanwhile_keeps_nobody_waiting(self, root):
        with contextlib.closing(DiskStore(root, max_bytes=10 * IN_FILE, files=StoreFiles(patience_s=5.0))) as store:
            with only_writer(str(root), StoreFiles()):
                pid = os.fork()
                if pid == 0:
                    signal.pause()
                    os._exit(0)
            try:
                store.put(key(3), value(3))
            finally:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)

    def test_files_exceed_the_budget_by_one_block_at_most(self, tmp_path):
        """Three processes write; each adds up the files whenever it is its turn, before and after it makes room."""
        code = """
            import os, random, sys
            from pathlib import Path
            from blockrag.stores.disk import DiskStore
            from blockrag.stores.files import StoreFiles
            root = Path(sys.argv[1])
            class Watching(StoreFiles):
                most = 0
                armed = False
                def before(self, call):
                    if self.armed and call in ("execute BEGIN", "execute COMMIT", "write", "remove"):
                        self.most = max(self.most, sum(path.stat().st_size for path in root.glob("??/*.val")))
            files = Watching()
            store = DiskStore(root, max_bytes=400_000, files=files)
            files.armed = True
            draw = random.Random(sys.argv[2])
            for _ in range(60):
                store.put(f"{draw.randrange(40):064x}", bytes(draw.choice([40_000, 60_000, 100_000])))
            files.armed = False
            print(files.most, store.stats().evictions)
            store.close()
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "s")]
        writers = [subprocess.Popen([*command, str(i)], stdout=subprocess.PIPE, text=True) for i in range(3)]
        seen = [tuple(map(int, writer.communicate(timeout=120)[0].split())) for writer in writers]
        assert all(400_000 < most <= 500_000 for most, _ in seen), seen
        assert all(evictions > 5 for _, evictions in seen)
