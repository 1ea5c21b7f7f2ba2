"""Readers of published sets: the true formats in a few lines of our own, the real files where they are at hand."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest

from blockrag.errors import DataError, InputError
from blockrag.finetune.data import records
from blockrag.finetune.data.chat import read_chat
from blockrag.finetune.data.lines import RagLine, line_to_json, parse_line
from blockrag.finetune.data.multihop import read_multihop
from blockrag.finetune.data.records import read_records
from blockrag.finetune.data.retrieved import read_retrieved
from blockrag.finetune.data.sources import SOURCES
from blockrag.finetune.data.squad import read_squad

REAL = Path(__file__).parents[2] / "shared" / "data"

PARAGRAPHS = [
    ["Arvo", ["Arvo is a country.", "It lies in the north."]],
    ["Tellin", ["Tellin is the capital of Arvo."]],
    ["Brask", ["Brask is a country in the south.", " Its capital is Onder."]],
]
FACTS = [["Arvo", 1], ["Tellin", 0]]
TWOWIKI = {
    "_id": "w1",
    "type": "compositional",
    "question": "Where does the country whose capital is Tellin lie?",
    "context": PARAGRAPHS,
    "supporting_facts": FACTS,
    "evidences": [["Tellin", "capital of", "Arvo"]],
    "answer": "in the north",
}
TWOWIKI_HUB = {**TWOWIKI, **{name: json.dumps(TWOWIKI[name]) for name in ("context", "supporting_facts", "evidences")}}
HOTPOT_HUB = {
    "id": "h1",
    "question": TWOWIKI["question"],
    "answer": "in the north",
    "type": "bridge",
    "level": "hard",
    "supporting_facts": {"title": ["Arvo", "Tellin"], "sent_id": [1, 0]},
    "context": {"title": [title for title, _ in PARAGRAPHS], "sentences": [sentences for _, sentences in PARAGRAPHS]},
}
IRCOT = {
    "question_id": "i1",
    "question_text": TWOWIKI["question"],
    "answers_objects": [{"number": "", "date": {"day": ""}, "spans": ["in the north", "north", "north"]}],
    "contexts": [
        {"idx": number, "title": title, "paragraph_text": "".join(sentences), "is_supporting": number < 2}
        for number, (title, sentences) in enumerate(PARAGRAPHS)
    ],
}
MUSIQUE = {
    "id": "2hop__1_2",
    "question": TWOWIKI["question"],
    "answer": "in the north",
    "answer_aliases": ["north"],
    "answerable": True,
    "paragraphs": IRCOT["contexts"],
    "question_decomposition": [],
}
FID = {
    "question": "what is the capital of arvo",
    "answers": ["Tellin", "Tellin City", "Tellin"],
    "ctxs": [
        {"id": 7, "title": "Arvo", "text": "The capital of Arvo is Tellin.", "score": "81.25", "has_answer": True},
        {"id": "8", "title": "", "text": "Brask is a country.", "score": 80.5, "has_answer": False},
        {"id": "9", "title": "Cend", "text": " ", "score": 80.5, "has_answer": False},
    ],
}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Arvo_(country)",
            "paragraphs": [
                {
                    "context": "Arvo lies in the north. Its capital is Tellin.",
                    "qas": [
                        {
                            "id": "q1",
                            "question": "Where does Arvo lie?",
                            "answers": [
                                {"text": "in the north", "answer_start": 10},
                                {"text": "the north", "answer_start": 13},
                                {"text": "in the north", "answer_start": 10},
                            ],
                            "is_impossible": False,
                        },
                        {"id": "q2", "question": "Who rules Arvo?", "answers": [], "is_impossible": True},
                        {"id": "q3", "question": "What is its capital?", "answers": [{"text": "Tellin"}]},
                    ],
                },
                {"context": "Arvo has rivers.", "qas": [{"question": "Why?", "answers": [], "is_impossible": True}]},
                {"context": "Arvo has two lakes.", "qas": [{"question": "How many?", "answers": [{"text": "two"}]}]},
            ],
        },
        {
            "title": "Brask",
            "paragraphs": [
                {
                    "context": f"Brask has {n} hills.",
                    "qas": [{"question": f"Hills {n}?", "answers": [{"text": str(n)}]}],
                }
                for n in range(2, 8)
            ],
        },
    ],
}


def json_list(path: Path, records: list[Any]) -> None:
    path.write_text(json.dumps(records, indent=1), "utf-8")


def json_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")


def packed_lines(path: Path, records: list[Any]) -> None:
    path.write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))


def as_parquet(path: Path, records: list[Any]) -> None:
    parquet.write_table(pa.Table.from_pylist(records), path)


def texts(line: RagLine) -> list[str]:
    return [one.passage.text for one in line.passages]


# -- forms of files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("write", [json_list, json_lines, packed_lines, as_parquet])
def test_the_form_of_a_file_is_seen_not_named(tmp_path: Path, write: Callable[[Path, list[Any]], None]) -> None:
    path = tmp_path / "data.bin"
    write(path, [{"a": 1}, {"a": "é" if write is not as_parquet else 2}])
    assert next(dict(record.fields) for record in read_records(path)) == {"a": 1}
    assert len(list(read_records(path))) == 2


def test_a_long_list_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = [{"n": n, "text": 'a "[{]}," é\n' * (n % 7)} for n in range(40)]
    path = tmp_path / "list.json"
    path.write_text("\ufeff " + json.dumps(expected, indent=2, ensure_ascii=False) + "\n", "utf-8")
    for size in (1, 2, 3, 17, 1 << 20):
        monkeypatch.setattr(records, "_PIECE_CHARACTERS", size)
        assert [dict(record.fields) for record in read_records(path)] == expected
    assert [record.where for record in read_records(path)][:2] == [f"{path}, record 1", f"{path}, record 2"]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no records"),
        (b"[]", "holds no records"),
        (b"[1]", "record 1: a JSON int, not an object"),
        (b'[{"a": 1}, "b"]', "record 2: a JSON str, not an object"),
        (b'[{"a": 1}', "record 2: not valid JSON .expected ']', got 'the end of the file'"),
        (b'[{"a": 1},', "record 2: not valid JSON"),
        (b'[{"a": 1},]', "record 2: not valid JSON .Expecting value"),
        (b'[{"a": 1} {"a": 1}]', "record 2: not valid JSON .expected ']', got '{'"),
        (b'[{"a": 1}] x', "record 2: not valid JSON .there is more behind"),
        (b'[{"a": NaN}]', "record 1: not valid JSON .NaN is not JSON"),
        (b'[{"a": "\xff"}]', "record 1: not valid JSON"),
        (b'{"a": 1}\n{"a": \n', "line 2: not valid JSON"),
        (b'{"a": \n{"b": 1}\n', "line 1: not valid JSON"),
        (b'{"a": 1}\n[]\n', "line 2: a JSON list, not an object"),
        (b"hello", "line 1: not valid JSON"),
        (gzip.compress(b'{"a": 1}', mtime=0)[:-9], "cannot read"),
        (b"\x1f\x8bnonsense", "cannot read"),
        (b"PAR1nonsense", "row 1: not a whole parquet file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(DataError, match=problem) as caught:
        list(read_records(tmp_path / "bad"))
    assert str(tmp_path / "bad") in str(caught.value)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .+gone .No such file"):
        list(read_records(tmp_path / "gone"))


def test_parquet_without_pyarrow_says_what_to_install(tmp_path: Path) -> None:
    as_parquet(tmp_path / "data.parquet", [{"a": 1}])
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from blockrag.errors import MissingDependencyError\n"
        "from blockrag.finetune.data.records import read_records\n"
        "try: list(read_records(sys.argv[1]))\n"
        "except MissingDependencyError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data.parquet")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "pip install 'blockrag[data]'" in printed


# -- questions with paragraphs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "write"),
    [
        (TWOWIKI, json_list),
        (TWOWIKI, json_lines),
        (TWOWIKI_HUB, as_parquet),
        (TWOWIKI_HUB, json_lines),
        (HOTPOT_HUB, as_parquet),
        (HOTPOT_HUB, packed_lines),
    ],
)
def test_multihop_sets_with_sentences(tmp_path: Path, record: Any, write: Callable[[Path, list[Any]], None]) -> None:
    write(tmp_path / "data", [record])
    (line,) = read_multihop(tmp_path / "data")
    (question,) = line.questions
    assert question.question == record["question"]
    assert question.answers == ("in the north",)
    assert (question.kind, question.id) == (record["type"], record.get("_id", record.get("id")))
    assert [one.passage.title for one in line.passages] == ["Arvo", "Tellin", "Brask"]
    assert [one.supports for one in line.passages] == [True, True, False]
    # A space is put between sentences that bring none.
    assert texts(line)[0] == "Arvo is a country. It lies in the north."
    assert texts(line)[2] == "Brask is a country in the south. Its capital is Onder."
    (published,) = read_multihop(tmp_path / "data", sentence_separator="")
    assert texts(published)[0] == "Arvo is a country.It lies in the north."


def test_hotpotqa_is_read_as_its_text_was(tmp_path: Path) -> None:
    """Its sentences are cut from whole text, sometimes inside of one."""
    cut = [["Arvo", ["Arvo! is a film.", ' It followed "Oh!', '" (1903).']], ["Brask", ['A file ends in ".', 'brk".']]]
    json_list(tmp_path / "data", [{**TWOWIKI, "context": cut}])
    (line,) = SOURCES["hotpotqa"](tmp_path / "data")
    assert isinstance(line, RagLine)
    assert texts(line) == ['Arvo! is a film. It followed "Oh!" (1903).', 'A file ends in ".brk".']
    (separated,) = SOURCES["hotpotqa"](tmp_path / "data", sentence_separator=" ")
    assert isinstance(separated, RagLine)
    assert texts(separated)[1] == 'A file ends in ". brk".'


@pytest.mark.parametrize(
    ("record", "answers"), [(IRCOT, ("in the north", "north")), (MUSIQUE, ("in the north", "north"))]
)
def test_multihop_sets_with_whole_paragraphs(tmp_path: Path, record: Any, answers: tuple[str, ...]) -> None:
    json_lines(tmp_path / "data", [record])
    (line,) = read_multihop(tmp_path / "data")
    assert line.questions[0].answers == answers
    assert line.questions[0].id in ("i1", "2hop__1_2")
    assert [one.supports for one in line.passages] == [True, True, False]
    assert [one.passage.title for one in line.passages] == ["Arvo", "Tellin", "Brask"]


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    json_lines(tmp_path / "a", [{**MUSIQUE, "answerable": False}, {**TWOWIKI, "context": [["Arvo", []], *PARAGRAPHS]}])
    reasons: Counter[str] = Counter()
    (line,) = read_multihop(tmp_path / "a", left_out=lambda reason: reasons.update([reason]))
    assert len(line.passages) == 3
    assert reasons == {"unanswerable question": 1, "passage without text": 1}


def test_without_facts_nobody_says_what_supports(tmp_path: Path) -> None:
    json_lines(tmp_path / "a", [{name: value for name, value in TWOWIKI.items() if name != "supporting_facts"}])
    (line,) = read_multihop(tmp_path / "a")
    assert [one.supports for one in line.passages] == [None] * 3


@pytest.mark.parametrize("write", [json_lines, json_list])
def test_fid_candidates(tmp_path: Path, write: Callable[[Path, list[Any]], None]) -> None:
    gold = {"title": "Arvo", "text": "Tellin.", "hasanswer": True, "isgold": False}
    write(
        tmp_path / "a", [FID, {"question": "q", "answer": "a", "ctxs": [gold]}, {"question": "q", "answer": ["a", "b"]}]
    )
    first, second, third = read_retrieved(tmp_path / "a")
    assert first.questions[0].answers == ("Tellin", "Tellin City")
    assert [(one.passage.id, one.score, one.supports) for one in first.passages] == [
        ("7", 81.25, True),
        ("8", 80.5, False),
    ]
    assert [one.supports for one in second.passages] == [False]
    assert (third.passages, third.questions[0].answers) == ((), ("a", "b"))


def bad(record: Any, **fields: Any) -> Any:
    return {name: value for name, value in {**record, **fields}.items() if value is not ...}


@pytest.mark.parametrize(
    ("reader", "record", "problem"),
    [
        (read_multihop, bad(TWOWIKI, answer=...), "answers must be a list of at least one non-empty string"),
        (read_multihop, bad(TWOWIKI, question=""), "question must be a non-empty string"),
        (read_multihop, bad(TWOWIKI, context=...), r"context must be a list of \[title, sentences\] pairs"),
        (read_multihop, bad(TWOWIKI, context=[["Arvo"]]), "context must be a list of"),
        (read_multihop, bad(TWOWIKI, context="[["), "context: not valid JSON"),
        (read_multihop, bad(TWOWIKI, context=[["Arvo", "text"]]), "paragraph 'Arvo' must hold a list of sentences"),
        (read_multihop, bad(TWOWIKI, context=[[7, ["text"]]]), "passage 1: title must be a string, got 7"),
        (
            read_multihop,
            bad(TWOWIKI, supporting_facts={"title": []}),
            r"supporting_facts must be a list of \[title, sent_id",
        ),
        (read_multihop, bad(HOTPOT_HUB, context={"title": ["a"], "sentences": []}), "context must be"),
        (read_multihop, bad(IRCOT, contexts={}), "contexts must be a list, got {}; is this the right source"),
        (read_multihop, bad(IRCOT, contexts=[{"text": "t"}]), "contexts must hold objects with a paragraph_text"),
        (read_multihop, bad(IRCOT, answers_objects=[{}]), "answers_objects must hold objects with spans"),
        (read_multihop, bad(MUSIQUE, answer_aliases="north"), "answer_aliases must be a list"),
        (read_retrieved, bad(FID, answers=...), "answers must be"),
        (read_retrieved, bad(FID, ctxs={}), "ctxs must be a list"),
        (read_retrieved, bad(FID, ctxs=["text"]), "ctxs 1: must be an object with a text"),
        (read_retrieved, bad(FID, ctxs=[{"title": "t"}]), "passage 1: text must be a non-empty string"),
        (
            read_retrieved,
            bad(FID, ctxs=[{"text": "t", "score": "high"}]),
            "ctxs 1: score must be a finite number, got 'high'",
        ),
        (read_squad, {"question": "q"}, "SQuAD has data, or context and question"),
        (read_squad, {"context": None, "question": "q", "answers": []}, "context must be a string, got None"),
        (read_squad, {"data": ["text"]}, "article 1: must be an object with a list of paragraphs"),
        (
            read_squad,
            {"data": [{"paragraphs": [{"context": "c"}]}]},
            "article 1, paragraph 1: must be an object with a context",
        ),
        (
            read_squad,
            {"data": [{"paragraphs": [{"context": "c", "qas": [{"question": "q"}]}]}]},
            "article 1, paragraph 1, question 1: must be an object with a question and a list of answers",
        ),
        (
            read_squad,
            {"data": [{"paragraphs": [{"context": "", "qas": []}]}]},
            "article 1, paragraph 1, passage 1: text must be a non-empty string",
        ),
        (read_chat, {"messages": "hi"}, "messages must be a list"),
        (read_chat, {"messages": [{"role": "user", "content": 1}]}, "message 1: must hold a role and a content"),
    ],
)
def test_what_is_wrong_with_a_record_is_said_with_its_place(
    tmp_path: Path, reader: Callable[[Path], Any], record: Any, problem: str
) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record]))
    with pytest.raises(DataError, match=problem) as caught:
        list(reader(path))
    assert str(caught.value).startswith(f"{path}, record 1")


# -- SQuAD ------------------------------------------------------------------------------------------------------------


def squad_file(path: Path) -> Path:
    path.write_text(json.dumps(SQUAD, indent=1))
    return path


def test_squad_packs_the_questions_of_a_paragraph(tmp_path: Path) -> None:
    reasons: Counter[str] = Counter()
    lines = list(read_squad(squad_file(tmp_path / "a"), left_out=lambda reason: reasons.update([reason])))
    assert reasons == {"unanswerable question": 2, "paragraph without questions": 1}
    assert len(lines) == 8
    first = lines[0]
    assert first.passages[0].passage.title == "Arvo (country)"
    assert first.passages[0].passage.id == "Arvo_(country)#1"
    assert first.passages[0].supports is True
    assert [(q.id, q.question, q.answers) for q in first.questions] == [
        ("q1", "Where does Arvo lie?", ("in the north", "the north")),
        ("q3", "What is its capital?", ("Tellin",)),
    ]


def test_squad_adds_other_paragraphs(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "a")
    alone = list(read_squad(path))
    lines = list(read_squad(path, distractors=4))
    assert lines == list(read_squad(path, distractors=4, seed=42))
    assert lines != list(read_squad(path, distractors=4, seed=43))
    places = set()
    for line, own in zip(lines, alone, strict=True):
        assert line.questions == own.questions
        assert len(set(texts(line))) == 5
        (gold,) = [number for number, one in enumerate(line.passages) if one.supports]
        assert line.passages[gold].passage == own.passages[0].passage
        assert all(one.supports is False for number, one in enumerate(line.passages) if number != gold)
        places.add(gold)
    assert len(places) > 1


def test_squad_takes_them_from_the_same_article_first(tmp_path: Path) -> None:
    lines = list(read_squad(squad_file(tmp_path / "a"), distractors=3, same_article=True))
    for line in lines[2:]:
        assert {one.passage.title for one in line.passages} == {"Brask"}
    # Of Arvo there are two others; the third is from elsewhere.
    assert Counter(one.passage.title for one in lines[0].passages) == {"Arvo (country)": 3, "Brask": 1}


def test_squad_packs_several_paragraphs(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "a")
    alone = {line.passages[0].passage.id: line.questions for line in read_squad(path)}
    lines = list(read_squad(path, gold=3, distractors=1))
    assert [len(line.passages) for line in lines] == [4, 4, 3]
    seen: list[Any] = []
    for line in lines:
        # Nothing says which passage supports which of the questions.
        assert {one.supports for one in line.passages} == {None}
        for one in line.passages:
            if set(alone.get(one.passage.id, "?")) <= set(line.questions):
                seen.append(one.passage.id)
    assert Counter(seen) == Counter(alone.keys())
    assert sorted(q.question for line in lines for q in line.questions) == sorted(
        q.question for asked in alone.values() for q in asked
    )


def test_squad_refuses_what_it_cannot_draw(tmp_path: Path) -> None:
    path = squad_file(tmp_path / "a")
    with pytest.raises(InputError, match="has 9 paragraphs, too few for 1 with 9 others"):
        list(read_squad(path, distractors=9))
    assert len(next(read_squad(path, distractors=8)).passages) == 9
    with pytest.raises(InputError, match="gold must be at least 1"):
        list(read_squad(path, gold=0))
    with pytest.raises(InputError, match="distractors is 0; ask for some"):
        list(read_squad(path, same_article=True))


@pytest.mark.parametrize("write", [as_parquet, json_lines])
def test_squad_as_the_hub_has_it(tmp_path: Path, write: Callable[[Path, list[Any]], None]) -> None:
    flat = [
        {"id": q["id"], "title": "Arvo", "context": "Arvo lies in the north.", "question": q["question"], "answers": a}
        for q, a in [
            ({"id": "1", "question": "Where?"}, {"text": ["north", "north"], "answer_start": [17, 17]}),
            ({"id": "2", "question": "Who?"}, {"text": [], "answer_start": []}),
            ({"id": "3", "question": "What lies north?"}, {"text": ["Arvo"], "answer_start": [0]}),
        ]
    ]
    write(tmp_path / "a", flat)
    (line,) = read_squad(tmp_path / "a")
    assert [(q.id, q.answers) for q in line.questions] == [("1", ("north",)), ("3", ("Arvo",))]
    assert line.passages[0].passage.id == "Arvo#1"


def test_a_bad_flat_record_is_said_with_its_own_place(tmp_path: Path) -> None:
    flat = [
        {"title": title, "context": title, "question": asked, "answers": {"text": ["a"]}}
        for title, asked in [("Arvo", "Where?"), ("Brask", "Where?"), ("Arvo", " ")]
    ]
    json_lines(tmp_path / "a", flat)
    with pytest.raises(DataError, match="a, line 3: question must be a non-empty string"):
        list(read_squad(tmp_path / "a"))


def test_articles_without_titles_are_named_by_number(tmp_path: Path) -> None:
    path = tmp_path / "one, two.json"
    path.write_text(json.dumps({"data": [{"paragraphs": SQUAD["data"][1]["paragraphs"][:1]}]}))
    (line,) = read_squad(path)
    assert line.passages[0].passage.id == "article 1, paragraph 1"


# -- conversations ----------------------------------------------------------------------------------------------------


def test_conversations_as_the_hub_has_them(tmp_path: Path) -> None:
    def talk(*turns: str) -> Any:
        roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
        messages = [{"role": roles[turn[0]], "content": turn[1:]} for turn in turns]
        return {"id": "x_1", "messages": messages, "source": "somewhere"}

    talks = [
        talk("uhello", "ahi"),
        talk("sbe brief", "uhello", "ahi", "uwhy?", "asince"),
        talk("uhello", "ahi", "umore"),
    ]
    talks += [talk("s", "uhello", "ahi")]
    talks += [talk("uhello", "tnothing", "ahi"), talk("uhello", "a "), talk("uhello", "ahi", "aagain"), talk("ahi")]
    reasons: Counter[str] = Counter()
    as_parquet(tmp_path / "a", talks)
    lines = list(read_chat(tmp_path / "a", left_out=lambda reason: reasons.update([reason])))
    assert [[message["content"] for message in line.messages] for line in lines] == [
        ["hello", "hi"],
        ["be brief", "hello", "hi", "why?", "since"],
        ["", "hello", "hi"],
    ]
    assert lines[0].id == "x_1"
    assert reasons == {
        "conversation without an answer": 1,
        "conversation with other roles": 1,
        "conversation with an empty message": 1,
        "conversation out of turn": 2,
    }


# -- the real files ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not REAL.is_dir(), reason="the data sets are not at hand")
@pytest.mark.parametrize(
    ("source", "file", "lines", "questions", "passages"),
    [
        ("squad", "squad-train-v1.1.json.gz", 18_896, 87_599, 18_896),
        ("squad", "squad-dev-v1.1.json", 2_067, 10_570, 2_067),
        ("squad", "xquad.en.json", 240, 1_190, 240),
        ("hotpotqa", "hotpotqa-ircot-dev500.jsonl", 500, 500, 4_931),
        ("hotpotqa", "hotpotqa-rpt-train.jsonl", 300, 300, 2_980),
        ("hotpotqa", "hotpotqa-rpt-dev.jsonl", 300, 300, 2_987),
        ("nq", "nq-open-oracle.jsonl.gz", 2_655, 2_655, 2_655),
        ("nq", "NQ-open.dev.jsonl", 3_610, 3_610, 0),
    ],
)
def test_real_files(source: str, file: str, lines: int, questions: int, passages: int) -> None:
    reasons: Counter[str] = Counter()
    counts = [0, 0, 0]
    for number, line in enumerate(SOURCES[source](REAL / file, left_out=lambda reason: reasons.update([reason]))):
        assert isinstance(line, RagLine)
        counts = [counts[0] + 1, counts[1] + len(line.questions), counts[2] + len(line.passages)]
        if source == "hotpotqa":
            assert sum(bool(one.supports) for one in line.passages) == 2
        if number % 100 == 0:
            assert parse_line(json.loads(json.dumps(line_to_json(line))), "here") == line
    assert counts == [lines, questions, passages]
    assert not reasons
