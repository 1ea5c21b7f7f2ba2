"""From files of predictions to one result: means, paired differences, work, warnings. JSON-ready; it measures nothing.

All files must hold the same questions. Rows are files, one per model and mode; each is compared, question by question,
with the reference row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from blockrag.errors import InputError
from blockrag.evaluation.flops import FirstTokenFlops, ModelShape, flops_to_first_token, reduction_percent
from blockrag.evaluation.metrics import METRICS
from blockrag.evaluation.predictions import Prediction, read_predictions
from blockrag.evaluation.statistics import Estimate, mean, paired_difference

__all__ = ["ALL", "METRIC_LABELS", "SCHEMA_VERSION", "groups_shown", "summarize"]

SCHEMA_VERSION = 1
"""Raised whenever a key changes its meaning or goes away."""

ALL = "all"
"""The group of all questions."""

METRIC_LABELS = {"em": "EM", "substr_em": "Substr-EM", "f1": "F1", "union_f1": "union F1"}
"""What the scores are called in tables and pictures."""

# Below this the normal approximation behind "two standard errors" is rough.
_FEW_CLUSTERS = 30


@dataclass(frozen=True, slots=True)
class _Row:
    """One file."""

    header: Mapping[str, Any]
    predictions: Sequence[Prediction]

    @property
    def model(self) -> str:
        return str(self.header["model"]["label"])

    @property
    def mode(self) -> str:
        return str(self.header["mode"])


def summarize(
    paths: Sequence[str | Path],
    *,
    command: str = "",
    note: str = "",
    reference: tuple[str, str] | None = None,
    steps: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """The result of an evaluation.

    Args:
        paths: Complete files of predictions of the same questions, in the order of the rows.
        command: What was run.
        note: Kept with the result.
        reference: Model and mode that the others are compared with; by default the first model's full attention, or
            the first row where there is none.
        steps: Training steps of models that are checkpoints of one run, by label.

    Raises:
        InputError: There is no file, one is not complete or has no scores, they hold different questions or answers of
            different most lengths, or there is no such reference.
        DataError: A file is no file of predictions.
    """
    rows = [_Row(*read_predictions(path)) for path in paths]
    if not rows:
        raise InputError("there is nothing to summarize; pass files that `blockrag eval` wrote")
    _check(paths, rows)
    base = _reference(rows, reference)
    first = rows[0].header
    return {
        "schema": SCHEMA_VERSION,
        "command": command,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "note": note,
        "data": first["data"],
        "options": first["options"],
        "made": first["made"],
        "reference": {"model": base.model, "mode": base.mode},
        "warnings": _warnings(rows),
        "rows": [_summary(row, base, rows, steps or {}) for row in rows],
    }


def groups_shown(rows: Sequence[dict[str, Any]]) -> list[str]:
    """All questions, then each kind, but for a kind that is all questions."""
    groups = rows[0]["groups"]
    return [name for name, group in groups.items() if name == ALL or group["n"] < groups[ALL]["n"]]


def _check(paths: Sequence[str | Path], rows: Sequence[_Row]) -> None:
    first = rows[0]
    for path, row in zip(paths, rows, strict=True):
        wanted = row.header["data"]["questions"]
        if len(row.predictions) != wanted:
            raise InputError(
                f"{path} holds {len(row.predictions)} of {wanted} answers; run the same command again to complete it"
            )
        if row.header["data"]["digest"] != first.header["data"]["digest"]:
            raise InputError(f"{path} and {paths[0]} answer different questions; compare files of the same --data")
        if any(not one.scores for one in row.predictions):
            raise InputError(f"{path} holds answers without scores, of --icl; have OpenCompass evaluate its export")
        most, allowed = row.header["options"]["max_new_tokens"], first.header["options"]["max_new_tokens"]
        if most != allowed:
            raise InputError(
                f"{path} holds answers of at most {most} tokens, {paths[0]} of {allowed}; answer both with the same "
                "--max-new-tokens"
            )


def _reference(rows: Sequence[_Row], wanted: tuple[str, str] | None) -> _Row:
    if wanted is None:
        return next((row for row in rows if row.model == rows[0].model and row.mode == "full"), rows[0])
    for row in rows:
        if (row.model, row.mode) == wanted:
            return row
    names = ", ".join(f"{row.model}:{row.mode}" for row in rows)
    raise InputError(f"there is no row {':'.join(wanted)} to compare with; pass one of {names}")


def _summary(row: _Row, base: _Row, rows: Sequence[_Row], steps: Mapping[str, int]) -> dict[str, Any]:
    model = row.header["model"]
    kinds = dict.fromkeys(one.kind for one in row.predictions if one.kind)
    groups = {ALL: _group(row, base, lambda one: True)}
    for kind in kinds:
        groups[kind] = _group(row, base, lambda one, kind=kind: one.kind == kind)  # type: ignore[misc]
    return {
        "model": row.model,
        "mode": row.mode,
        "step": steps.get(row.model),
        "details": model,
        "errors": sum(bool(one.error) for one in row.predictions),
        "cut_off": sum(one.finish_reason == "length" for one in row.predictions),
        "groups": groups,
        "work": _work(row, rows),
    }


def _group(row: _Row, base: _Row, belongs: Callable[[Prediction], bool]) -> dict[str, Any]:
    pairs = [(one, other) for one, other in zip(row.predictions, base.predictions, strict=True) if belongs(one)]
    clusters = [one.line for one, _ in pairs]
    scores, differences = {}, {}
    for metric in METRICS:
        values = [one.scores[metric] for one, _ in pairs]
        scores[metric] = _estimate(mean(values, clusters))
        if row is not base:
            others = [other.scores[metric] for _, other in pairs]
            differences[metric] = _estimate(paired_difference(values, others, clusters))
    return {"n": len(pairs), "clusters": len(set(clusters)), "scores": scores, "differences": differences}


def _estimate(estimate: Estimate) -> dict[str, Any]:
    return {"value": estimate.value, "se": estimate.se, "differs": estimate.differs}


def _work(row: _Row, rows: Sequence[_Row]) -> dict[str, Any] | None:
    """Tokens and FLOPs per question; None where no question was answered."""
    answered = [one.tokens for one in row.predictions if not one.error]
    if not answered:
        return None
    work: dict[str, Any] = {
        "tokens": {
            name: sum(getattr(one, name) for one in answered) / len(answered)
            for name in ("prompt", "reused", "computed", "new")
        }
    }
    flops = _flops(row)
    if flops is not None:
        work["flops"] = flops
        full = next((other for other in rows if other.model == row.model and other.mode == "full"), None)
        whole = None if full is None or full is row else _flops(full)
        if whole is not None:
            work["saved_percent"] = {name: reduction_percent(whole[name], flops[name]) for name in flops}
    return work


def _flops(row: _Row) -> dict[str, float] | None:
    """FLOPs to the first token in each of the three counts, averaged over the questions."""
    shape = row.header["model"]["shape"]
    answered = [one.tokens for one in row.predictions if not one.error]
    if shape is None or not answered:
        return None
    counts: list[FirstTokenFlops] = [
        flops_to_first_token(
            num_tokens=one.query, shape=ModelShape(**shape), reused_tokens=one.reused, missed_blocks=one.missed
        )
        for one in answered
    ]
    return {
        name: sum(getattr(count, name) for count in counts) / len(counts)
        for name in ("paper", "with_attention", "with_reuse")
    }


def _warnings(rows: Sequence[_Row]) -> list[str]:
    warnings = []
    clusters = len({one.line for one in rows[0].predictions})
    if clusters < _FEW_CLUSTERS:
        warnings.append(
            f"{clusters} independent lines: standard errors from fewer than {_FEW_CLUSTERS} are rough, so that two of "
            "them settle nothing"
        )
    for row in rows:
        model, tokens = row.header["model"], [one.tokens for one in row.predictions]
        failed = sum(bool(one.error) for one in row.predictions)
        if failed:
            warnings.append(f"{row.model}, {row.mode}: {failed} questions could not be asked and count as wrong")
        if row.mode != "full" and not model["block_fine_tuned"]:
            warnings.append(f"{row.model}, {row.mode}: the model is not known to be fine-tuned for block attention")
        for name, trained in (("prompt", model["trained_tokens"]), ("blocks", model["trained_blocks"])):
            beyond = 0 if trained is None else sum(getattr(one, name) > trained for one in tokens)
            if beyond:
                what = "tokens" if name == "prompt" else "blocks"
                warnings.append(
                    f"{row.model}, {row.mode}: {beyond} prompts exceed the {trained} {what} it was trained with; what "
                    "a model does beyond its training says little about the mode"
                )
    return warnings
