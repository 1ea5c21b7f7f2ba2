"""`blockrag demo`: the whole pipeline once, offline, with the small model and the corpus that ship with blockrag.

It shows what was measured, not what should come out: wrong answers are marked and counted, times are those of the
machine it runs on. It uses nothing that a user's own program could not call.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from blockrag.cli.answers import answer_json, milliseconds, name_of
from blockrag.cli.directory import Settings, find_settings, model_name, open_settings, prepare, remember
from blockrag.cli.indexing import counted, report_json, size
from blockrag.cli.options import AsJson
from blockrag.cli.output import Output, clean, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.demo import DemoQuestion
    from blockrag.model.block_model import Attention
    from blockrag.rag import Answer, BlockRAG

__all__ = ["demo"]

_QUESTIONS = (
    "What is the capital of Bhutan?",
    "Which is the highest place in Iceland?",
    "Which money is used in Kenya?",
    "Which country is a neighbor of Portugal?",
    "What is the population of Japan?",
)
_TOP_K = 5
_MAX_NEW_TOKENS = 24
_SHOWN_MISSES = 5
_MODES: tuple[Attention, Attention] = ("block", "full")

DemoPath = Annotated[Path, typer.Option("--path", help="Directory of the demo's index.")]
HiddenModel = Annotated[str, typer.Option("--model", hidden=True)]
Sample = Annotated[int | None, typer.Option("--sample", min=1, hidden=True, help="Ask that many at most in part 3.")]
Seconds = Annotated[float, typer.Option("--seconds", min=0, hidden=True, help="Ask no longer than that in part 3.")]


@dataclass(slots=True)
class _Score:
    """Right answers of one mode, and the first wrong ones."""

    right: int = 0
    misses: list[dict[str, str]] = field(default_factory=list)
    ttft_s: list[float] = field(default_factory=list)
    tokens_computed: int = 0

    def count(self, asked: DemoQuestion, answer: Answer) -> None:
        self.ttft_s.append(answer.timings.ttft_s)
        self.tokens_computed += answer.usage.tokens_computed
        if answer.text == asked.answer:
            self.right += 1
        else:
            self.misses.append({"question": asked.question, "expected": asked.answer, "answer": answer.text})


def demo(
    path: DemoPath = Path(".blockrag/demo"),
    model: HiddenModel = "demo",
    sample: Sample = None,
    seconds: Seconds = 60.0,
    as_json: AsJson = False,
) -> None:
    """Show the whole pipeline, offline.

    Ingests a small corpus, asks questions, and compares block with full attention.
    """
    with reporting(as_json) as out:
        settings = _settings(path, model_name(model))
        with open_settings(out, path, settings) as rag, _one_thread():
            remember(path, settings)
            rag.top_k = _TOP_K
            result = {
                "model": _introduce(out, rag),
                "ingest": _ingest(out, rag, path),
                "questions": _ask(out, rag),
                "accuracy": _score(out, rag, sample=sample, seconds=seconds),
            }
            _say_goodbye(out, path)
        out.result(result)


def _settings(path: Path, model: str) -> Settings:
    """The settings of the demo's directory, which is made if it is not there.

    Raises:
        InputError: The directory holds something else.
    """
    found = find_settings(path)
    if (found is None and (path / "index").exists()) or (found is not None and found.model != model):
        raise InputError(f"{path} holds another index than the demo's; pass another --path")
    return prepare(path, model=model)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The demo's matrices are too small to share: more threads wait for each other longer than they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _introduce(out: Output, rag: BlockRAG) -> dict[str, object]:
    weights = sum(p.numel() for p in rag.model.model.parameters())
    layers = rag.model.model.config.num_hidden_layers
    _heading(out, "The model")
    out.show(
        f"{weights:,} parameters in {layers} layers, trained from scratch for this demo, on made-up\n"
        "countries. It answers questions about a country's capital, region,\n"
        "population, area, language, currency, highest point, internet code or\n"
        "neighbor, in the wording it was trained on, and nothing else.",
    )
    return {"parameters": weights, "layers": layers, "name": rag.model.name}


def _ingest(out: Output, rag: BlockRAG, path: Path) -> dict[str, object]:
    from blockrag.demo import load_corpus
    from blockrag.ingest import RichProgress

    _heading(out, "1  Ingest: every passage's KV states are computed once and stored")
    report = rag.ingest(load_corpus(), progress=RichProgress(out.messages))
    stats = rag.stats()
    out.show(
        f"{report.documents:,} documents in {report.seconds:.1f} s: {report.blocks_new:,} blocks computed "
        f"({report.tokens_new:,} tokens)"
    )
    if report.documents_unchanged and not report.blocks_new:
        out.show("Everything was there already; the model computed nothing.")
    out.show(
        f"stored in {path}: {stats.index.passages:,} passages, {counted(stats.store.blocks)} blocks,\n"
        f"{size(stats.store.bytes)} of KV states, {size(stats.index.bytes)} of index"
    )
    stored = {"passages": stats.index.passages, "blocks": stats.store.blocks, "bytes": stats.store.bytes}
    return {"path": str(path), **report_json(report), "stored": stored}


def _ask(out: Output, rag: BlockRAG) -> list[dict[str, object]]:
    """A few questions in both modes; the first one again, and again with its passages the other way round."""
    from blockrag.demo import load_questions

    expected = {row.question: row.answer for row in load_questions()}
    _heading(out, "2  Ask: blocks are loaded and composed, only the question is computed")
    device = rag.model.model.device
    where = "one CPU core" if device.type == "cpu" else str(device)
    out.show(f"Times in ms on {where}; 'first' is from question to first token.")
    results: list[dict[str, object]] = []
    for number, question in enumerate(_QUESTIONS):
        asked = [("block", _answer(rag, question, "block")), ("full", _answer(rag, question, "full"))]
        if number == 0:
            asked.insert(1, ("block again", _answer(rag, question, "block")))
            rag.order = "best-last"
            asked.insert(2, ("other order", _answer(rag, question, "block")))
            rag.order = "best-first"
        _show_question(out, question, expected[question], asked)
        for label, answer in asked:
            mode = "full" if label == "full" else "block"
            right = answer.text == expected[question]
            results.append({"run": label, "right": right, **answer_json(question, answer, mode)})
    return results


def _show_question(out: Output, question: str, expected: str, asked: list[tuple[str, Answer]]) -> None:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("", no_wrap=True, width=11)
    table.add_column("answer", no_wrap=True, overflow="ellipsis", min_width=10, max_width=19)
    table.add_column("", no_wrap=True)
    for name in ("first", "find", "load", "compose", "query", "reused", "new"):
        table.add_column(name, justify="right", no_wrap=True)
    for label, answer in asked:
        spent, right = answer.timings, answer.text == expected
        steps = (spent.ttft_s, spent.retrieve_s, spent.load_s, spent.compose_s, spent.query_prefill_s)
        table.add_row(
            label,
            Text(_one_line(answer.text)),
            Text("right" if right else "WRONG", style="green" if right else "red"),
            *(milliseconds(step) if step else "-" for step in steps),
            f"{answer.usage.tokens_reused:,}",
            f"{answer.usage.tokens_computed:,}",
        )
    sources = ", ".join(f"{clean(name_of(hit))} {hit.score:.1f}" for hit in asked[0][1].hits)
    out.show(
        "",
        Text(question, style="bold"),
        table,
        Text(f"passages    {sources}", style="dim", no_wrap=True, overflow="ellipsis"),
    )


def _score(out: Output, rag: BlockRAG, *, sample: int | None, seconds: float) -> dict[str, object]:
    """The share of right answers about countries the model never read of, for both modes."""
    from blockrag.demo import load_questions

    _heading(out, "3  Count: countries whose names the model never saw in training")
    questions = load_questions(held_out=True)
    chosen = random.Random(0).sample(questions, len(questions))[:sample]
    scores = {mode: _Score() for mode in _MODES}
    found = asked = 0
    started = time.perf_counter()
    with _bar(out) as bar:
        task = bar.add_task("questions", total=len(chosen))
        for question in chosen:
            if asked and time.perf_counter() - started > seconds:
                break
            answers = {mode: _answer(rag, question.question, mode) for mode in _MODES}
            for mode, answer in answers.items():
                scores[mode].count(question, answer)
            found += any(hit.passage.id == question.passage_id for hit in answers["block"].hits)
            asked += 1
            bar.advance(task)
    _show_scores(out, scores, asked=asked, of=len(questions), found=found)
    return {
        "questions": asked,
        "of": len(questions),
        "passage_found": found,
        **{mode: _score_json(score, asked) for mode, score in scores.items()},
    }


def _score_json(score: _Score, asked: int) -> dict[str, object]:
    return {
        "right": score.right,
        "share": score.right / asked,
        "median_ttft_s": median(score.ttft_s),
        "mean_tokens_computed": score.tokens_computed / asked,
        "misses": score.misses,
    }


def _show_scores(out: Output, scores: dict[Attention, _Score], *, asked: int, of: int, found: int) -> None:
    drawn = "" if asked == of else " (drawn with a fixed seed)"
    out.show(
        f"{asked} of {of} questions{drawn}, {_TOP_K} passages each.",
        f"The right passage was among them {found} times.",
    )
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for name, justify in (
        ("attention", "left"),
        ("right", "right"),
        ("share", "right"),
        ("first token, median", "right"),
        ("computed, mean", "right"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for mode, score in scores.items():
        first, computed = median(score.ttft_s), score.tokens_computed / asked
        share = f"{100 * score.right / asked:.1f} %"
        row = (mode, f"{score.right} of {asked}", share, f"{milliseconds(first)} ms", f"{computed:,.0f} tokens")
        table.add_row(*row)
    out.show(table)
    misses = scores["block"].misses
    if misses:
        out.show(f"Wrong in block mode, {min(len(misses), _SHOWN_MISSES)} of {len(misses)}:")
    for miss in misses[:_SHOWN_MISSES]:
        out.show(Text(f"  {miss['question']}"), Text(f"    {miss['expected']}, not {_one_line(miss['answer'])}"))


def _say_goodbye(out: Output, path: Path) -> None:
    _heading(out, "Next")
    program = _program(Path(sys.argv[0]), shutil.which("blockrag"))
    out.show(
        f'{program} query "What is the capital of Peru?" --path {path}',
        f"{program} ingest YOUR_FILES --path DIR --model YOUR_MODEL",
        'python:  BlockRAG.from_pretrained("demo", path="DIR").ingest(["docs/"])',
        "More in README.md and docs/; every command has --help.",
    )


def _program(called: Path, found: str | None) -> str:
    """What to type to run this program again: its name where the PATH finds it, else the way to it from here."""
    if called.name != "blockrag" or (found is not None and Path(found).resolve() == called.resolve()):
        return "blockrag"
    return os.path.relpath(called)


def _answer(rag: BlockRAG, question: str, attention: Attention) -> Answer:
    from blockrag.model.sampling import GenerationOptions

    return rag.query(question, GenerationOptions(max_new_tokens=_MAX_NEW_TOKENS), attention=attention)


def _heading(out: Output, text: str) -> None:
    out.show("", Text(text, style="bold cyan"))


def _one_line(text: str) -> str:
    return " ".join(clean(text).split()) or "(nothing)"


def _bar(out: Output) -> Progress:
    columns = (TextColumn("questions"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=out.messages, transient=True, disable=not out.messages.is_terminal)
