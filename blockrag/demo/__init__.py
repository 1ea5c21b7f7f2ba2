"""The embedded demo: a small corpus, questions about it, and a checkpoint trained to answer them.

Everything is read from the installed package, so that the first command works offline. This module only finds and
parses files; it imports neither torch nor transformers. How the files were made: `build_corpus` (corpus and
questions), `synthetic` (training data), `blockrag.finetune.demo` (checkpoint).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from blockrag.errors import InputError
from blockrag.passage import Passage

__all__ = ["DemoQuestion", "checkpoint_path", "load_corpus", "load_questions"]


@dataclass(frozen=True, slots=True)
class DemoQuestion:
    """One question that one passage of the demo corpus answers.

    Args:
        question: The question, in one of the forms the demo model was trained on.
        answer: The exact text of the answer; it occurs in the passage.
        passage_id: The passage that states it.
        kind: The kind of fact ("capital", "population", ...).
        held_out: The country occurs nowhere in the demo model's training data.
    """

    question: str
    answer: str
    passage_id: str
    kind: str
    held_out: bool


def checkpoint_path() -> Path:
    """Return the folder of the embedded checkpoint, in Hugging Face layout (loads with `from_pretrained`).

    Raises:
        InputError: The package was installed without its data files, or is imported from a zip archive.
    """
    path = Path(str(files(__name__) / "checkpoint"))
    if not (path / "config.json").is_file():
        raise InputError(f"no demo checkpoint at {path}; reinstall blockrag unzipped, with its package data")
    return path


def load_corpus() -> list[Passage]:
    """Return the passages of the demo corpus: one per country or territory, sorted by title."""
    return [Passage(id=str(row["id"]), title=str(row["title"]), text=str(row["text"])) for row in _rows("corpus.jsonl")]


def load_questions(held_out: bool | None = None) -> list[DemoQuestion]:
    """Return the questions about the demo corpus, one per fact, in the order of the passages.

    Args:
        held_out: Keep only questions about countries that training never saw (True), only about the others
            (False), or all of them (None).
    """
    questions = [
        DemoQuestion(
            question=str(row["question"]),
            answer=str(row["answer"]),
            passage_id=str(row["passage_id"]),
            kind=str(row["kind"]),
            held_out=bool(row["held_out"]),
        )
        for row in _rows("questions.jsonl")
    ]
    return [question for question in questions if held_out is None or question.held_out is held_out]


def _rows(name: str) -> list[dict[str, object]]:
    # Not splitlines(): it also breaks at U+2028 and other separators that JSON strings may hold.
    text = (files(__name__) / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]
