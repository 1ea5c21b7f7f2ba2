"""The pictures of an accuracy result: bars per group of questions, and a curve over training steps (extra `plot`).

Colors are those of Okabe and Ito, as in the plots of speed; hatches and markers keep things apart in gray.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from blockrag.evaluation.accuracy import ALL, METRIC_LABELS, groups_shown
from blockrag.evaluation.speed.text import place

__all__ = ["draw"]

_METRIC = "substr_em"
# Smaller markers and broken lines on top: curves that coincide all stay visible.
_MODES: dict[str, dict[str, Any]] = {
    "full": {"color": "#D55E00", "marker": "o", "markersize": 10, "linestyle": "-"},
    "block": {"color": "#0072B2", "marker": "s", "markersize": 6, "linestyle": "--"},
    "block-no-reencode": {"color": "#56B4E9", "marker": "v", "markersize": 6, "linestyle": "--"},
}
_OTHERS = ("#009E73", "#CC79A7", "#E69F00", "#000000")
# One per model; the color is the mode's.
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "+++")
_GRID: dict[str, Any] = {"color": "#E4E4E4", "linewidth": 0.8}
_GRAY = "#555555"
# The tables have all of them.
_MOST_GROUPS = 9


def draw(result: dict[str, Any], directory: Path) -> list[Path]:
    """Draw a result.

    Args:
        result: What `summarize` returned.
        directory: Where the PNG files go.

    Returns:
        `accuracy.png`, or `curve.png` where the models are checkpoints of one run.
    """
    curve = any(row["step"] is not None for row in result["rows"])
    with mpl.rc_context({"font.size": 10, "axes.axisbelow": True, "hatch.linewidth": 0.6}):
        figure = _curve(result) if curve else _bars(result)
    path = directory / ("curve.png" if curve else "accuracy.png")
    figure.savefig(path, dpi=150)
    return [path]


def _bars(result: dict[str, Any]) -> Figure:
    rows = result["rows"]
    groups = groups_shown(rows)[:_MOST_GROUPS]
    models = list(dict.fromkeys(row["model"] for row in rows))
    width = 0.8 / len(rows)
    figure = Figure(figsize=(max(6.4, 1.6 + 0.55 * len(groups) * len(rows)), 5.2), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(rows):
        scores = [row["groups"][group]["scores"][_METRIC] for group in groups]
        axes.bar(
            [at + (number - (len(rows) - 1) / 2) * width for at in range(len(groups))],
            [100 * one["value"] for one in scores],
            width * 0.92,
            yerr=[100 * (one["se"] or 0) for one in scores],
            color=_style(row["mode"], rows)["color"],
            hatch=_HATCHES[models.index(row["model"]) % len(_HATCHES)],
            edgecolor="white",
            error_kw={"capsize": 3, "elinewidth": 1.2, "ecolor": "#222222"},
            label=_label(row, models),
        )
    names = [f"{group}\nn = {rows[0]['groups'][group]['n']:,}" for group in groups]
    axes.set_xticks(range(len(groups)), names)
    _finish(figure, axes, result)
    return figure


def _curve(result: dict[str, Any]) -> Figure:
    rows = [row for row in result["rows"] if row["step"] is not None]
    figure = Figure(figsize=(7.2, 5.2), layout="constrained")
    axes = figure.subplots()
    for mode in dict.fromkeys(row["mode"] for row in rows):
        points = [(row["step"], row["groups"][ALL]["scores"][_METRIC]) for row in rows if row["mode"] == mode]
        points.sort(key=lambda point: point[0])
        axes.errorbar(
            [step for step, _ in points],
            [100 * one["value"] for _, one in points],
            yerr=[100 * (one["se"] or 0) for _, one in points],
            capsize=3,
            linewidth=1.8,
            label=mode,
            **_style(mode, rows),
        )
    axes.set_xlabel("training step")
    axes.margins(x=0.05)
    _finish(figure, axes, result)
    return figure


def _finish(figure: Figure, axes: Any, result: dict[str, Any]) -> None:
    axes.set_ylim(0, 104)
    axes.set_ylabel(f"{METRIC_LABELS[_METRIC]}, percent")
    axes.grid(axis="y", **_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    axes.set_title(f"Accuracy: {result['data']['file']}", fontsize=13, loc="left", pad=24)
    details = f"{result['data']['questions']:,} questions; error bars: one standard error; {place(result['made'])}"
    axes.text(0, 1.025, details, transform=axes.transAxes, fontsize=9, color=_GRAY)


def _label(row: dict[str, Any], models: list[str]) -> str:
    return str(row["mode"]) if len(models) == 1 else f"{row['model']}, {row['mode']}"


def _style(mode: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    others = [one for one in dict.fromkeys(row["mode"] for row in rows) if one not in _MODES]
    return _MODES.get(mode) or {
        "color": _OTHERS[others.index(mode) % len(_OTHERS)],
        "marker": "*",
        "markersize": 8,
        "linestyle": ":",
    }
