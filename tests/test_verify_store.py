"""`blockrag verify-store`: what it finds in directories that were damaged on purpose, what it mends, and how it ends.

The index and the store are real, the blocks are encoded ones of random numbers; no model is involved, and none is
loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing, contextmanager
from io import StringIO

import numpy as np
import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from blockrag import codec
from blockrag.cli import app
from blockrag.cli.checking_store import _progress
from blockrag.cli.output import Output
from blockrag.encoders import GivenVectors, LexicalEncoder
from blockrag.errors import InputError, PassageIndexError
from blockrag.index import DocumentUpdate, PassageIndex
from blockrag.index.vector_file import write_vector_file
from blockrag.ingest import check_directory
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.passage import Passage
from blockrag.stores import DiskStore, MemoryStore

LAYOUT = KVLayout((LayerShape(1, 8, 1, 8),))
FINGERPRINT = "cd" * 16
DOCUMENTS = 12
ENCODER = LexicalEncoder(64)


def key(number):
    return hashlib.blake2b(str(number).encode(), digest_size=32).hexdigest()


def block(number, tokens=8):
    data = torch.randn(LAYOUT.elements_per_token * tokens, generator=torch.Generator().manual_seed(number))
    return codec.encode(BlockKV(LAYOUT, tokens, data), key=key(number), fingerprint=FINGERPRINT, precision="float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A directory of twelve documents with a passage and a block each; even blocks lie in files of their own."""
    path = tmp_path_factory.mktemp("made") / "directory"
    store = DiskStore(path / "kv")
    updates = []
    for number in range(DOCUMENTS):
        store.put(key(number), block(number, tokens=8 if number % 2 else 640))
        passage = Passage(f"p{number}", f"Text number {number} of many.", "", f"d{number}", {"number": number % 3})
        updates.append(DocumentUpdate(f"d{number}", [passage], "hash", {f"p{number}": [key(number)]}, FINGERPRINT))
    with PassageIndex(ENCODER, path / "index") as index:
        index.replace_documents(updates)
    store.close()
    return path


@pytest.fixture
def directory(made, tmp_path):
    shutil.copytree(made, tmp_path / "directory")
    return tmp_path / "directory"


def run(*arguments):
    result = CliRunner().invoke(app, ["verify-store", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def run_json(*arguments, code=0):
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def execute(directory, *statements):
    """Change the database behind the index's back."""
    with closing(sqlite3.connect(directory / "index" / "passages.sqlite3")) as connection:
        for sql in statements:
            connection.execute(sql)
        connection.commit()


def answers(directory):
    with PassageIndex(ENCODER, directory / "index") as index:
        found = index.search_many(["text number 3", "text 7"], 5), index.search("text", 5, where={"number": 1})
        return found, {passage.id for passage in index.passages()}


# -- what is sound ----------------------------------------------------------------------------------------------------


def test_a_sound_directory(directory):
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file() and file.suffix == ".val"}
    result = run(directory)
    assert result.exit_code == 0
    assert "everything is sound" in result.stdout
    found = run_json(directory)
    assert found["ok"]
    assert found["index"] == {"passages": DOCUMENTS, "documents": DOCUMENTS, "encoder": "lexical-1-64"}
    assert found["store"]["blocks"] == DOCUMENTS
    assert found["store"]["fingerprints"] == {FINGERPRINT: DOCUMENTS}
    assert (found["faults"], found["missing_blocks"], found["unused_blocks"]) == ([], 0, 0)
    assert before == {file: file.read_bytes() for file in before}


def test_an_index_a_store_and_a_url_alone(directory, tmp_path):
    alone = run_json(directory / "index")
    assert (alone["index"]["passages"], alone["store"], alone["ok"]) == (DOCUMENTS, None, True)
    for place in (directory / "kv", f"disk://{directory / 'kv'}?max_bytes=1KB"):
        alone = run_json(place)
        assert (alone["index"], alone["store"]["blocks"], alone["ok"]) == (None, DOCUMENTS, True)
    assert run_json("memory://")["store"]["blocks"] == 0
    assert len(list((directory / "kv").rglob("*.val"))) == DOCUMENTS // 2, "nothing was evicted"


def test_no_model_is_loaded(directory):
    script = (
        "import sys; from blockrag.ingest import check_directory; from pathlib import Path; "
        "assert check_directory(Path(sys.argv[1])).ok; "
        "print(sorted({'transformers', 'sentence_transformers', 'blockrag.model.block_model'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script, directory], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_evicted_and_unused_blocks_are_counted_and_no_fault(directory):
    store = DiskStore(directory / "kv")
    store.delete_many([key(0), key(1)])
    store.put(key(100), block(100))
    size = len(block(100))
    store.close()
    found = run_json(directory)
    assert (found["ok"], found["missing_blocks"], found["unused_blocks"], found["unused_bytes"]) == (True, 2, 1, size)
    text = run(directory).stdout
    assert "2 blocks of passages" in text
    assert "1 blocks (" in text
    found = run_json(directory, "--delete-unused")
    assert (found["unused_blocks"], found["deleted_blocks"]) == (1, 1)
    assert run_json(directory)["unused_blocks"] == 0


def test_vectors_that_are_missing_or_behind_are_no_fault(directory):
    (directory / "index" / "vectors.faiss").unlink()
    assert run_json(directory)["faults"] == []
    with PassageIndex(ENCODER, directory / "index") as index:
        index.save()
        index.add([Passage("new", "A new text.")])
        shutil.copy(directory / "index" / "vectors.faiss", directory / "index" / "old")
    shutil.move(directory / "index" / "old", directory / "index" / "vectors.faiss")
    assert run_json(directory)["faults"] == []


def test_an_index_of_vectors_from_elsewhere(tmp_path):
    with PassageIndex(GivenVectors("somebody's", 3), tmp_path / "index", kind="hnsw") as index:
        passages = [Passage(f"p{number}", "text") for number in range(20)]
        index.add(passages, vectors=np.random.default_rng(0).standard_normal((20, 3)))
        index.delete_passages(["p3"])
    assert run_json(tmp_path)["index"] == {"passages": 19, "documents": 19, "encoder": "somebody's"}


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1], ids=["in a file", "in a row"])
def test_a_damaged_block_is_found_and_removed(number, directory):
    damage_block(directory, number)
    found = run_json(directory, code=1)
    (fault,) = found["faults"]
    assert (fault["kind"], fault["where"], fault["fixed"]) == ("damaged", key(number), False)
    assert found["store"]["blocks"] == DOCUMENTS - 1
    result = run(directory)
    assert result.exit_code == 1
    assert f"damaged: {key(number)}" in result.stdout
    assert "--fix mends" in result.stderr
    found = run_json(directory, "--fix")
    assert (found["ok"], found["missing_blocks"], found["faults"][0]["fixed"]) == (True, 1, True)
    assert run_json(directory)["faults"] == []


def damage_block(directory, number):
    data = bytes(block(number, tokens=8 if number % 2 else 640))
    for file in (directory / "kv").rglob("*"):
        content = file.read_bytes() if file.is_file() else b""
        at = content.find(data)
        if at >= 0:
            file.write_bytes(content[: at + 500] + bytes([content[at + 500] ^ 1]) + content[at + 501 :])
            return
    raise AssertionError("the block lies nowhere in one piece")


# What breaks an index without breaking its file: (statements, fault's kind, where, mended).
NAN = "0000c07f" * 64
INDEX_FAULTS = {
    "a word's count": (["UPDATE term SET passages = 99 WHERE term = 'text'"], "totals", "term", True),
    "a negative count": (["UPDATE term SET passages = -1 WHERE term = 'text'"], "totals", "term", True),
    "a count of nothing": (["INSERT INTO term VALUES ('zebra', 3)"], "totals", "term", True),
    "a lost word": (["DELETE FROM term WHERE term = 'text'"], "totals", "term", True),
    "a lost fact": (["DELETE FROM fact WHERE row = 2"], "totals", "fact", True),
    "another fact": (["UPDATE fact SET digest = x'00' WHERE row = 2"], "totals", "fact", True),
    "a fact of nobody": (["INSERT INTO fact VALUES (x'00', 999)"], "stray", "fact", True),
    "a key of nobody": ([f"INSERT INTO block VALUES (999, '', 0, '{'a' * 64}')"], "stray", "block", True),
    "a vector of nobody": (["INSERT INTO embedding SELECT 999, vector FROM embedding LIMIT 1"], "stray", "emb", True),
    "a hash of nobody": (["INSERT INTO document_hash VALUES ('x', '', 'y')"], "stray", "document_hash", True),
    "no vector": (["DELETE FROM embedding WHERE row = 2"], "missing", "vector of passage 'p1'", False),
    "no number": ([f"UPDATE embedding SET vector = x'{NAN}' WHERE row = 2"], "damaged", "vector of row 2", False),
    "a short vector": (["UPDATE embedding SET vector = x'00' WHERE row = 2"], "damaged", "vector of row 2", False),
    "metadata": (["UPDATE passage SET metadata = '{' WHERE row = 2"], "damaged", "passage of row 2", False),
    "no text": (["UPDATE passage SET text = x'ff' WHERE row = 2"], "damaged", "passage of row 2", False),
    "no document": (["DELETE FROM document WHERE id = 'd1'"], "missing", "document of passage 'p1'", False),
    "no key": (["UPDATE block SET key = 'short' WHERE row = 2"], "damaged", "block key 'short'", False),
    "a key that is no text": (["UPDATE block SET key = x'00' WHERE row = 2"], "damaged", "block", False),
    "a look-up table": (
        [
            "PRAGMA writable_schema = ON",
            "CREATE TABLE kept AS SELECT * FROM sqlite_master WHERE name = 'fact_row'",
            "DELETE FROM sqlite_master WHERE name = 'fact_row'",
        ],
        "damaged",
        "passages.sqlite3",
        True,
    ),
}


@pytest.mark.parametrize("name", INDEX_FAULTS)
def test_faults_of_an_index_are_found_and_mended_where_that_can_be(name, directory):
    statements, kind, where, mended = INDEX_FAULTS[name]
    expected = answers(directory)
    execute(directory, *statements)
    if name == "a look-up table":
        # Rows that come while the table is out of sight are not in it.
        execute(
            directory,
            "UPDATE fact SET row = row WHERE row = 2",
            "DELETE FROM fact WHERE row = 2",
            "PRAGMA writable_schema = ON",
            "INSERT INTO sqlite_master SELECT * FROM kept",
            "DROP TABLE kept",
        )
    found = run_json(directory, code=1)
    faults = [fault for fault in found["faults"] if fault["kind"] == kind and where in fault["where"]]
    assert faults, found["faults"]
    assert not found["ok"]
    again = run_json(directory, "--fix", code=0 if mended else 1)
    assert all(fault["fixed"] is mended for fault in again["faults"] if fault in faults or fault["kind"] == kind)
    if mended:
        assert run_json(directory)["faults"] == []
        assert answers(directory) == expected


def change_vectors(file):
    """Another vector for one passage, under a checksum that is true."""
    data = bytearray(file.read_bytes())
    header = {n: v for n, v in json.loads(data[:512]).items() if n not in ("magic", "bytes", "checksum")}
    payload = np.frombuffer(data[512:], np.uint8).copy()
    payload[-4:] = np.frombuffer(np.float32(7).tobytes(), np.uint8)
    write_vector_file(file, header, [payload])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_bytes(b"x" * 600), "header is damaged"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "bytes long"),
        (lambda file: file.write_bytes(file.read_bytes()[:-1] + b"\x55"), "checksum"),
        (change_vectors, "1 vectors are not those of the database"),
    ],
)
def test_a_damaged_vector_file_is_written_again(change, message, directory, caplog):
    file = directory / "index" / "vectors.faiss"
    sound = file.read_bytes()
    change(file)
    (fault,) = run_json(directory, code=1)["faults"]
    assert (fault["kind"], fault["where"]) == ("damaged", "vectors.faiss")
    assert message in fault["message"]
    assert file.read_bytes() != sound, "without --fix nothing changes"
    assert run_json(directory, "--fix")["faults"][0]["fixed"]
    assert file.read_bytes() == sound
    caplog.clear()
    answers(directory)
    assert caplog.records == []


def test_what_a_killed_writer_left(directory):
    file = directory / "index" / "vectors.faiss.00.partial"
    file.write_bytes(b"half")
    assert run_json(directory)["faults"] == [], "it may be being written"
    os.utime(file, (0, 0))
    (fault,) = run_json(directory, code=1)["faults"]
    assert (fault["kind"], fault["where"]) == ("stray", file.name)
    run_json(directory, "--fix")
    assert not file.exists()


def test_an_index_that_cannot_be_opened_does_not_hide_the_store(directory):
    damage_block(directory, 0)
    (directory / "index" / "passages.sqlite3").write_bytes(b"\xff" * 8192)
    found = run_json(directory, code=3)
    assert "ingest the documents again" in found["unusable"][0]
    assert [fault["where"] for fault in found["faults"]] == [key(0)]
    assert (found["index"], found["unused_blocks"]) == (None, 0)
    result = run(directory)
    assert result.exit_code == 3
    assert "passages.sqlite3 is" in result.stderr


def test_a_database_that_lost_everything_is_damage(directory):
    (directory / "index" / "passages.sqlite3").write_bytes(b"")
    assert "it is empty" in run_json(directory, code=3)["unusable"][0]


@pytest.mark.parametrize("how", ["garbage", "a schema that is no text"])
def test_a_store_whose_index_is_lost_gets_a_new_one(how, directory):
    file = directory / "kv" / "cache.db"
    schema = file.read_bytes().replace(b"CREATE UNIQUE", b"CREAT\xe6 UNIQUE")
    file.write_bytes(b"\xff" * 8192 if how == "garbage" else schema)
    for name in ("cache.db-wal", "cache.db-shm"):
        (directory / "kv" / name).unlink(missing_ok=True)
    found = run_json(directory, code=3)
    assert "verify-store --fix" in found["unusable"][0]
    found = run_json(directory, "--fix")
    assert found["faults"][0]["fixed"]
    # What lay in rows is lost, and computed again.
    assert (found["store"]["blocks"], found["missing_blocks"]) == (DOCUMENTS // 2, DOCUMENTS // 2)
    assert run_json(directory)["ok"]


def test_many_faults_are_cut_in_the_table_and_whole_in_json(tmp_path):
    store = DiskStore(tmp_path)
    for number in range(30):
        store.put(key(number), b"no block")
    store.close()
    result = run(tmp_path)
    assert result.exit_code == 1
    assert result.stdout.count("damaged:") == 20
    assert "and 10 more" in result.stdout
    assert len(run_json(tmp_path, code=1)["faults"]) == 30
    result = run(tmp_path, "--fix")
    assert result.exit_code == 0
    assert "mended:" in result.stdout
    assert "sound now" in result.stdout


# -- mistakes ---------------------------------------------------------------------------------------------------------


def test_places_that_hold_nothing(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("x")
    for place in ("none", "file", "empty", "other"):
        for url in (tmp_path / place, f"disk://{tmp_path / place}"):
            result = run(url)
            assert result.exit_code == 2
            assert str(tmp_path / place) in result.stderr
    assert not (tmp_path / "none").exists()
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "empty" / "index").mkdir()
    assert "there is no passage index" in run(tmp_path / "empty").stderr
    assert run("nfs://somewhere").exit_code == 2


def test_unused_blocks_are_not_deleted_on_the_word_of_a_faulty_index(directory):
    for place in (directory / "kv", "memory://"):
        result = run(place, "--delete-unused")
        assert result.exit_code == 2
        assert "--delete-unused" in result.stderr
    execute(directory, "UPDATE block SET key = 'short' WHERE row = 2")
    result = run(directory, "--delete-unused")
    assert result.exit_code == 2
    assert "no sound index" in result.stderr
    with pytest.raises(InputError, match="no sound index"):
        check_directory(directory, delete_unused=True)
    assert len(list(DiskStore(directory / "kv").keys())) == DOCUMENTS


def test_blocks_that_are_ingested_while_the_store_is_read_are_not_unused(directory):
    @contextmanager
    def meanwhile(store):
        store.put(key(50), block(50))
        with PassageIndex(ENCODER, directory / "index") as index:
            passage = Passage("p50", "Another text.", "", "d50")
            index.replace_documents([DocumentUpdate("d50", [passage], "hash", {"p50": [key(50)]}, FINGERPRINT)])
        yield

    with closing(DiskStore(directory / "kv")) as store:
        store.put(key(60), block(60))
        report = check_directory(directory, delete_unused=True, watch=meanwhile)
        assert (report.unused, report.deleted) == (1, 1)
        assert store.contains_many([key(50), key(60)]) == {key(50)}


# -- an open index ----------------------------------------------------------------------------------------------------


def test_an_open_index_verifies_itself_and_goes_on(directory):
    with PassageIndex(ENCODER, directory / "index") as index:
        expected = index.search("text number 3", 5)
        assert index.verify().ok
        execute(directory, "DELETE FROM fact WHERE row = 2", "UPDATE term SET passages = 9 WHERE term = 'text'")
        change_vectors(directory / "index" / "vectors.faiss")
        report = index.verify()
        assert [fault.kind for fault in report.faults] == ["totals", "totals", "damaged"]
        assert not report.ok
        report = index.verify(fix=True)
        assert report.ok
        assert report.passages == DOCUMENTS
        assert index.search("text number 3", 5) == expected
        index.add([Passage("new", "text number 3")])
        assert index.verify().faults == ()
        assert len(index.search("text number 3", 50)) == DOCUMENTS + 1
    with pytest.raises(PassageIndexError, match="closed"):
        index.verify()
    with PassageIndex(ENCODER) as index:
        index.add([Passage("p", "text")])
        assert index.verify(fix=True).ok


def test_an_encoder_of_the_callers_own_counts_its_own_words(tmp_path):
    class Letters(LexicalEncoder):
        name = "letters-64"

        def passage_terms(self, passages):
            return [frozenset(passage.text) for passage in passages]

    with PassageIndex(Letters(64), tmp_path) as index:
        index.add([Passage("p", "abc")])
        assert index.verify().ok
    assert run_json(tmp_path)["ok"], "words of an encoder that is not known are left alone"


# -- waiting ----------------------------------------------------------------------------------------------------------


def test_who_waits_sees_a_bar():
    drawn = StringIO()
    out = Output(as_json=False)
    out.messages = Console(file=drawn, force_terminal=True, width=80)
    store = MemoryStore()
    for number in range(3):
        store.put(key(number), block(number))
    with _progress(out, store):
        assert store.verify().ok
    assert "blocks" in drawn.getvalue()
    store.close()
