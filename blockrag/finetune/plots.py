"""The course of a run as a picture: the loss, and exact match in both attentions.

Colors and markers of the attentions are those of the plots of evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history"]

# A smaller marker and a broken line on top: curves that coincide both stay visible.
_STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#D55E00", "marker": "o", "markersize": 8, "linestyle": "-"},
    "block": {"color": "#0072B2", "marker": "s", "markersize": 5, "linestyle": "--"},
}
_GRAY = "#555555"
_WINDOW = 11
"""Points around each that the running mean of the loss takes together, once there are several times as many."""


def plot_history(history: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw a run's log.

    Args:
        history: The Trainer's log, one mapping per line.
        path: The PNG to write.

    Returns:
        Whether there was anything to draw, and matplotlib to draw it with.
    """
    losses = [entry for entry in history if "loss" in entry]
    if not losses or find_spec("matplotlib") is None:
        return False
    # The Agg canvas alone: no window system, and pyplot's state stays the user's.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    scored = [entry for entry in history if "eval_full_exact_match" in entry]
    figure = Figure(figsize=(10, 4) if scored else (6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _draw_loss(axes[0], losses)
    if scored:
        _draw_scores(axes[1], scored)
    for axis in axes:
        axis.set_xlabel("optimizer step")
        axis.set_xlim(0, 1.02 * max(entry["step"] for entry in history))
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(color="#E4E4E4", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return True


def _draw_loss(axis: Axes, losses: Sequence[Mapping[str, Any]]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    steps, values = [entry["step"] for entry in losses], [entry["loss"] for entry in losses]
    smooth = len(values) >= 3 * _WINDOW
    axis.plot(
        steps, values, color=_GRAY, alpha=0.35 if smooth else 1, linewidth=1, marker="" if len(values) > 1 else "o"
    )
    if smooth:
        windows = (values[max(0, at - _WINDOW // 2) : at + _WINDOW // 2 + 1] for at in range(len(values)))
        means = [sum(window) / len(window) for window in windows]
        axis.plot(steps, means, color="#000000", linewidth=1.6, label=f"mean of {_WINDOW} points")
        axis.legend(frameon=False)
    axis.set_title("training loss", fontsize=10, loc="left", color=_GRAY)
    least, most = min(values), max(values)
    if 0 < 5 * least < most:
        axis.set_yscale("log")
        # Steps of 1, 2 and 5, written out: 0.02 rather than a power of ten.
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.set_ylim(bottom=0)


def _draw_scores(axis: Axes, scored: Sequence[Mapping[str, Any]]) -> None:
    steps = [entry["step"] for entry in scored]
    for attention, style in _STYLES.items():
        values = [entry[f"eval_{attention}_exact_match"] for entry in scored]
        axis.plot(steps, values, label=f"{attention} attention, {values[-1]:.1f} % at the end", **style)
    axis.set_title("exact match on held-out questions, %", fontsize=10, loc="left", color=_GRAY)
    axis.set_ylim(-2, 102)
    axis.legend(frameon=False, loc="best")
