"""The pictures of each benchmark's result. The one module that imports matplotlib (the extra `plot`).

Colors are those of Okabe and Ito (https://jfly.uni-koeln.de/color/), safe for color-blind readers; markers and
hatches keep things apart in gray.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from blockrag.evaluation.speed.tables import PART_LABELS, label
from blockrag.evaluation.speed.text import count, duration, place

__all__ = ["draw"]

_STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#D55E00", "marker": "o"},
    "stock": {"color": "#7F3B08", "marker": "H"},
    "cold": {"color": "#E69F00", "marker": "D"},
    "seed": {"color": "#CC79A7", "marker": "X"},
    "disk-uncached": {"color": "#56B4E9", "marker": "v"},
    "disk": {"color": "#0072B2", "marker": "s"},
    "memory": {"color": "#009E73", "marker": "^"},
    "pinned": {"color": "#8C564B", "marker": "<"},
    "device": {"color": "#17BECF", "marker": ">"},
    "kept": {"color": "#000000", "marker": "P"},
}
_OTHERS = ("#9467BD", "#7F7F7F", "#BCBD22", "#E377C2")
_PARTS = {
    "load_s": ("#56B4E9", ""),
    "check_s": ("#F0E442", "//"),
    "compose_s": ("#009E73", ""),
    "block_prefill_s": ("#E69F00", ""),
    "query_prefill_s": ("#0072B2", ".."),
    "other_s": ("#BBBBBB", ""),
}
_GRAY = "#555555"
_GRID: dict[str, Any] = {"color": "#E4E4E4", "linewidth": 0.8}


def draw(result: dict[str, Any], directory: Path) -> list[Path]:
    """Draw what a result has to show.

    Args:
        result: What one of the benchmarks returned.
        directory: Where the PNG files go, named after the benchmark.

    Returns:
        The files; none for a benchmark without a picture.
    """
    drawings: dict[str, dict[str, Callable[[dict[str, Any]], Figure | None]]] = {
        "ttft": {"ttft": _ttft, "ttft-parts": _ttft_parts},
        "decode": {"decode": _decode},
        "compose": {"compose": _compose},
    }
    files = []
    for name, drawing in drawings.get(result["benchmark"], {}).items():
        with mpl.rc_context({"font.size": 10, "axes.axisbelow": True}):
            figure = drawing(result)
        if figure is not None:
            files.append(directory / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
    return files


def _ttft(result: dict[str, Any]) -> Figure:
    """Time by prompt length, both logarithmic, with the bound of the warm modes."""
    points, modes = result["points"], result["modes"]
    lengths = [point["prompt_tokens"] for point in points]
    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    axes = figure.subplots()
    for mode in modes:
        _line(axes, lengths, [point["modes"][mode]["ttft_s"] for point in points], label(mode), _style(mode, modes))
    bound = next((mode for mode in ("memory", "disk") if mode in modes), None)
    if bound and all(point["modes"][bound]["bound_s"] for point in points):
        bounds = [point["modes"][bound]["bound_s"] for point in points]
        axes.plot(lengths, bounds, color=_GRAY, linestyle=(0, (4, 3)), linewidth=1.4, label="bound, blocks from memory")
    whole = next((mode for mode in ("stock", "full") if mode in modes), None)
    if whole and bound:
        _annotate_ratios(axes, points, whole, bound)
    _logarithmic(axes, lengths)
    axes.set_xlabel(f"prompt length in tokens, {result['settings']['query_tokens']} of them the question")
    axes.set_ylabel("time to first token")
    axes.legend(frameon=False, loc="upper left", fontsize=9)
    note = f"\nnumbers: {label(whole)} / {label(bound)}" if whole and bound else ""
    _title(axes, result, "Time to first token", f"median of {_repeats(result)}, band from least to most{note}")
    return figure


def _annotate_ratios(axes: Any, points: Sequence[dict[str, Any]], whole: str, mode: str) -> None:
    """How many times as long prefilling the whole prompt takes, above its points: there the lines lie apart."""
    for point in points:
        if not point["blocks"]:
            continue
        ratio = point[f"{whole}_over"]["ttft_s"][mode]
        axes.annotate(
            f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x",
            (point["prompt_tokens"], point["modes"][whole]["ttft_s"]["median"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
            color=_STYLES[whole]["color"],
        )


def _ttft_parts(result: dict[str, Any]) -> Figure | None:
    """Where the time of warm requests goes, as shares of the whole, with the whole above each bar."""
    modes = [mode for mode in ("disk", "memory") if mode in result["modes"]]
    if not modes:
        return None
    points = result["points"]
    figure = Figure(figsize=(8.6, 4.6), layout="constrained")
    panels = figure.subplots(1, len(modes), sharey=True, squeeze=False)[0]
    for axes, mode in zip(panels, modes, strict=True):
        bottoms = [0.0] * len(points)
        for part, (color, hatch) in _PARTS.items():
            shares = [_share(point["modes"][mode]["parts_s"], part) for point in points]
            if max(shares) < 0.1:
                continue
            axes.bar(
                range(len(points)),
                shares,
                bottom=bottoms,
                color=color,
                hatch=hatch,
                edgecolor="white",
                linewidth=0.5,
                width=0.75,
                label=PART_LABELS[part],
            )
            bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
        for position, point in enumerate(points):
            seconds = point["modes"][mode]["ttft_s"]["median"]
            axes.text(position, 101.5, _short(seconds), ha="center", fontsize=7, color=_GRAY)
        axes.set_xticks(range(len(points)), [_tokens(point["prompt_tokens"]) for point in points])
        axes.set_xlabel("prompt length in tokens")
        axes.set_title(label(mode), fontsize=11, pad=14)
        axes.set_ylim(0, 107)
        axes.set_yticks(range(0, 101, 20), [f"{share} %" for share in range(0, 101, 20)])
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("share of the time to first token")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    figure.suptitle(f"Where the time goes: {_subject(result)}", fontsize=13, x=0.01, ha="left")
    return figure


def _share(parts: dict[str, float], part: str) -> float:
    """Percent of the whole; what has no color of its own counts as other."""
    seconds = parts.get(part, 0.0)
    if part == "other_s":
        seconds += sum(taken for name, taken in parts.items() if name not in _PARTS)
    return 100 * seconds / sum(parts.values())


def _decode(result: dict[str, Any]) -> Figure:
    """Tokens per second by prompt length, both logarithmic."""
    points = result["points"]
    lengths = [point["prompt_tokens"] for point in points]
    figure = Figure(figsize=(7.6, 4.8), layout="constrained")
    axes = figure.subplots()
    styles = {"blockrag": _STYLES["memory"], "transformers": _STYLES["full"]}
    names = {"blockrag": "blockrag", "transformers": "transformers: generate, DynamicCache, sdpa"}
    for way, style in styles.items():
        _line(axes, lengths, [point["ways"][way]["tokens_per_s"] for point in points], names[way], style)
    for point in points:
        axes.annotate(
            f"{point['ratio']:.1f}x",
            (point["prompt_tokens"], point["ways"]["blockrag"]["tokens_per_s"]["median"]),
            xytext=(0, 8),
            textcoords="offset points",
            ha="center",
            fontsize=9,
            fontweight="bold",
            color=_STYLES["memory"]["color"],
        )
    _logarithmic(axes, lengths, seconds=False)
    axes.set_xlabel("prompt length in tokens")
    axes.set_ylabel("tokens per second")
    axes.legend(frameon=False, loc="lower left", fontsize=9)
    _title(
        axes, result, "Decoding", f"median of {_repeats(result)}, band from least to most; numbers: ratio of the two"
    )
    return figure


def _compose(result: dict[str, Any]) -> Figure:
    """Bytes moved per second by precision and length, beside the bandwidth of a copy."""
    points = result["points"]
    precisions = list(dict.fromkeys(point["precision"] for point in points))
    cases = list(dict.fromkeys((point["tokens"], point["blocks"]) for point in points))
    colors = ("#56B4E9", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#D55E00", "#8C564B")
    figure = Figure(figsize=(8.6, 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(cases)
    found = {(point["precision"], point["tokens"], point["blocks"]): point for point in points}
    for number, (tokens, blocks) in enumerate(cases):
        places = [index - 0.4 + width * (number + 0.5) for index in range(len(precisions))]
        entries = [found[precision, tokens, blocks] for precision in precisions]
        axes.bar(
            places,
            [entry["bytes_per_s"]["request"] / 1e9 for entry in entries],
            width=0.92 * width,
            color=colors[number % len(colors)],
            label=f"{tokens:,} tokens in {blocks} blocks",
        )
        alone = [entry["bytes_per_s"]["place"] / 1e9 for entry in entries]
        axes.plot(places, alone, linestyle="", marker="_", markersize=9, color="#000000", zorder=3)
    axes.plot([], [], linestyle="", marker="_", markersize=9, color="#000000", label="placing alone")
    copy = median(point["bytes_per_s"]["copy"] for point in points) / 1e9
    axes.axhline(
        copy,
        color=_GRAY,
        linestyle=(0, (4, 3)),
        linewidth=1.4,
        label=f"plain copy into the same memory, median {copy:.0f} GB/s",
    )
    axes.set_ylim(0, 1.08 * max(copy, *(point["bytes_per_s"]["place"] / 1e9 for point in points)))
    axes.set_xticks(range(len(precisions)), precisions)
    axes.set_xlabel("precision at rest")
    axes.set_ylabel("GB/s read and written")
    axes.grid(axis="y", **_GRID)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    _title(axes, result, "Composing from memory", f"median of {_repeats(result)}; bars: as a request does it")
    return figure


def _line(
    axes: Any, lengths: Sequence[int], spreads: Sequence[dict[str, Any]], name: str, style: dict[str, Any]
) -> None:
    axes.plot(lengths, [spread["median"] for spread in spreads], label=name, linewidth=1.8, markersize=6, **style)
    least, most = ([spread[end] for spread in spreads] for end in ("min", "max"))
    axes.fill_between(lengths, least, most, color=style["color"], alpha=0.12, linewidth=0)


def _logarithmic(axes: Any, lengths: Sequence[int], *, seconds: bool = True) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.12)
    axes.set_xticks(list(lengths), [_tokens(length) for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value) if seconds else f"{value:g}"))
    axes.grid(**_GRID)
    axes.spines[["top", "right"]].set_visible(False)


def _title(axes: Any, result: dict[str, Any], title: str, details: str) -> None:
    text = f"{place(result)}; {details}"
    axes.set_title(f"{title}: {_subject(result)}", fontsize=13, loc="left", pad=24 + 12 * text.count("\n"))
    axes.text(0, 1.025, text, transform=axes.transAxes, fontsize=9, color=_GRAY)


def _subject(result: dict[str, Any]) -> str:
    model = result["model"]
    return f"{model['name']}, {count(model['parameters'])} parameters, {model['compute_dtype']}"


def _style(mode: str, modes: Sequence[str]) -> dict[str, Any]:
    others = [one for one in modes if one not in _STYLES]
    return _STYLES.get(mode) or {"color": _OTHERS[others.index(mode) % len(_OTHERS)], "marker": "*"}


def _repeats(result: dict[str, Any]) -> str:
    once = result["settings"].get("once")
    return f"{result['settings']['repeats']}" + (f" ({', '.join(once)}: once)" if once else "")


def _tokens(number: int) -> str:
    return f"{number // 1024}K" if number >= 1024 and number % 1024 == 0 else f"{number:,}"


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1000:.0f} ms"
