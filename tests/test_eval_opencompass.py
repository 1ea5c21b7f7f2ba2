"""Benchmarks: prompts cut into blocks, and predictions as OpenCompass reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from blockrag.errors import DataError, InputError
from blockrag.evaluation.opencompass import read_benchmark, write_opencompass
from blockrag.evaluation.predictions import Prediction, Tokens

TURNS = (
    "<|user|>\nWhat is 1+1?\n<|assistant|>\n2<|end_of_text|>\n"
    "<|user|>\nWhat is 2+2?\n<|assistant|>\n4<|end_of_text|>\n"
    "<|user|>\nWhat is 3+3?\n<|assistant|>\n"
)
BBH = "Sort words.\n\nQ: b a\nA: a b\n\nQ: d c\nA: c d\n\nQ: f e\nA:"
DROP = "Read the passages.\n\n---\nOne.\nWho?\nAnn\n\n# Your Task\n\n---\nTwo men sailed.\nHow many sailed?\n"


def write(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


def blocks(path: Path, benchmark: str, **options: Any) -> tuple[str, ...]:
    return read_benchmark(path, benchmark, **options).asked.questions[0].blocks


@pytest.mark.parametrize(
    ("benchmark", "prompt", "count"), [("gsm8k", TURNS, 3), ("math", TURNS, 3), ("bbh", BBH, 4), ("plain", BBH, 1)]
)
def test_prompts_are_cut_without_loss(tmp_path: Path, benchmark: str, prompt: str, count: int) -> None:
    found = blocks(write(tmp_path / "a.jsonl", {"prompt": prompt, "gold": "x"}), benchmark)
    assert len(found) == count
    assert "".join(found) == prompt


def test_drop_keeps_its_task_with_the_question(tmp_path: Path) -> None:
    line = {"prompt": DROP, "question": "How many sailed?", "gold": "2"}
    found = blocks(write(tmp_path / "drop.jsonl", line), "drop")
    assert "".join(found) == DROP
    assert found[-1].startswith("# Your Task\n\n---\nTwo men")


def test_other_markup_and_ready_blocks(tmp_path: Path) -> None:
    prompt = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc"
    path = write(tmp_path / "a.jsonl", {"prompt": prompt})
    assert len(blocks(path, "gsm8k", turn_end="<|im_end|>\n")) == 3
    ready = write(tmp_path / "b.jsonl", {"blocks": ["demo\n", "question"], "gold": [1]})
    assert blocks(ready, "gsm8k") == ("demo\n", "question")
    assert read_benchmark(ready, "gsm8k").golds == ([1],)


@pytest.mark.parametrize(
    ("benchmark", "line", "problem"),
    [
        ("drop", {"prompt": DROP, "gold": "2"}, "question must be the question"),
        ("drop", {"prompt": DROP, "question": "How many drowned?"}, "does not ask"),
        ("drop", {"prompt": DROP, "question": "Who?"}, "does not ask"),
        ("gsm8k", {"prompt": "What is 3+3?"}, "found no demonstration of gsm8k"),
        ("plain", {"prompt": " "}, "non-empty string"),
        ("plain", {"prompt": "a", "blocks": ["a"]}, "either a prompt or blocks"),
        ("plain", {"gold": "a"}, "either a prompt or blocks"),
        ("plain", {"blocks": ["a", ""]}, "non-empty strings"),
        ("plain", {"prompt": "a", "answer": "b"}, "unknown fields"),
        ("plain", {"prompt": "a", "id": ["b"]}, "id must be a string or a number"),
        ("plain", {"prompt": "a \ud800"}, "surrogate"),
        ("plain", {"prompt": "a", "id": "\ud800"}, "surrogate"),
        ("plain", {"prompt": "a", "gold": [{"b": "\udfff"}]}, "surrogate"),
        ("plain", ["a"], "not an object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, benchmark: str, line: Any, problem: str) -> None:
    path = write(tmp_path / "bad.jsonl", {"blocks": ["a", "How many sailed? Who?"], "question": "Who?"}, line)
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 2: .*{problem}"):
        read_benchmark(path, benchmark)


def test_other_mistakes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"prompt": "a"}, {"prompt": "b"})
    with pytest.raises(InputError, match="unknown benchmark 'mmlu'"):
        read_benchmark(path, "mmlu")
    with pytest.raises(InputError, match="limit=0"):
        read_benchmark(path, "plain", limit=0)
    with pytest.raises(DataError, match="holds no lines"):
        read_benchmark(write(tmp_path / "none.jsonl"), "plain")
    with pytest.raises(DataError, match="cannot read"):
        read_benchmark(tmp_path / "gone.jsonl", "plain")
    assert len(read_benchmark(path, "plain", limit=1).asked.questions) == 1


def prediction(index: int, text: str, error: str = "") -> Prediction:
    tokens = Tokens(3, 0, 0, (), 3, 1)
    return Prediction(index, index + 1, "", "", "block", "", (), text, {}, tokens, "stop", error, f"prompt {index}")


def test_the_file_is_what_opencompass_reads(tmp_path: Path) -> None:
    path = tmp_path / "predictions" / "model" / "gsm8k.json"
    write_opencompass(path, [prediction(0, "é 4"), prediction(1, "", "too long"), prediction(2, "6")], ["4", None, [6]])
    loaded = json.loads(path.read_text("utf-8"))
    # As its evaluation task does: by number, with the fields of the first entry.
    entries = [loaded[str(number)] for number in range(len(loaded))]
    assert entries == [
        {"origin_prompt": "prompt 0", "prediction": "é 4", "gold": "4"},
        {"origin_prompt": "prompt 1", "prediction": ""},
        {"origin_prompt": "prompt 2", "prediction": "6", "gold": [6]},
    ]
    assert [path.name for path in path.parent.iterdir()] == ["gsm8k.json"]
    with pytest.raises(InputError, match="1 predictions and 0 golds"):
        write_opencompass(path, [prediction(0, "a")], [])
