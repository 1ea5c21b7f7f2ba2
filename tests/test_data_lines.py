"""The format of data files: what is written is read back, and what is wrong is said with file and line."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from blockrag.errors import DataError
from blockrag.finetune.data.lines import (
    BlocksLine,
    Candidate,
    ChatLine,
    Line,
    Question,
    RagLine,
    line_to_json,
    parse_line,
    read_lines,
    read_rag_lines,
    scan_lines,
    write_lines,
)
from blockrag.passage import Passage

RAG = {"passages": [{"title": "Arvo", "text": "Arvo lies north."}], "question": "Where is Arvo?", "answers": ["north"]}

text = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)
filled = text.filter(str.strip)
candidates = st.builds(
    Candidate,
    st.builds(Passage, id=filled, text=filled, title=text),
    score=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    supports=st.none() | st.booleans(),
)
questions = st.builds(
    Question,
    question=filled,
    answers=st.lists(filled, min_size=1, max_size=3).map(tuple),
    response=text,
    kind=text,
    id=text,
)
rag_lines = st.builds(
    RagLine,
    st.lists(candidates, max_size=3).map(tuple),
    st.lists(questions, min_size=1, max_size=3).map(tuple),
    id=text,
)
block_lines = st.builds(
    BlocksLine, st.tuples(st.lists(text, max_size=3), filled).map(lambda b: (*b[0], b[1])), filled, id=text
)
turns = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": filled})
chat_lines = st.builds(
    ChatLine,
    st.tuples(st.lists(turns, max_size=3), filled).map(lambda t: (*t[0], {"role": "assistant", "content": t[1]})),
    id=text,
)


# A busy machine is slow; nothing here judges times.
patient = settings(deadline=None, max_examples=50)


@patient
@given(st.one_of(rag_lines, block_lines, chat_lines))
def test_a_line_is_read_as_it_was_written(line: Line) -> None:
    assert parse_line(json.loads(json.dumps(line_to_json(line))), "here") == line


@settings(patient, max_examples=20)
@given(st.lists(st.one_of(rag_lines, block_lines, chat_lines), min_size=1, max_size=4))
def test_so_is_a_file(tmp_path_factory: pytest.TempPathFactory, lines: list[Line]) -> None:
    path = tmp_path_factory.mktemp("lines") / "lines.jsonl"
    assert write_lines(path, lines) == len(lines)
    assert [line for _, line in read_lines(path)] == lines


def test_the_number_of_a_line_counts_blank_ones(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(RAG).encode() + b"\n\n" + json.dumps(RAG).encode())
    assert [number for number, _ in read_lines(path)] == [2, 4]


def test_the_response_is_the_target_where_there_is_one() -> None:
    assert Question("q", ("a", "b")).target == "a"
    assert Question("q", ("a", "b"), response="A.").target == "A."


def changed(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in {**RAG, **fields}.items() if value is not ...}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ([], "a JSON list, not an object"),
        ({"prompt": "p"}, r"has the fields \['prompt'\]; a line needs passages with a question and answers"),
        (changed(answers=...), "answers must be a list of at least one non-empty string, got None"),
        (changed(answers=[]), r"answers must be .+, got \[\]"),
        (changed(answers=["a", " "]), "answers must be"),
        (changed(answers=["\ud800"]), "answer 1 holds a lone surrogate"),
        (changed(question=" "), "question must be a non-empty string, got ' '"),
        (changed(awnser="a"), r"unknown fields \['awnser'\]; known here are"),
        (changed(passages={}), "passages is a dict; pass a list"),
        (changed(passages=["text"]), "passage 1: must be an object with a text, got 'text'"),
        (changed(passages=[{"text": "t"}, {"title": "t"}]), "passage 2: text must be a non-empty string, got None"),
        (changed(passages=[{"text": "t", "score": True}]), "passage 1: score must be a finite number, got True"),
        (changed(passages=[{"text": "t", "score": 10**400}]), "passage 1: score must be a finite number"),
        (changed(passages=[{"text": "t", "supports": 1}]), "passage 1: supports must be true or false, got 1"),
        ({"passages": [], "questions": []}, "questions must be a list with at least one object"),
        ({"passages": [], "questions": [{"question": "q"}]}, "question 1: answers must be"),
        ({"passages": [], "questions": ["q"]}, "question 1: a question must be an object"),
        ({"blocks": [], "response": "r"}, "blocks must be a list of at least one string"),
        ({"blocks": ["a", ""], "response": "r"}, "the last of the blocks is empty"),
        ({"blocks": ["a\ud800", "b"], "response": "r"}, "blocks 1 holds a lone surrogate"),
        ({"blocks": ["a"]}, "response must be a non-empty string, got None"),
        ({"blocks": ["a", "b"], "response": "r", "prompt": "a b"}, "the prompt is not the join of its blocks"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": [{"role": "bot", "content": "c"}]}, r"message 1: must hold a role \(system, user, assistant\)"),
        ({"messages": [{"role": "user", "content": ""}]}, "message 1: content must be a non-empty string"),
        ({"messages": [{"role": "user", "content": "c"}]}, "ends with a user message; there is no answer to train"),
    ],
)
def test_what_is_wrong_with_a_line_is_said_with_its_place(tmp_path: Path, line: object, problem: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(RAG) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(DataError, match=rf"^{path}, line 2(: |, ){problem}"):
        list(read_lines(path))


@pytest.mark.parametrize("data", [b"{", b'{"a": NaN}', b"\xff", b"[" * 100_000])
def test_what_is_no_json_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "bad.jsonl").write_bytes(data)
    with pytest.raises(DataError, match="line 1: not valid JSON"):
        list(read_lines(tmp_path / "bad.jsonl"))


def test_scanning_goes_on_behind_a_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text("{}\n" + json.dumps(RAG) + "\nnonsense\n")
    found = list(scan_lines(path))
    assert [(number, isinstance(line, DataError)) for number, line in found] == [(1, True), (2, False), (3, True)]


def test_files_without_lines_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no lines"):
        list(read_lines(tmp_path / "empty.jsonl"))
    with pytest.raises(DataError, match=r"cannot read .+gone"):
        list(read_lines(tmp_path / "gone.jsonl"))


def test_conversations_are_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    write_lines(path, [ChatLine(({"role": "assistant", "content": "hello"},))])
    with pytest.raises(DataError, match="line 1: needs passages and a question, got messages"):
        list(read_rag_lines(path))


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "made" / "lines.jsonl"
    line = parse_line(RAG, "here")
    write_lines(path, [line])
    before = path.read_bytes()

    def broken() -> Any:
        yield line
        raise DataError("the source broke off")

    with pytest.raises(DataError, match="broke off"):
        write_lines(path, broken())
    with pytest.raises(DataError, match="nothing to write"):
        write_lines(path, [])
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask
    with pytest.raises(DataError, match="cannot write"):
        write_lines(path / "below", [line])


def test_only_a_regular_file_is_replaced_and_that_is_said_before_the_work(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()

    def work() -> Iterator[Line]:
        raise AssertionError("an hour of ranking")
        yield

    for name in ("pipe", "folder"):
        with pytest.raises(DataError, match=f"cannot write .+{name} .not a regular file.; pass the name of a file"):
            write_lines(tmp_path / name, work())
    assert (tmp_path / "pipe").is_fifo()
