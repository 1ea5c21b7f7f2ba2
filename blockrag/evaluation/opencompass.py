r"""In-context-learning and general benchmarks, for OpenCompass to score: prompts as blocks in, its predictions out.

A line is a JSON object with a `prompt` that is cut at its demonstrations, or `blocks` that are ready, the last one
global; optional are `gold`, `id` and `question`. Prompts are complete: nothing is added, begin-of-sequence text and
chat markup included. How they are cut:

    gsm8k, math   behind each assistant turn; what ends one is an argument
    bbh           before each "Q: "; the task's preamble is a block of its own
    drop          before each "---"; a line must say its `question`, and its prompt must hold it
    plain         not at all: one global block, full attention

The published preparation of DROP formats its prompt with the passage only, so that the question is never asked; that is
why such a line is refused.

OpenCompass's inferencers write `{"0": {"origin_prompt", "prediction", "gold"}, "1": ...}` to
`predictions/MODEL/DATASET.json`, and its evaluation (`-m eval -r TIME`) reads the answers by these numbers
(https://github.com/open-compass/opencompass, openicl/icl_inferencer/icl_base_inferencer.py and tasks/openicl_eval.py).
Knows no models.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from blockrag.errors import DataError, InputError
from blockrag.evaluation.predictions import Prediction
from blockrag.evaluation.questions import Asked, EvalQuestion
from blockrag.finetune.data.lines import parse_json
from blockrag.passage import refuse_lone_surrogates
from blockrag.prompt import split_bbh_prompt, split_drop_prompt, split_turn_demonstrations

__all__ = ["BENCHMARKS", "TURN_END", "Benchmark", "read_benchmark", "write_opencompass"]

TURN_END: Final = "<|end_of_text|>\n"
"""What ends an assistant turn in the prompts of the published evaluation (the Tulu form)."""

BENCHMARKS: Final = ("gsm8k", "math", "bbh", "drop", "plain")
"""The ways to cut a prompt."""

_FIELDS = frozenset({"prompt", "blocks", "gold", "id", "question"})


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The prompts of a benchmark.

    Args:
        asked: The prompts as blocks; there are no right answers in them, so that they are not scored here.
        golds: What each line calls right, None where it says nothing; for OpenCompass to keep.
    """

    asked: Asked
    golds: tuple[object, ...]


def read_benchmark(
    path: str | Path, benchmark: str, *, turn_end: str = TURN_END, limit: int | None = None
) -> Benchmark:
    """Read prompts and cut them into blocks.

    Args:
        path: One JSON object per line.
        benchmark: One of `BENCHMARKS`.
        turn_end: What ends an assistant turn in gsm8k and math.
        limit: How many lines; None for all. OpenCompass wants all of a data set, in its order.

    Raises:
        InputError: There is no such benchmark, or `limit` is below 1.
        DataError: The file or a line cannot be used; names the file and the line.
    """
    path = Path(path)
    if benchmark not in BENCHMARKS:
        raise InputError(f"unknown benchmark {benchmark!r}; pass one of: {', '.join(BENCHMARKS)}")
    if limit is not None and limit < 1:
        raise InputError(f"limit={limit} leaves no prompt; leave it out for all of them")
    split = _splitter(benchmark, turn_end)
    questions: list[EvalQuestion] = []
    golds: list[object] = []
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.strip() or len(questions) == limit:
                    continue
                where = f"{path}, line {number}"
                fields = _checked(parse_json(data, where), where)
                blocks = _blocks(fields, benchmark, split, where)
                questions.append(
                    EvalQuestion(
                        index=len(questions),
                        line=number,
                        question=fields.get("question", ""),
                        answers=(),
                        id=str(fields.get("id", "")),
                        blocks=blocks,
                    )
                )
                golds.append(fields.get("gold"))
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror}); pass a file of JSON lines") from error
    if not questions:
        raise DataError(f"{path} holds no lines; write one object with a prompt and a gold per line")
    settings = {"benchmark": benchmark, "turn_end": turn_end, "limit": limit}
    return Benchmark(Asked(path.name, tuple(questions), settings, {}), tuple(golds))


def write_opencompass(path: Path, predictions: Sequence[Prediction], golds: Sequence[object]) -> None:
    """Write predictions as OpenCompass's inferencers do; the file appears whole or not at all.

    A prompt that could not be asked has an empty prediction, because OpenCompass wants one for every number.

    Args:
        path: `predictions/MODEL/DATASET.json` in a working directory of OpenCompass, by the abbreviations of its
            configuration.
        predictions: In the order of the data set.
        golds: What the data set calls right; None for those that say nothing.

    Raises:
        InputError: There are not as many golds as predictions, or the file cannot be written.
    """
    if len(predictions) != len(golds):
        raise InputError(f"{len(predictions)} predictions and {len(golds)} golds do not belong together")
    entries = {}
    for number, (one, gold) in enumerate(zip(predictions, golds, strict=True)):
        entry: dict[str, object] = {"origin_prompt": one.prompt, "prediction": one.prediction}
        entries[str(number)] = entry if gold is None else {**entry, "gold": gold}
    data = (json.dumps(entries, indent=4, ensure_ascii=False) + "\n").encode()
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"cannot write {path} ({error.strerror}); pass another --output") from error


def _splitter(benchmark: str, turn_end: str) -> Callable[[str], list[str]]:
    if benchmark in ("gsm8k", "math"):
        return partial(split_turn_demonstrations, turn_end=turn_end)
    return {"bbh": split_bbh_prompt, "drop": split_drop_prompt, "plain": lambda prompt: [prompt]}[benchmark]


def _checked(fields: object, where: str) -> Mapping[str, Any]:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: a JSON {type(fields).__name__}, not an object; write one object per line")
    if unknown := sorted(set(fields) - _FIELDS):
        raise DataError(f"{where}: unknown fields {unknown}; known here are {sorted(_FIELDS)}")
    if ("prompt" in fields) == ("blocks" in fields):
        raise DataError(f"{where}: needs either a prompt or blocks, got the fields {sorted(fields)}")
    if not isinstance(fields.get("id", ""), (str, int)):
        raise DataError(f"{where}: id must be a string or a number, got {fields['id']!r:.60}")
    # All of it, gold included, is written again; as JSON it may be nested however it likes.
    texts = {name: json.dumps(value, ensure_ascii=False) for name, value in fields.items()}
    refuse_lone_surrogates(where, texts, DataError)
    return fields


def _blocks(
    fields: Mapping[str, Any], benchmark: str, split: Callable[[str], list[str]], where: str
) -> tuple[str, ...]:
    prompt, blocks = fields.get("prompt"), fields.get("blocks")
    if blocks is None:
        if not isinstance(prompt, str) or not prompt.strip():
            raise DataError(f"{where}: prompt must be a non-empty string, got {prompt!r:.60}")
        blocks = split(prompt)
        if len(blocks) == 1 and benchmark != "plain":
            raise DataError(
                f"{where}: found no demonstration of {benchmark} in {prompt!r:.60}; use plain for such prompts"
            )
    elif not isinstance(blocks, list) or not blocks or not all(isinstance(one, str) and one for one in blocks):
        raise DataError(f"{where}: blocks must be a list of non-empty strings, got {blocks!r:.60}")
    question = fields.get("question", "")
    if not isinstance(question, str) or (benchmark == "drop" and not question.strip()):
        raise DataError(f"{where}: question must be the question that the prompt asks, got {question!r:.60}")
    if question.strip() and question.strip() not in blocks[-1]:
        raise DataError(
            f"{where}: the prompt's last block does not ask {question!r:.80}; put the question into the prompt"
        )
    return tuple(blocks)
