"""`blockrag data`: every step by its command, from a data set's file to lines with responses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_server import live_server
from test_cli import refused, run, run_json
from test_data_readers import FID, HOTPOT_HUB, MUSIQUE, SQUAD, TWOWIKI

from blockrag.cli.data import Source
from blockrag.finetune.data.lines import read_rag_lines
from blockrag.finetune.data.sources import SOURCES
from blockrag.model.block_model import BlockModel

CAPITALS = {"Bhutan": "Thimphu", "Kenya": "Nairobi", "Peru": "Lima"}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    passages = [{"title": c, "text": f"The capital of {c} is {t}."} for c, t in CAPITALS.items()]
    lines = [
        {"passages": passages, "question": f"What is the capital of {c}?", "answers": [t], "kind": "fact"}
        for c, t in CAPITALS.items()
    ]
    path = tmp_path / "capitals.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_help_names_the_sources_and_loads_no_heavy_library() -> None:
    assert [source.value for source in Source] == list(SOURCES)
    code = (
        "import sys; from blockrag.cli import app\n"
        "try: app(['data', 'read', '--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'faiss', 'openai', 'pyarrow'} & set(sys.modules)\n"
        "print(sorted(heavy), file=sys.stderr)"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "2wiki, hotpotqa, musique, nq, triviaqa, squad, chat" in " ".join(shown.stdout.split())
    assert shown.stderr.strip() == "[]"


@pytest.mark.parametrize(
    ("source", "record", "passages"),
    [("2wiki", TWOWIKI, 3), ("hotpotqa", HOTPOT_HUB, 3), ("musique", MUSIQUE, 3), ("nq", FID, 2), ("triviaqa", FID, 2)],
)
def test_reading(tmp_path: Path, source: str, record: Any, passages: int) -> None:
    (tmp_path / "a.json").write_text(json.dumps([record]))
    output = tmp_path / "out" / "lines.jsonl"
    result = run_json("data", "read", source, tmp_path / "a.json", tmp_path / "a.json", "-o", output)
    left_out = {"passage without text": 2} if record is FID else {}
    assert result == {
        "source": source,
        "output": str(output),
        "lines": 2,
        "questions": 2,
        "passages": 2 * passages,
        "without_passages": 0,
        "left_out": left_out,
    }
    assert len(list(read_rag_lines(output))) == 2


def test_reading_squad_with_its_options(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(SQUAD))
    result = run("data", "read", "squad", tmp_path / "a.json", "-o", tmp_path / "o", "--gold", 2, "--distractors", 1)
    assert result.exit_code == 0
    assert result.stdout == (
        f"{tmp_path / 'o'}: 4 lines, 9 questions, 12 passages\n"
        "left out: 2 x unanswerable question, 1 x paragraph without questions\n"
    )
    first = (tmp_path / "o").read_bytes()
    again = ["data", "read", "squad", tmp_path / "a.json", "-o", tmp_path / "o", "--gold", 2, "--distractors", 1]
    run(*again, "--same-article", "--seed", 1)
    assert (tmp_path / "o").read_bytes() != first


def test_mistakes_in_reading(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([TWOWIKI, {**TWOWIKI, "answer": ""}]))
    output = tmp_path / "out.jsonl"
    said = refused(2, "data", "read", "2wiki", tmp_path / "a.json", "-o", output)
    assert f"{tmp_path / 'a.json'}, record 2: answers must be" in said
    said = refused(2, "data", "read", "2wiki", tmp_path / "a.json", "-o", output, "--same-article")
    assert "--same-article means nothing for 2wiki; leave it out" in said
    several = ["-o", output, "--seed", 1, "--gold", 2, "--distractors", 1]
    assert "--distractors means nothing" in refused(2, "data", "read", "2wiki", tmp_path / "a.json", *several)
    assert "cannot read" in refused(2, "data", "read", "nq", tmp_path / "gone", "-o", output)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    separated = run("data", "read", "2wiki", tmp_path / "a.json", "-o", output, "--sentence-separator", "")
    assert separated.exit_code == 2  # the record is still bad
    (tmp_path / "a.json").write_text(json.dumps([TWOWIKI]))
    run("data", "read", "2wiki", tmp_path / "a.json", "-o", output, "--sentence-separator", "")
    assert lines_of(output)[0]["passages"][0]["text"] == "Arvo is a country.It lies in the north."


def test_questions_without_passages_are_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(
        json.dumps([FID, {"question": "q", "answer": ["a"]}, {"question": "r", "answer": "b"}])
    )
    shown = run("data", "read", "nq", tmp_path / "a.json", "-o", tmp_path / "o")
    assert "warning: 2 questions came without passages; blockrag data retrieve finds some" in shown.stderr


def test_an_interrupted_step_leaves_nothing_and_says_so(tmp_path: Path, capitals: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    merge = ["data", "merge", capitals, tmp_path / "pipe", "-o", tmp_path / "o"]
    code = "from blockrag.cli import app; app()"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, merge)], stderr=subprocess.PIPE, text=True)
    # Opens as soon as the command reads.
    with process, (tmp_path / "pipe").open("w"):
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said == f"error: interrupted; nothing was written to {tmp_path / 'o'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["capitals.jsonl", "pipe"]


def test_ranking(tmp_path: Path, capitals: Path) -> None:
    result = run_json("data", "rerank", capitals, "-o", tmp_path / "o", "-k", 2, "--titles", "--order", "best-last")
    assert (result["encoder"], result["lines"], result["passages"]) == ("lexical-1-1024", 3, 6)
    assert [line["passages"][1]["title"] for line in lines_of(tmp_path / "o")] == list(CAPITALS)
    # A file may be replaced by what is made of it.
    assert run("data", "rerank", capitals, "-o", capitals, "-k", 1, "--titles").exit_code == 0
    assert [line["passages"][0]["title"] for line in lines_of(capitals)] == list(CAPITALS)
    assert "unknown encoder 'bm25'" in refused(2, "data", "rerank", capitals, "-o", tmp_path / "p", "--encoder", "bm25")


def test_retrieving(tmp_path: Path, capitals: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    texts = [{"id": c, "title": c, "text": f"The capital of {c} is {t}."} for c, t in CAPITALS.items()]
    corpus.write_text("".join(json.dumps(text) + "\n" for text in texts))
    result = run_json("data", "retrieve", capitals, "-o", tmp_path / "o", "--corpus", corpus, "-k", 1)
    assert (result["with_support"], result["without_passages"]) == (3, 0)
    assert [line["passages"][0]["id"] for line in lines_of(tmp_path / "o")] == list(CAPITALS)
    assert run("ingest", corpus, "--path", tmp_path / "index").exit_code == 0
    shown = run("data", "retrieve", capitals, "-o", tmp_path / "p", "--index", tmp_path / "index", "-k", 1)
    assert "100.0% of the questions have an answer among their 1 passages" in shown.stdout
    found = [line["passages"][0]["text"] for line in lines_of(tmp_path / "p")]
    assert found == [text["text"] for text in texts]
    where = "pass either --index DIR or --corpus FILE"
    assert where in refused(2, "data", "retrieve", capitals, "-o", tmp_path / "q")
    both = ["--index", tmp_path / "index", "--corpus", corpus]
    assert where in refused(2, "data", "retrieve", capitals, "-o", tmp_path / "q", *both)
    other = ["--index", tmp_path / "index", "--encoder", "contriever"]
    assert "was built with encoder" in refused(2, "data", "retrieve", capitals, "-o", tmp_path / "q", *other)
    assert "there is no index" in refused(
        2, "data", "retrieve", capitals, "-o", tmp_path / "q", "--index", tmp_path / "i"
    )
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text(json.dumps({"passages": [], "question": "Zyx?", "answers": ["x"]}) + "\n")
    shown = run("data", "retrieve", nothing, "-o", tmp_path / "q", "--corpus", corpus)
    assert "warning: 1 questions found nothing" in shown.stderr


def test_sampling_and_merging(tmp_path: Path, capitals: Path) -> None:
    talk = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "source": "x"}
    (tmp_path / "talks.json").write_text(json.dumps([talk] * 5))
    read = run_json("data", "read", "chat", tmp_path / "talks.json", "-o", tmp_path / "chat.jsonl")
    assert (read["lines"], read["questions"]) == (5, 0)
    assert run_json("data", "sample", capitals, "-o", tmp_path / "s", "-n", 2)["lines"] == 2
    merged = run_json(
        "data", "merge", tmp_path / "s", capitals, "-o", tmp_path / "m", "--mix-chat", tmp_path / "chat.jsonl"
    )
    assert (merged["lines"], merged["questions"]) == (10, 5)
    run("data", "merge", tmp_path / "s", capitals, "-o", tmp_path / "n", "--no-shuffle")
    assert [line["question"] for line in lines_of(tmp_path / "n")] == [
        line["question"] for line in lines_of(tmp_path / "s") + lines_of(capitals)
    ]
    assert "cannot draw 9 lines" in refused(2, "data", "sample", capitals, "-o", tmp_path / "x", "-n", 9)
    few = ["--mix-chat", tmp_path / "chat.jsonl", "--chat-ratio", 3]
    assert "cannot draw 9 lines" in refused(2, "data", "merge", capitals, "-o", tmp_path / "x", *few)
    assert not (tmp_path / "x").exists()


def test_answering(tmp_path: Path, capitals: Path) -> None:
    output = tmp_path / "answered.jsonl"
    asked = ["data", "answer", capitals, "-o", output, "--model", "demo", "--max-new-tokens", 12]
    result = run_json(*asked, "--without-answer", "gold")
    assert result == {
        "output": str(output),
        "lines_before": 0,
        "responses": 3,
        "with_answer": 3,
        "replaced": 0,
        "dropped": 0,
        "without_response": 0,
    }
    assert [line["response"] for line in lines_of(output)] == list(CAPITALS.values())
    whole = output.read_bytes()
    output.write_bytes(whole[: whole.index(b"\n") + 9])
    shown = run(*asked, "--attention", "block")
    assert "2 responses, 2 of them with an answer" in shown.stdout
    assert "1 lines were there already" in shown.stdout
    assert output.read_bytes() == whole
    output.write_text(json.dumps({"blocks": ["a"], "response": "b"}) + "\n")
    assert "does not answer what the source asks" in refused(2, *asked)
    assert "no model directory" in refused(2, "data", "answer", capitals, "-o", tmp_path / "x", "--model", "./gone")
    missing = ["data", "answer", tmp_path / "gone", "-o", tmp_path / "x", "--model", "demo"]
    assert "cannot read" in refused(2, *missing)


def test_answering_by_a_server(tmp_path: Path, capitals: Path) -> None:
    output = tmp_path / "answered.jsonl"
    asked = ["data", "answer", capitals, "-o", output, "--model", "demo", "--max-new-tokens", 8, "--seed", 1]
    with live_server(BlockModel.from_pretrained("demo"), api_key="secret") as live:
        server = ["--base-url", f"{live.url}/v1", "--concurrency", 2]
        assert "AuthenticationError" in refused(2, *asked, *server)
        meant = refused(2, *asked, *server, "--attention", "block")
        assert "--attention block means nothing for a server" in meant
        assert "temperature=-1.0 is out of range" in refused(2, *asked, *server, "--temperature", -1)
        result = run_json(*asked, *server, "--api-key", "secret")
    assert result["responses"] + result["dropped"] == 3
    assert all(line["response"] for line in lines_of(output))


def test_checking(tmp_path: Path, capitals: Path) -> None:
    result = run_json("data", "check", capitals, "--model", "demo", "--max-tokens", 10)
    assert (result["forms"], result["kinds"], result["answerable"]) == ({"rag": 3}, {"fact": 3}, 3)
    assert result["too_long"] == [1, 2, 3]
    assert result["tokens"]["total"] == result["separate_tokens"]
    shown = run("data", "check", capitals, "--model", "demo", "--max-tokens", 10)
    assert shown.exit_code == 0
    assert "passages per line: 3 to 3, median 3, 95 % at most 3" in shown.stdout
    assert "answer in the passages: 100.0% of 3 questions with passages" in shown.stdout
    assert "warning: 3 lines are longer than 10 tokens: 1, 2, 3" in shown.stderr
    assert "--max-tokens 10 needs a tokenizer" in refused(2, "data", "check", capitals, "--max-tokens", 10)
    assert "cannot load" in refused(2, "data", "check", capitals, "--model", str(tmp_path))


def test_checking_lists_what_is_wrong(tmp_path: Path, capitals: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(capitals.read_text() + "{}\n" * 22)
    shown = run("data", "check", path)
    assert shown.exit_code == 1
    errors = shown.stderr.splitlines()
    assert errors[0].startswith(f"error: {path}, line 4: has the fields []")
    assert len(errors) == 21
    assert errors[-1] == "error: 22 lines are malformed; 2 more than listed"
    assert run_json("data", "check", path, code=1)["bad_lines"] == 22
