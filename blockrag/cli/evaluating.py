"""`blockrag eval`: what models answer to the same questions in each mode, as a table with standard errors."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from blockrag.cli.directory import model_name, open_parts
from blockrag.cli.options import AsJson, Device, Dtype
from blockrag.cli.output import PARTLY_FAILED, Output, quiet_transformers, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.evaluation.answers import AnswerSettings, Mode
    from blockrag.evaluation.opencompass import Benchmark
    from blockrag.evaluation.questions import Asked, Retrieve
    from blockrag.model.block_model import BlockModel

__all__ = ["evaluate"]

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Order(str, Enum):
    """How passages stand in the prompt."""

    given = "given"
    reversed = "reversed"
    shuffled = "shuffled"


class Icl(str, Enum):
    """How the prompts of a benchmark are cut into blocks."""

    gsm8k = "gsm8k"
    math = "math"
    bbh = "bbh"
    drop = "drop"
    plain = "plain"


Models = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="MODEL", help="'demo', a hub id or a directory; LABEL=MODEL to choose its name in the table."
    ),
]
Data = Annotated[Path, typer.Option("--data", help="Questions, one JSON object per line.")]
OutputDirectory = Annotated[
    Path, typer.Option("--output", help="Directory of answers and report; answers that are there are kept.")
]
Index = Annotated[
    Path | None,
    typer.Option("--index", help="Index directory to search where a line has no passages.", show_default=False),
]
Modes = Annotated[str, typer.Option("--modes", help="Some of full,block,block-no-reencode.")]
Checkpoints = Annotated[
    Path | None,
    typer.Option(
        "--checkpoints",
        help="Training directory: evaluate every checkpoint-N in it, or in its checkpoints/, and draw the curve.",
        show_default=False,
    ),
]
Passages = Annotated[
    int | None,
    typer.Option(
        "-k",
        "--top-k",
        min=0,
        help="Passages per question; by default all of a line, 5 of an index.",
        show_default=False,
    ),
]
OrderOption = Annotated[Order, typer.Option("--order", help="Of passages in the prompt.")]
Limit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Questions to ask; by default all.", show_default=False)
]
SampleSeed = Annotated[
    int | None,
    typer.Option("--seed", help="Draws the questions of --limit, shuffles passages.", show_default=False),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
BatchSize = Annotated[int, typer.Option("--batch-size", min=1, help="Questions that are answered together.")]
Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="Where passages' KV states are kept, e.g. memory://?max_bytes=16GB; by default 2 GiB of memory.",
        show_default=False,
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        "--reference",
        help="LABEL:MODE that the others are compared with; by default the first model in full attention.",
        show_default=False,
    ),
]
IclOption = Annotated[
    Icl | None,
    typer.Option("--icl", help="The lines are prompts of this benchmark; write OpenCompass predictions."),
]
TurnEnd = Annotated[
    str | None,
    typer.Option(
        "--turn-end", help="What ends a demonstration of gsm8k and math; by default Tulu's.", show_default=False
    ),
]
AllowSpecial = Annotated[
    bool, typer.Option("--allow-special", help="Recognize control tokens spelled in prompts of --icl.")
]
Note = Annotated[str, typer.Option("--note", help="Kept with the result.", show_default=False)]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model to evaluate, not loaded yet."""

    label: str
    name: str
    step: int | None = None

    @property
    def folder(self) -> str:
        return self.label.replace("/", "--")


def evaluate(
    data: Data,
    output: OutputDirectory,
    models: Models = None,
    index: Index = None,
    modes: Modes = "full,block",
    checkpoints: Checkpoints = None,
    top_k: Passages = None,
    order: OrderOption = Order.given,
    limit: Limit = None,
    seed: SampleSeed = None,
    max_new_tokens: NewTokens = 200,
    batch_size: BatchSize = 16,
    store: Store = None,
    reference: Reference = None,
    icl: IclOption = None,
    turn_end: TurnEnd = None,
    allow_special: AllowSpecial = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    note: Note = "",
    as_json: AsJson = False,
) -> None:
    """Measure how well models answer in each mode; resumable.

    \b
    A line of --data is a JSON object:
      question, answers and passages ({"title", "text"}, "supports" optional)
      question and answers alone, with --index: passages are searched for
      passages and questions: several questions about the same passages
    Modes:
      full               every token sees all tokens before it
      block              passages are computed once and moved to their places
      block-no-reencode  passages keep their own positions (ablation)

    Every model answers greedily in every mode, into --output/MODEL/MODE.jsonl. A run that was killed goes on where it
    stopped; answers of another model, of other data or options are refused. Then the tables are written:
    accuracy.md, accuracy.json and a plot.

    With --icl the lines are {"prompt", "gold"} or {"blocks", "gold"}, complete with their markup, and the answers go to
    --output/opencompass/predictions for OpenCompass to score.
    """  # noqa: D301 (the command line needs the character itself: it keeps the lines behind it apart)
    with reporting(as_json) as out:
        subjects = _subjects(models or [], checkpoints)
        if icl is None and (turn_end is not None or allow_special):
            raise InputError("--turn-end and --allow-special belong to prompts of --icl; leave them out")
        given = {"--index": index, "-k": top_k, "--seed": seed, "--reference": reference, "--note": note or None}
        given["--order"] = None if order is Order.given else order
        if icl is not None and (named := [name for name, value in given.items() if value is not None]):
            raise InputError(f"--icl takes prompts as they are; leave {', '.join(named)} out")
        from blockrag.evaluation.answers import AnswerSettings, modes_named

        wanted = modes_named(modes.replace(",", " ").split())
        compared = _reference(reference, subjects, wanted)
        settings = AnswerSettings(max_new_tokens, batch_size, allow_special)
        benchmark: Benchmark | None = None
        if icl is None:
            asked = _read(out, data, index, top_k, order, limit, seed)
        else:
            benchmark = _read_benchmark(data, icl, turn_end, limit)
            asked = benchmark.asked
        files: list[Path] = []
        for subject in subjects:
            files += _answer(out, subject, asked, wanted, settings, output, store, device, dtype)
        if benchmark is not None:
            _export(out, subjects, wanted, files, benchmark, output, data.stem)
            return
        command = _command(subjects, data, index, modes, settings, asked, device, dtype, reference)
        _report(out, files, subjects, output, command, note, compared)


def _subjects(models: Sequence[str], checkpoints: Path | None) -> list[_Subject]:
    """The models, each under a label of its own.

    Raises:
        InputError: There is none, there is no such directory, a label is no name, or two are the same.
    """
    subjects = []
    for model in models:
        label, separator, name = model.partition("=")
        if not separator or not label or "/" in label:
            label, name = "", model
        resolved = model_name(name)
        subjects.append(_Subject(label or (Path(resolved).name if Path(resolved).is_dir() else resolved), resolved))
    if checkpoints is not None:
        found = _checkpoints(checkpoints) or _checkpoints(checkpoints / "checkpoints")
        if not found:
            raise InputError(f"there is no checkpoint-N in {checkpoints}; pass the directory of a training run")
        subjects += [_Subject(path.name, str(path.resolve()), step) for step, path in sorted(found)]
    if not subjects:
        raise InputError("there is no model to evaluate; pass 'demo', a hub id, a directory, or --checkpoints")
    labels = [subject.folder for subject in subjects]
    if strange := [label for label in labels if label in (".", "..")]:
        raise InputError(f"{strange[0]!r} cannot name a directory of answers; choose another LABEL=MODEL")
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise InputError(f"several models are called {', '.join(twice)}; name them apart with LABEL=MODEL")
    return subjects


def _reference(reference: str | None, subjects: Sequence[_Subject], modes: Sequence[Mode]) -> tuple[str, str] | None:
    """Label and mode of the row to compare with, before hours are spent on the others.

    Raises:
        InputError: There will be no such row.
    """
    rows = {f"{subject.label}:{mode.name}": (subject.label, mode.name) for subject in subjects for mode in modes}
    if reference is not None and reference not in rows:
        raise InputError(f"--reference {reference} is no row of the table; pass one of {', '.join(rows)}")
    return None if reference is None else rows[reference]


def _checkpoints(directory: Path) -> list[tuple[int, Path]]:
    """Steps and directories of the checkpoints in it."""
    paths = directory.iterdir() if directory.is_dir() else ()
    return [(int(match[1]), path) for path in paths if (match := _CHECKPOINT.fullmatch(path.name)) and path.is_dir()]


def _read(
    out: Output, data: Path, index: Path | None, k: int | None, order: Order, limit: int | None, seed: int | None
) -> Asked:
    from blockrag.evaluation.questions import Selection, read_questions

    selection = Selection(k, order.value, limit, seed)
    if index is None:
        return read_questions(data, selection)
    with _searching(index) as retrieve, out.working(f"searching {index} ..."):
        return read_questions(data, selection, retrieve=retrieve)


@contextmanager
def _searching(path: Path) -> Iterator[Retrieve]:
    from blockrag.finetune.data.lines import Candidate

    with open_parts(path) as (index, _):

        def retrieve(question: str, k: int) -> list[Candidate]:
            return [Candidate(hit.passage, hit.score) for hit in index.search(question, k)]

        yield retrieve


def _read_benchmark(data: Path, icl: Icl, turn_end: str | None, limit: int | None) -> Benchmark:
    from blockrag.evaluation.opencompass import TURN_END, read_benchmark

    return read_benchmark(data, icl.value, turn_end=TURN_END if turn_end is None else turn_end, limit=limit)


@contextmanager
def _loaded(
    out: Output, subject: _Subject, modes: Sequence[Mode], store: str | None, device: str, dtype: str
) -> Iterator[BlockModel]:
    with out.working(f"loading {subject.name} ..."):
        from blockrag.model.block_model import BlockModel
        from blockrag.stores import open_store

        quiet_transformers()
        model = BlockModel.from_pretrained(
            subject.name,
            # A model that cannot be composed can still be evaluated in full attention.
            attention="block" if any(mode.reuses for mode in modes) else "full",
            store=None if store is None else open_store(store),
            device=device,
            dtype=dtype,
        )
    try:
        yield model
    finally:
        model.store.close()


def _answer(
    out: Output,
    subject: _Subject,
    asked: Asked,
    modes: Sequence[Mode],
    settings: AnswerSettings,
    output: Path,
    store: str | None,
    device: str,
    dtype: str,
) -> list[Path]:
    """The files of one model, which is gone from memory when this returns."""
    from blockrag.evaluation.answers import answer_questions

    with _loaded(out, subject, modes, store, device, dtype) as model:
        return answer_questions(
            model,
            asked,
            modes,
            settings,
            output / subject.folder,
            label=subject.label,
            progress=_progress(out, subject.label, len(asked.questions)),
        )


def _progress(out: Output, label: str, total: int) -> Callable[[str, int], None]:
    """A line whenever another tenth of the questions is done."""
    said: dict[str, int] = {}

    def progress(mode: str, done: int) -> None:
        tenth = 10 * done // total
        if tenth > said.get(mode, 0):
            said[mode] = tenth
            out.note(f"{label}, {mode}: {done:,} of {total:,} questions")

    return progress


def _report(
    out: Output,
    files: Sequence[Path],
    subjects: Sequence[_Subject],
    output: Path,
    command: str,
    note: str,
    reference: tuple[str, str] | None,
) -> None:
    from blockrag.evaluation.accuracy import summarize
    from blockrag.evaluation.accuracy_report import write_accuracy_report

    steps = {subject.label: subject.step for subject in subjects if subject.step is not None}
    result = summarize(files, command=command, note=note, reference=reference, steps=steps)
    report = write_accuracy_report(result, output)
    out.show(report.text)
    out.note("written: " + ", ".join(str(path) for path in (*files, *report.files)))
    if report.missing:
        out.note(report.missing)
    out.result(result)
    if failed := sum(row["errors"] for row in result["rows"]):
        out.exit_code = PARTLY_FAILED
        out.error(f"{failed:,} questions could not be asked and count as wrong; their 'error' says why")


def _export(
    out: Output,
    subjects: Sequence[_Subject],
    modes: Sequence[Mode],
    files: Sequence[Path],
    benchmark: Benchmark,
    output: Path,
    dataset: str,
) -> None:
    from blockrag.evaluation.opencompass import write_opencompass
    from blockrag.evaluation.predictions import read_predictions

    names = [f"{subject.folder}_{mode.name}" for subject in subjects for mode in modes]
    written: list[dict[str, Any]] = []
    for name, file in zip(names, files, strict=True):
        path = output / "opencompass" / "predictions" / name / f"{dataset}.json"
        _, predictions = read_predictions(file)
        write_opencompass(path, predictions, benchmark.golds)
        failed = sum(bool(one.error) for one in predictions)
        written.append({"model": name, "file": str(path), "answers": len(predictions), "errors": failed})
        out.show(f"{name}: {len(predictions):,} answers, {failed:,} errors: {path}")
    out.result({"predictions": written})
    if failed := sum(one["errors"] for one in written):
        out.exit_code = PARTLY_FAILED
        out.error(f"{failed:,} prompts could not be asked; their 'error' in {output} says why")


def _command(
    subjects: Sequence[_Subject],
    data: Path,
    index: Path | None,
    modes: str,
    settings: AnswerSettings,
    asked: Asked,
    device: str,
    dtype: str,
    reference: str | None,
) -> str:
    """What repeats the evaluation; of paths only the last part is given."""
    words = ["blockrag", "eval"]
    words += [
        subject.label
        if subject.label in (subject.name, Path(subject.name).name)
        else f"{subject.label}={Path(subject.name).name}"
        for subject in subjects
    ]
    options = {
        "--data": data.name,
        "--index": None if index is None else index.name,
        "--modes": modes,
        "-k": asked.settings["k"],
        "--order": asked.settings["order"],
        "--limit": asked.settings["limit"],
        "--seed": asked.settings["seed"],
        "--max-new-tokens": settings.max_new_tokens,
        "--batch-size": settings.batch_size,
        "--device": device,
        "--dtype": dtype,
        "--reference": reference,
    }
    for option, value in options.items():
        words += [] if value is None else [option, str(value)]
    return shlex.join(words)
