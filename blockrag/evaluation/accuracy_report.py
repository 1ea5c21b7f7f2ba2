"""A result as files: JSON, Markdown tables, and pictures where matplotlib is installed. It computes nothing.

Scores are percentages with one standard error. A difference within two standard errors is called just that.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blockrag.errors import InputError
from blockrag.evaluation.accuracy import ALL, METRIC_LABELS, groups_shown
from blockrag.evaluation.answers import MODES
from blockrag.evaluation.metrics import METRICS
from blockrag.evaluation.speed.report import Report
from blockrag.evaluation.speed.text import count, place, table

__all__ = ["markdown", "write_accuracy_report"]

_METRICS_TEXT = (
    "Percent ± one standard error. EM: the answer is one of the right ones. Substr-EM: it contains one of them, the "
    "accuracy of the paper. F1: words in common with the best right answer, as in SQuAD. Union F1: with the words of "
    "all right answers together, as published model cards seem to count; not comparable with F1. All on normalized "
    "text."
)
_DIFFERENCES_TEXT = (
    "Δ: points above or below **{model}, {mode}**, question by question, ± one standard error of the difference. All "
    "errors allow for questions that share passages. *Within 2 SE*: these questions do not show a difference; it may "
    "exist. An error of 0.0 means that all questions agree, not that nothing is left to chance."
)
_PICTURES = ("accuracy.png", "curve.png")
_COMPARED = ("em", "substr_em", "f1")
_FLOPS_LABELS = {
    "paper": "2 x P x tokens",
    "with_attention": "with attention",
    "with_reuse": "with rotation and misses",
}
_EVIDENCE = {
    "flag": "passages that the data set marks as evidence",
    "answer": "passages that contain a right answer, as the data set marks none (a passage may do so by chance)",
}


def write_accuracy_report(result: dict[str, Any], directory: Path) -> Report:
    """Write a result into a directory; files of an earlier report are replaced.

    Args:
        result: What `summarize` returned.
        directory: Where `accuracy.json`, `accuracy.md` and pictures go.

    Raises:
        InputError: They cannot be written there.
    """
    text = markdown(result)
    files = [directory / "accuracy.json", directory / "accuracy.md"]
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # A picture of another result beside these tables would be taken for theirs.
        for picture in _PICTURES:
            (directory / picture).unlink(missing_ok=True)
        files[0].write_text(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
        files[1].write_text(text, "utf-8")
        if find_spec("matplotlib") is None:
            return Report(text, tuple(files), "no plots: matplotlib is not installed; pip install 'blockrag[plot]'")
        from blockrag.evaluation.accuracy_plots import draw

        return Report(text, (*files, *draw(result, directory)))
    except OSError as error:
        raise InputError(
            f"cannot write the report into {directory} ({error.strerror}); make room or pass another --output, and run "
            "the same command again: answers that are there are kept"
        ) from error


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result, and how it was measured."""
    rows, data = result["rows"], result["data"]
    first = rows[0]["groups"][ALL]
    lines = "each on a line of its own" if first["clusters"] == first["n"] else f"on {first['clusters']:,} lines"
    sections = [
        f"# Accuracy: {data['file']}, {first['n']:,} questions",
        *(f"**Warning: {warning}.**" for warning in result["warnings"]),
        f"{first['n']:,} questions, {lines}. {_METRICS_TEXT}",
    ]
    modes = dict.fromkeys(row["mode"] for row in rows)
    sections.append("\n".join(f"- {mode}: {MODES[mode].description}" for mode in modes if mode in MODES))
    for group in groups_shown(rows):
        sections += _group(result, group)
    sections += _curve(rows)
    sections += ["## Retrieval", *_recall(data["recall"])]
    sections += ["## Work", *_work(rows)]
    sections += ["## How it was measured", _provenance(result)]
    return "\n\n".join(sections) + "\n"


def _group(result: dict[str, Any], group: str) -> list[str]:
    rows = result["rows"]
    n = rows[0]["groups"][group]["n"]
    title = "## All questions" if group == ALL else f"## Questions of kind {group}: {n:,}"
    compared = _COMPARED if len(rows) > 1 else ()
    header = ["model", "mode", *METRIC_LABELS.values(), *(f"Δ {METRIC_LABELS[metric]}" for metric in compared)]
    lines = []
    for row in rows:
        found = row["groups"][group]
        scores = [_score(found["scores"][metric]) for metric in METRICS]
        differences = [_difference(found["differences"].get(metric)) for metric in compared]
        lines.append([*_names(row), *scores, *differences])
    explained = [_DIFFERENCES_TEXT.format(**result["reference"])] if group == ALL and compared else []
    return [title, *explained, table(header, lines)]


def _curve(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Accuracy by training step, one column per mode."""
    steps = sorted({row["step"] for row in rows if row["step"] is not None})
    if not steps:
        return []
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    found = {(row["step"], row["mode"]): row["groups"][ALL]["scores"]["substr_em"] for row in rows}
    return [
        "## By training step",
        "Substr-EM of all questions.",
        table(
            ["step", *modes],
            # Not every checkpoint has been asked in every mode of the table.
            ([f"{step:,}", *(_score(found.get((step, mode))) for mode in modes)] for step in steps),
        ),
    ]


def _recall(recall: dict[str, dict[str, Any]]) -> list[str]:
    if not recall:
        return ["The questions come without passages."]
    sections = []
    for evidence, found in recall.items():
        sections += [
            f"Share of {found['questions']:,} questions with a supporting passage among the first k, before they were "
            f"put in order. Supporting are {_EVIDENCE[evidence]}.",
            table([f"k = {k}" for k in found["at"]], [[f"{100 * share:.1f} %" for share in found["at"].values()]]),
        ]
    return sections


def _work(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Tokens and FLOPs to the first token, per question."""
    lines, flops = [], []
    for row in rows:
        work = row["work"]
        names = _names(row)
        if work is None:
            lines.append([*names, *["-"] * 4, str(row["cut_off"]), str(row["errors"])])
            continue
        tokens = [f"{work['tokens'][name]:,.1f}" for name in ("prompt", "reused", "computed", "new")]
        lines.append([*names, *tokens, str(row["cut_off"]), str(row["errors"])])
        if "flops" in work:
            saved = work.get("saved_percent", {})
            flops.append(
                [
                    *names,
                    *(
                        f"{work['flops'][name]:.3g}" + (f" ({saved[name]:.1f} % less)" if name in saved else "")
                        for name in _FLOPS_LABELS
                    ),
                ]
            )
    sections = [
        "Tokens per question, counted as by a store that keeps every block of the questions before; answers cut off at "
        "the limit; questions that could not be asked.",
        table(["model", "mode", "prompt", "reused", "computed", "answer", "cut off", "errors"], lines),
    ]
    if flops:
        sections += [
            "FLOPs to the first token, mean over the questions, counted three ways: the paper's (P parameters without "
            "the input embedding, tokens of the query block only), with the attention products, and with what reuse "
            "costs: rotating keys, and computing blocks at their first occurrence.",
            table(["model", "mode", *_FLOPS_LABELS.values()], flops),
        ]
    return sections


def _provenance(result: dict[str, Any]) -> str:
    made, data, options, settings = result["made"], result["data"], result["options"], result["data"]["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    commit = "blockrag as installed" if made["commit"] is None else f"commit {made['commit'][:12]}"
    chosen = ", ".join(f"{name} {value}" for name, value in settings.items() if value is not None)
    lines = [
        *([f"`{result['command']}`"] if result["command"] else []),
        f"{made['date']}, {commit}{' with local changes' if made['modified'] else ''}; {versions}",
        f"{place(made)} of a machine with {made['machine']['cores']} cores"
        + (f"; {result['note']}" if result["note"] else ""),
        f"{data['file']}: {data['questions']:,} questions with their passages, digest {data['digest']}"
        + (f"; {chosen}" if chosen else ""),
        f"greedy, at most {options['max_new_tokens']} tokens, {options['batch_size']} questions together",
    ]
    for model in {row["model"]: row["details"] for row in result["rows"]}.values():
        lines.append(
            f"{model['label']}: {model['name']}, {count(model['parameters'])} parameters, fingerprint "
            f"{model['fingerprint'][:16]}, template {model['template']}; computes in {model['compute_dtype']}, keeps "
            f"{model['precision_at_rest']}"
        )
    return "\n".join(f"- {line}" for line in lines)


def _names(row: dict[str, Any]) -> list[str]:
    # A label is the user's; a bar in it would begin another cell.
    return [row["model"].replace("|", "\\|"), row["mode"]]


def _score(estimate: dict[str, Any] | None) -> str:
    return "-" if estimate is None else f"{100 * estimate['value']:.1f}{_error(estimate)}"


def _difference(estimate: dict[str, Any] | None) -> str:
    if estimate is None:
        return "reference"
    points = f"{100 * estimate['value']:+.1f}{_error(estimate)}".replace("-", "−")
    if estimate["se"] is None or (estimate["value"] == 0 and estimate["se"] == 0):
        return points
    if not estimate["differs"]:
        return f"{points} (within 2 SE)"
    return f"{points} (**{'higher' if estimate['value'] > 0 else 'lower'}**)"


def _error(estimate: dict[str, Any]) -> str:
    return "" if estimate["se"] is None else f" ± {100 * estimate['se']:.1f}"
