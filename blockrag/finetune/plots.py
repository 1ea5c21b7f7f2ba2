"""The course of a run as a picture: the loss, and exact match in both attentions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["plot_history"]

_COLORS = {"full": "#666666", "block": "#1f77b4"}


def plot_history(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw a run's log.

    Args:
        history: The Trainer's log, one mapping per line.
        path: The PNG to write.

    Returns:
        Whether there was anything to draw, and matplotlib to draw it with.
    """
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    if not losses or find_spec("matplotlib") is None:
        return False
    # The Agg canvas alone: no window system, and pyplot's state stays the user's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [entry for entry in history if "eval_full_exact_match" in entry]
    figure = Figure(figsize=(9, 3.4) if scored else (5, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    axes[0].plot(*zip(*losses, strict=True), color="#333333", linewidth=1)
    axes[0].set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    if scored:
        for attention, color in _COLORS.items():
            points = [(entry["step"], entry[f"eval_{attention}_exact_match"]) for entry in scored]
            axes[1].plot(
                *zip(*points, strict=True), color=color, marker="o", markersize=3, label=f"{attention} attention"
            )
        axes[1].set(xlabel="optimizer step", ylabel="exact match, %", ylim=(0, 102))
        axes[1].legend(frameon=False, loc="lower right")
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return True
