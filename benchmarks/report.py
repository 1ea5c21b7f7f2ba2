"""A benchmark's result as files: JSON with every sample, a Markdown table, a plot. It measures nothing itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["markdown", "plot", "write_report"]

_LABELS = {
    "full": "full prefill",
    "cold": "blocks, none stored",
    "disk-uncached": "blocks from disk, not cached",
    "disk": "blocks from disk, page cache",
    "memory": "blocks from memory",
}
# Color-blind safe (Okabe and Ito, https://jfly.uni-koeln.de/color/); markers keep the lines apart in gray.
_STYLES: dict[str, dict[str, Any]] = {
    "full": {"color": "#D55E00", "marker": "o"},
    "cold": {"color": "#E69F00", "marker": "D"},
    "disk-uncached": {"color": "#56B4E9", "marker": "v"},
    "disk": {"color": "#0072B2", "marker": "s"},
    "memory": {"color": "#009E73", "marker": "^"},
}
_PART_LABELS = {
    "load_s": "load",
    "compose_s": "compose",
    "block_prefill_s": "block prefill",
    "query_prefill_s": "query",
    "other_s": "other",
}


def write_report(result: dict[str, Any], directory: Path) -> str:
    """Write `ttft.json`, `ttft.md` and `ttft.png` into a directory; returns the Markdown.

    Args:
        result: What `ttft.py` measured.
        directory: Created if it is not there; files of an earlier run are replaced.
    """
    directory.mkdir(parents=True, exist_ok=True)
    text = markdown(result)
    (directory / "ttft.json").write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    (directory / "ttft.md").write_text(text, "utf-8")
    plot(result, directory / "ttft.png")
    return text


def markdown(result: dict[str, Any]) -> str:
    """Times by length, where the warm ones go, and how it was measured."""
    modes = result["settings"]["modes"]
    sections = [
        f"# Time to first token: {result['model']['shape']} on {_place(result)}",
        "Median (least to most) in milliseconds; in brackets the lower bound from this machine's own rates.",
        _times_table(result["points"], modes, "ttft_s"),
        "The same in processor time of all threads: without waiting for other processes, or for the disk.",
        _times_table(result["points"], modes, "processor_s"),
        "Where the wall time goes, medians in milliseconds:",
        _parts_table(result["points"], modes),
        _provenance(result),
    ]
    return "\n\n".join(sections) + "\n"


def _times_table(points: list[dict[str, Any]], modes: list[str], measure: str) -> str:
    ratios = [mode for mode in ("disk", "memory") if mode in modes and "full" in modes]
    header = ["prompt tokens", "blocks", "at rest"]
    header += [_LABELS[mode] for mode in modes] + [f"full / {mode}" for mode in ratios]
    rows = []
    for point in points:
        row = [f"{point['prompt_tokens']:,}", str(point["blocks"]), f"{point['bytes_at_rest'] / 1e6:.1f} MB"]
        row += [_time_cell(point["modes"][mode], measure) for mode in modes]
        row += [f"{point['full_over'][measure][mode]:.1f}x" for mode in ratios]
        rows.append(row)
    return _table(header, rows)


def _time_cell(entry: dict[str, Any], measure: str) -> str:
    spread = entry[measure]
    least, most = _ms(spread["min"]), _ms(spread["max"])
    return f"**{_ms(spread['median'])}** ({least} to {most}) [{_ms(entry['bound_s'])}]"


def _parts_table(points: list[dict[str, Any]], modes: list[str]) -> str:
    rows = []
    for point in points:
        for mode in modes:
            parts = point["modes"][mode]["parts_s"]
            rows.append([f"{point['prompt_tokens']:,}", _LABELS[mode], *(_ms(parts[name]) for name in _PART_LABELS)])
    return _table(["prompt tokens", "mode", *_PART_LABELS.values()], rows)


def _provenance(result: dict[str, Any]) -> str:
    machine, rates, settings = result["machine"], result["rates"], result["settings"]
    model, load = result["model"], result["load_average"]
    least, most = settings["block_tokens"]
    lines = [
        f"`{result['command']}`",
        f"commit {result['commit'][:12]}{' with local changes' if result['modified'] else ''}; "
        + ", ".join(f"{name} {version}" for name, version in result["versions"].items()),
        f"{_place(result)} of a machine with {machine['cores']} cores; "
        f"load average {load['before']} before, {load['after']} after"
        + (f"; {result['note']}" if result["note"] else ""),
        f"measured in the run: copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix product {_rate(rates['matrix_flops_per_s'])} in {model['compute_dtype']}"
        + (f", host to GPU {rates['upload_bytes_per_s'] / 1e9:.1f} GB/s" if rates["upload_bytes_per_s"] else ""),
        f"{_count(model['parameters'])} parameters, random; {model['layers']} layers, "
        f"{model['attention_heads']} query and {model['kv_heads']} key heads; "
        f"computes in {model['compute_dtype']}, keeps {model['precision_at_rest']}, "
        f"{model['kv_bytes_per_token_at_rest']:,} bytes per token",
        f"query of {settings['query_tokens']} tokens, passages of {least} to {most}; n = {settings['repeats']} after "
        "one dropped round, modes taking turns; buffers are reused, as in a process that serves many requests",
    ]
    if machine["device"] != "cpu":
        lines.append("parts are times of the host, which runs ahead of the GPU; the whole waits for the GPU")
    return "\n".join(f"- {line}" for line in lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Time to first token by prompt length, both logarithmic, with the ratio of full prefill to blocks from memory.

    Args:
        result: What `ttft.py` measured.
        path: Where the PNG goes.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    on_wall = result["settings"]["clock"] == "wall"
    # Without the waiting, a disk that is not cached looks like one that is.
    modes = [mode for mode in result["settings"]["modes"] if on_wall or mode != "disk-uncached"]
    points = result["points"]
    measure = "ttft_s" if on_wall else "processor_s"
    quantity = "Time to first token" if on_wall else "Processor time to first token"
    lengths = [point["prompt_tokens"] for point in points]
    figure, axes = pyplot.subplots(figsize=(8, 5.2), layout="constrained")
    for mode in modes:
        _draw_mode(axes, lengths, [point["modes"][mode][measure] for point in points], mode)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.margins(x=0.06, y=0.1)
    caption = _annotate_ratios(axes, points, modes, measure)
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: _duration(seconds)))
    axes.set_xlabel(f"prompt length in tokens, {result['settings']['query_tokens']} of them the question")
    axes.set_ylabel(quantity.lower())
    axes.grid(color="#E4E4E4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    model = result["model"]
    title = f"{quantity}: {model['shape']}, {_count(model['parameters'])} parameters, {model['compute_dtype']}"
    axes.set_title(title, fontsize=13, loc="left", pad=24)
    details = f"{_place(result)}; median of {result['settings']['repeats']}, band from least to most{caption}"
    axes.text(0, 1.025, details, transform=axes.transAxes, fontsize=9, color="#555555")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _draw_mode(axes: Any, lengths: list[int], spreads: list[dict[str, Any]], mode: str) -> None:
    medians = [spread["median"] for spread in spreads]
    axes.plot(lengths, medians, label=_LABELS[mode], linewidth=2, markersize=6, **_STYLES[mode])
    least, most = ([spread[end] for spread in spreads] for end in ("min", "max"))
    axes.fill_between(lengths, least, most, color=_STYLES[mode]["color"], alpha=0.12, linewidth=0)


def _annotate_ratios(axes: Any, points: list[dict[str, Any]], modes: list[str], measure: str) -> str:
    """The ratio below each point of the memory mode; returns what to say of it, empty where it cannot be drawn."""
    if "full" not in modes or "memory" not in modes:
        return ""
    for point in points:
        ratio = point["full_over"][measure]["memory"]
        axes.annotate(
            f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x",
            (point["prompt_tokens"], point["modes"]["memory"][measure]["median"]),
            xytext=(0, -17),
            textcoords="offset points",
            ha="center",
            fontsize=10,
            fontweight="bold",
            color=_STYLES["memory"]["color"],
        )
    return "; numbers: full prefill / blocks from memory"


def _place(result: dict[str, Any]) -> str:
    machine = result["machine"]
    if "gpu" in machine:
        return str(machine["gpu"])
    threads = machine["torch_threads"]
    return f"{machine['cpu']}, {threads} thread{'s' if threads > 1 else ''}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---:"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1000
    return f"{milliseconds:,.0f}" if milliseconds >= 100 else f"{milliseconds:.1f}"


def _duration(seconds: float) -> str:
    return f"{seconds:g} s" if seconds >= 1 else f"{seconds * 1000:g} ms"


def _count(count: int) -> str:
    return f"{count / 1e9:.1f} B" if count >= 1e9 else f"{count / 1e6:.{0 if count >= 1e7 else 1}f} M"


def _rate(flops_per_s: float) -> str:
    return f"{flops_per_s / 1e12:.1f} TFLOP/s" if flops_per_s >= 1e12 else f"{flops_per_s / 1e9:.0f} GFLOP/s"
