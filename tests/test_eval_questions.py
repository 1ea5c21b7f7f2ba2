"""Which questions are asked, with which passages, in which order."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import DataError, InputError
from blockrag.evaluation.questions import Selection, read_questions
from blockrag.finetune.data.lines import Candidate
from blockrag.passage import Passage


def passage(name: str, **fields: Any) -> dict[str, Any]:
    return {"id": name, "title": name.upper(), "text": f"The word is {name}.", **fields}


LINES: list[dict[str, Any]] = [
    {
        "id": "l1",
        "passages": [passage("a"), passage("b", supports=True), passage("c")],
        "questions": [
            {"question": "One?", "answers": ["b"], "kind": "fact", "id": "q1"},
            {"question": "Two?", "answers": ["a", "b"], "kind": "order"},
        ],
    },
    {"passages": [passage("d"), passage("e")], "question": "Three?", "answers": ["word is E"]},
]


def write(path: Path, lines: list[Any]) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n", "utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "data.jsonl", [LINES[0], "", LINES[1]])


def ids(asked: Any) -> list[str]:
    return ["".join(passage.id for passage in question.passages) for question in asked.questions]


def test_every_question_with_its_line(data: Path) -> None:
    asked = read_questions(data)
    assert [(one.index, one.line, one.id, one.kind, one.question) for one in asked.questions] == [
        (0, 1, "q1", "fact", "One?"),
        (1, 1, "l1", "order", "Two?"),
        (2, 3, "", "", "Three?"),
    ]
    assert ids(asked) == ["abc", "abc", "de"]
    assert asked.questions[1].answers == ("a", "b")
    assert asked.name == "data.jsonl"


def test_the_first_k_passages_then_their_order(data: Path) -> None:
    assert ids(read_questions(data, Selection(k=2))) == ["ab", "ab", "de"]
    assert ids(read_questions(data, Selection(k=2, order="reversed"))) == ["ba", "ba", "ed"]
    assert ids(read_questions(data, Selection(k=0))) == ["", "", ""]


def test_shuffling_depends_on_the_seed_and_the_line_alone(data: Path) -> None:
    orders = {tuple(ids(read_questions(data, Selection(order="shuffled", seed=seed)))) for seed in range(12)}
    assert len(orders) > 3
    assert all(first == second for first, second, _ in orders), "questions of a line see the same prompt"
    few = read_questions(data, Selection(order="shuffled", seed=4, limit=1))
    assert ids(few)[0] in ids(read_questions(data, Selection(order="shuffled", seed=4)))


def test_a_sample_is_drawn_by_seed_and_kept_in_order(tmp_path: Path) -> None:
    lines = [{"question": f"{n}?", "answers": ["x"], "passages": [passage("a")]} for n in range(50)]
    path = write(tmp_path / "many.jsonl", lines)
    first = read_questions(path, Selection(limit=5))
    assert [one.line for one in first.questions] == [1, 2, 3, 4, 5]
    drawn = read_questions(path, Selection(limit=5, seed=1))
    assert [one.line for one in drawn.questions] == sorted(one.line for one in drawn.questions)
    assert drawn == read_questions(path, Selection(limit=5, seed=1))
    assert drawn.questions != read_questions(path, Selection(limit=5, seed=2)).questions
    assert [one.index for one in drawn.questions] == list(range(5))


def test_recall_says_what_it_rests_on(data: Path) -> None:
    recall = read_questions(data).recall
    # Marked: only b, the second passage. Unmarked: the text of e holds the answer.
    assert recall["flag"] == {"questions": 2, "at": {"1": 0.0, "2": 1.0, "3": 1.0}}
    assert recall["answer"] == {"questions": 1, "at": {"1": 0.0, "2": 1.0}}
    assert read_questions(data, Selection(k=0)).recall == {}


def test_evidence_behind_the_first_k_is_missed_evidence(tmp_path: Path) -> None:
    """Data that marks nothing but the evidence, as is allowed: the mark decides even where it is cut off."""
    marked = [passage("b", supports=True), passage("a"), passage("c")]
    lines = [
        {"passages": marked, "question": "One?", "answers": ["word"]},
        {"passages": marked[::-1], "question": "Two?", "answers": ["word"]},
    ]
    asked = read_questions(write(tmp_path / "data.jsonl", lines), Selection(k=2))
    assert asked.recall == {"flag": {"questions": 2, "at": {"1": 0.5, "2": 0.5}}}


def test_questions_without_passages_are_searched_for(tmp_path: Path) -> None:
    path = write(tmp_path / "own.jsonl", [{"question": "Who?", "answers": ["x"]}, LINES[1]])
    asks = []

    def retrieve(question: str, k: int) -> list[Candidate]:
        asks.append((question, k))
        return [Candidate(Passage(id=str(n), text=f"text {n}", metadata={"page": n}), 1.0 / n) for n in range(1, k + 1)]

    asked = read_questions(path, Selection(k=2), retrieve=retrieve)
    assert asks == [("Who?", 2)]
    assert ids(asked) == ["12", "de"]
    assert ids(read_questions(path, Selection(k=2, order="reversed"), retrieve=retrieve)) == ["21", "ed"]
    # By default all passages of a line, however many, and a few of the index.
    many = write(tmp_path / "many.jsonl", [LINES[1] | {"passages": [passage(c) for c in "abcdefgh"]}, LINES[1]])
    assert ids(read_questions(many, retrieve=retrieve)) == ["abcdefgh", "de"]
    assert ids(read_questions(path, retrieve=retrieve)) == ["12345", "de"]
    with pytest.raises(DataError, match=r"own\.jsonl, line 1: has no passages; pass an index"):
        read_questions(path)


def test_the_digest_covers_passages_and_their_order(data: Path) -> None:
    def digest(**selection: Any) -> str:
        return str(read_questions(data, Selection(**selection)).describe()["digest"])

    assert digest() == digest()
    assert len({digest(), digest(k=2), digest(order="reversed"), digest(limit=2)}) == 4


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"passages": [], "question": "a?", "answers": []}, "answers must be a list"),
        ({"blocks": ["a", "b"], "response": "c"}, "has no question to evaluate"),
        ({"passages": [], "question": "a?", "answers": ["b"], "kind": "all"}, "kind 'all' is what tables call"),
        ("[1]", "not an object"),
        ("{", "not valid JSON"),
        ({"question": "a?", "answers": ["b"], "pasages": []}, "unknown fields"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: Any, problem: str) -> None:
    path = write(tmp_path / "bad.jsonl", [LINES[1], line])
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2.*{problem}"):
        read_questions(path)


def test_no_file_and_no_lines(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="holds no lines"):
        read_questions(write(tmp_path / "empty.jsonl", [""]))


@pytest.mark.parametrize("values", [{"k": -1}, {"order": "best"}, {"limit": 0}])
def test_selections_out_of_range(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=next(iter(values))):
        Selection(**values)
