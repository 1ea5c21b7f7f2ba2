"""Damaged indexes by the hundred: whatever is in the files, blockrag answers right, refuses by name, or builds anew.

Each case mutates the real files of a small index and opens them in a process of its own, so that a crash, a hang, code
that runs and memory that grows are all seen from outside. `BLOCKRAG_FUZZ_CASES` sets how many there are.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutations import mutated, mutations

from blockrag.cli.directory import Settings, remember
from blockrag.encoders import LexicalEncoder
from blockrag.index import DocumentUpdate, PassageIndex
from blockrag.passage import Passage

CASES = int(os.environ.get("BLOCKRAG_FUZZ_CASES", "320"))
KINDS = ("flat", "hnsw", "ivf")
# Beside twice the files' size: what SQLite caches, and what a rebuild of so few vectors takes.
SPARE_KIB = 64 << 10


def fuzzed(share):
    """Settings for a share of all cases."""
    cases = max(1, round(share * CASES))
    return settings(max_examples=cases, deadline=None, suppress_health_check=list(HealthCheck), database=None)


class Worker:
    """The process that opens the cases; a new one takes over where one ended."""

    def __init__(self, sound):
        self._sound = sound
        self.patience_s = 60
        self._process = None

    def run(self, directory, kind="flat"):
        return self._ask({"directory": str(directory), "kind": kind})

    def misbehave(self, how):
        return self._ask({"misbehave": how})

    def _ask(self, case):
        if self._process is None:
            self._start()
        answer = self._send(case, patience_s=self.patience_s)
        size = sum(file.stat().st_size for file in self._sound.iterdir()) >> 10
        if answer["peak_kib"] - self._base_kib > 2 * size + SPARE_KIB:
            # A peak does not go down again.
            self.stop()
            raise AssertionError("it took too much memory")
        assert not answer["executions"], answer["executions"]
        assert not answer["defects"], answer["defects"][0]
        return answer

    def _start(self):
        script = Path(__file__).parent / "index_fuzz_worker.py"
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        for kind in KINDS:
            with tempfile.TemporaryDirectory() as copy:
                shutil.copytree(self._sound, copy, dirs_exist_ok=True)
                # Importing everything takes its time where many tests run.
                answer = self._send({"directory": copy, "kind": kind}, patience_s=200)
                assert set(answer["calls"].values()) == {"ok"}, answer
        self._base_kib = answer["peak_kib"]

    def _send(self, case, *, patience_s):
        process = self._process
        process.stdin.write(json.dumps(case).encode() + b"\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], patience_s)[0]:
            self.stop()
            raise AssertionError(f"no answer within {patience_s} s")
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            self.stop()
            raise AssertionError(f"the process died: {signal.Signals(-status).name if status < 0 else status}")
        return json.loads(line)

    def stop(self):
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def fill(path, kind, *, batches=2):
    """An open index with all that an index has, after so many commits; its vector file is of this kind."""
    path.mkdir()
    remember(path, Settings())
    index = PassageIndex(LexicalEncoder(64), path, kind=kind)
    for batch in range(batches):
        updates = []
        for document in range(6 * batch, 6 * batch + 6):
            passages = [
                Passage(
                    f"p{document}-{n}", f"text number {document + n} is green", f"t{n}", f"d{document}", {"third": n}
                )
                for n in range(3)
            ]
            keys = {passage.id: [f"{document:02x}" * 32] for passage in passages}
            updates.append(DocumentUpdate(f"d{document}", passages, f"hash {document}", keys, "cd" * 16))
        index.replace_documents(updates)
    return index


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Directories with sound files, by kind; "log" is one as a killed process leaves it, with a write-ahead log."""
    root = tmp_path_factory.mktemp("sound")
    for kind in KINDS:
        fill(root / kind, kind).close()
    index = fill(root / "open", "flat")
    shutil.copytree(root / "open", root / "log")
    index.close()
    assert (root / "log" / "passages.sqlite3-wal").stat().st_size > 10_000
    return root


@pytest.fixture(scope="module")
def worker(sound):
    worker = Worker(sound / "flat")
    yield worker
    worker.stop()


@pytest.fixture(scope="module")
def right(worker, tmp_path_factory):
    """What an index answers after no commit, after one, and after both."""
    root = tmp_path_factory.mktemp("right")
    states = []
    for batches in range(3):
        fill(root / str(batches), "flat", batches=batches).close()
        states.append(worker.run(root / str(batches))["answers"])
    assert len(states[2]["texts"]) == 36
    return states


def damaged(sound, kind, name, changes):
    """A copy with one file changed, and the context that removes it."""
    copy = tempfile.TemporaryDirectory()
    shutil.copytree(sound / kind, copy.name, dirs_exist_ok=True)
    file = Path(copy.name) / name
    file.write_bytes(mutated(file.read_bytes(), changes))
    return copy


def test_a_damaged_database(worker, sound, right):
    """What is handed out of it is right, or nothing is; only what ranks and filters carries no checksum."""
    outcomes = Counter()

    @fuzzed(0.4)
    @given(mutations())
    def check(changes):
        with damaged(sound, "flat", "passages.sqlite3", changes) as copy:
            answer = worker.run(copy)
            texts = {passage[0]: passage for passage in right[2]["texts"]}
            for passage in answer["answers"].get("texts", ()):
                assert texts[passage[0]] == passage
            outcomes.update(answer["calls"].values())

    check()
    assert outcomes["PassageIndexError"]
    assert outcomes["ok"]


@pytest.mark.parametrize("name", ["passages.sqlite3-wal", "passages.sqlite3-shm"])
def test_a_damaged_log_loses_whole_commits_and_nothing_else(name, worker, sound, right):
    @fuzzed(0.1)
    @given(mutations())
    def check(changes):
        with damaged(sound, "log", name, changes) as copy:
            answer = worker.run(copy)
            if answer["answers"] == right[0]:
                assert answer["calls"].pop("check") in ("ok", "InputError"), "there may be no index yet"
            assert set(answer["calls"].values()) == {"ok"}
            assert answer["answers"] in right

    check()


def test_damaged_vectors(worker, sound, right):
    """Nothing but the speed of opening depends on the vector file."""

    @fuzzed(0.25)
    @given(st.sampled_from(KINDS), mutations())
    def check(kind, changes):
        with damaged(sound, kind, "vectors.faiss", changes) as copy:
            answer = worker.run(copy, kind)
            assert set(answer["calls"].values()) == {"ok"}
            assert answer["answers"] == right[2]

    check()


def test_damaged_settings(worker, sound, right):
    """Whatever is remembered, the passages are as they were."""

    @fuzzed(0.15)
    @given(mutations())
    def check(changes):
        with damaged(sound, "flat", "blockrag.json", changes) as copy:
            answer = worker.run(copy)
            assert answer["calls"].pop("settings") in ("ok", "PassageIndexError")
            assert set(answer["calls"].values()) == {"ok"}
            assert answer["answers"] == right[2]

    check()


@pytest.fixture(scope="module")
def watched(sound):
    worker = Worker(sound / "flat")
    yield worker
    worker.stop()


# The last three end the process.
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("execute", "exec"),
        ("write elsewhere", "fuzz-control"),
        ("eat memory", "too much memory"),
        ("crash", "died: SIGABRT"),
        ("hang", "no answer"),
    ],
)
def test_what_must_not_happen_would_be_seen(how, message, watched):
    watched.misbehave("not at all")
    if how == "hang":
        watched.patience_s = 1
    with pytest.raises(AssertionError, match=message):
        watched.misbehave(how)
