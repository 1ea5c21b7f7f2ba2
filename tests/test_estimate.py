"""The number of documents a progress bar is told before anything is read."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from blockrag import Document, Passage
from blockrag.ingest import read_documents
from blockrag.ingest.estimate import expected_documents


def fill(folder: Path) -> Path:
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "no.txt").write_text("no")
    (folder / "a.txt").write_text("a")
    (folder / "deep" / "b.md").write_text("b")
    (folder / "deep" / ".c.txt").write_text("no")
    (folder / "deep" / "er" / "d").write_text("d")
    (folder / "records.jsonl").write_text('{"text": "1"}\n{"text": "2"}\n{"text": "3"}\n')
    (folder / "table.tsv").write_text("id\ttext\ttitle\n1\tone\tOne\n2\ttwo\tTwo\n")
    return folder


def test_the_estimate_is_what_reading_finds(tmp_path: Path) -> None:
    folder = fill(tmp_path / "docs")
    failures: list[object] = []
    assert expected_documents([folder]) == len(list(read_documents([folder], on_failure=failures.append))) == 8
    assert expected_documents(str(folder)) == 8
    assert expected_documents(folder / "a.txt") == 1
    assert not failures


def test_objects_are_counted_by_document() -> None:
    passages = [Passage(id=f"{d}{n}", text="x", document_id=d) for d in "ab" for n in range(3)]
    assert expected_documents(passages) == 2
    assert expected_documents([Document(id="1", text="x"), *passages, Document(id="2", text="y")]) == 4
    assert expected_documents([]) == 0


def test_what_cannot_be_told_is_none(tmp_path: Path) -> None:
    packed = tmp_path / "records.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "1"}\n'))
    assert expected_documents([packed]) is None
    assert expected_documents([tmp_path]) is None
    (tmp_path / "list.json").write_text("[]")
    assert expected_documents([tmp_path / "list.json"]) is None
    assert expected_documents(iter([Document(id="1", text="x")])) is None
    assert expected_documents(["nul \0 byte"]) in (0, None)


@pytest.mark.parametrize("missing", ["nowhere", "nowhere/at/all.txt"])
def test_missing_paths_count_nothing(tmp_path: Path, missing: str) -> None:
    assert expected_documents([tmp_path / missing]) == 0
