"""The tables of each benchmark's report, as sections of Markdown; the first is the heading."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from blockrag.evaluation.speed.steps import STEPS
from blockrag.evaluation.speed.text import milliseconds, place, size, spread_cell, table

__all__ = ["LABELS", "PART_LABELS", "compose", "decode", "label", "memory", "prebuild", "ttft"]

LABELS = {
    "full": "full prefill",
    "stock": "full prefill, transformers alone",
    "cold": "blocks, none stored",
    "seed": "published way, from memory",
    "disk-uncached": "blocks from disk, not cached",
    "disk": "blocks from disk, page cache",
    "memory": "blocks from memory",
    "pinned": "blocks from pinned memory",
    "device": "blocks on the GPU",
    "kept": "same passages again, kept",
}
PART_LABELS = {
    "load_s": "load",
    "check_s": "check",
    "compose_s": "compose",
    "block_prefill_s": "block prefill",
    "query_prefill_s": "query",
    "other_s": "other",
}


def label(mode: str) -> str:
    """What a mode is called in tables and legends; a store given by URL by its scheme."""
    return LABELS.get(mode, f"blocks from {mode}")


def _heading(result: dict[str, Any], title: str) -> str:
    return f"# {title}: {result['model']['name']} on {place(result)}"


def ttft(result: dict[str, Any]) -> list[str]:
    """Times, bounds, growth, parts, steps, FLOPs."""
    points, modes = result["points"], result["modes"]
    settings = result["settings"]
    least, most = settings["block_tokens"]
    sections = [
        _heading(result, "Time to first token"),
        f"A query of {settings['query_tokens']} tokens behind passages of {least} to {most}. Median (least to most) in "
        f"milliseconds, {settings['repeats']} repeats, modes taking turns after one round that does not count"
        + (f"; once, without it: {', '.join(settings['once'])}" if settings["once"] else "")
        + ". Buffers are reused, as in a process that serves many requests.",
        _times(points, modes, "ttft_s"),
        *_facts(result),
        "## Bounds",
        "The lower bound from this machine's own rates in milliseconds, and the median as a multiple of it.",
        _bounds(points, modes),
        "## Where the time goes",
        "Medians in milliseconds, as the request itself measured them. Threads that work at the same time share the "
        "time that passed.",
        _parts(points, modes),
        "The same blocks from memory, one step at a time (medians in milliseconds). A request overlaps these steps, so "
        "they do not add up to it; converting is measured alone and again as a part of placing.",
        _steps(points),
        "## Work",
        "FLOPs to the first token: the paper's count (2 x parameters x tokens computed), with the attention products, "
        "and with the rotation of reused keys.",
        _flops(points),
        "## Processor time",
        "Of all threads, in milliseconds: without waiting for other processes, or for the disk.",
        _times(points, modes, "processor_s"),
    ]
    return [section for section in sections if section]


def _times(points: Sequence[dict[str, Any]], modes: Sequence[str], measure: str) -> str:
    ratios = [
        (whole, mode)
        for whole in ("full", "stock")
        for mode in modes
        if whole in modes and mode not in ("full", "stock", "cold")
    ]
    header = ["prompt tokens", "blocks", "at rest", *map(label, modes), *(f"{one} / {mode}" for one, mode in ratios)]
    return table(
        header,
        (
            [
                f"{point['prompt_tokens']:,}",
                str(point["blocks"]),
                size(point["bytes_at_rest"]),
                *(spread_cell(point["modes"][mode][measure]) for mode in modes),
                *(f"{point[f'{whole}_over'][measure][mode]:.1f}x" for whole, mode in ratios),
            ]
            for point in points
        ),
    )


def _facts(result: dict[str, Any]) -> list[str]:
    lines = []
    even = result["break_even"]
    for mode, tokens in even.get("prompt_tokens", {}).items():
        if tokens is None:
            lines.append(f"{label(mode)}: not ahead of full prefill at the longest prompt measured")
        elif tokens <= even["shortest_measured"]:
            lines.append(f"{label(mode)}: ahead of full prefill at every length measured with passages")
        else:
            lines.append(f"{label(mode)}: ahead of full prefill from about {tokens:,.0f} tokens on")
    growth = result["growth"]
    if growth["modes"]:
        grown = (
            f"{label(mode)} {one['s_per_token'] * 1e6:.2f}"
            + (f" (**{one['over_bound']:.1f}x** of {one['bound_s_per_token'] * 1e6:.2f})" if one["over_bound"] else "")
            for mode, one in growth["modes"].items()
        )
        lines.append(
            f"growth from {growth['lengths'][0]:,} to {growth['lengths'][-1]:,} tokens in microseconds per token, "
            f"least squares, over what bandwidth and attention arithmetic gives: {'; '.join(grown)}"
        )
    searches = [(point["blocks"], point["search_s"]["median"]) for point in result["points"] if point["search_s"]]
    if searches:
        passages = result["settings"]["passages"]
        found = "; ".join(f"{blocks} in {milliseconds(seconds)} ms" for blocks, seconds in searches)
        lines.append(
            f"retrieval comes before all of this: an exact search among {passages:,} random vectors, without the "
            f"encoder, finds {found}"
        )
    return ["\n".join(f"- {line}" for line in lines)] if lines else []


def _bounds(points: Sequence[dict[str, Any]], modes: Sequence[str]) -> str:
    def cell(entry: dict[str, Any]) -> str:
        bound = entry["bound_s"]
        return "unknown" if bound is None else f"{milliseconds(bound)} (**{entry['ttft_s']['median'] / bound:.1f}x**)"

    rows = ([f"{point['prompt_tokens']:,}", *(cell(point["modes"][mode]) for mode in modes)] for point in points)
    return table(["prompt tokens", *map(label, modes)], rows)


def _parts(points: Sequence[dict[str, Any]], modes: Sequence[str]) -> str:
    known = {part for point in points for mode in modes for part in point["modes"][mode]["parts_s"]}
    parts = [part for part in PART_LABELS if part in known] + sorted(known - PART_LABELS.keys())
    rows = []
    for point in points:
        for mode in modes:
            taken = point["modes"][mode]["parts_s"]
            cells = (milliseconds(taken[part]) if part in taken else "" for part in parts)
            rows.append([f"{point['prompt_tokens']:,}", label(mode), *cells])
    return table(["prompt tokens", "mode", *(PART_LABELS.get(part, part.removesuffix("_s")) for part in parts)], rows)


def _steps(points: Iterable[dict[str, Any]]) -> str:
    rows = (
        [f"{point['prompt_tokens']:,}", *(milliseconds(point["steps_s"][step]["median"]) for step in STEPS)]
        for point in points
    )
    return table(["prompt tokens", *STEPS.values()], rows)


def _flops(points: Iterable[dict[str, Any]]) -> str:
    ways = {"paper": "paper's count", "with_attention": "with attention", "with_reuse": "with rotation"}
    header = ["prompt tokens"]
    for text in ways.values():
        header += [f"{text}: full", "blocks", "saved"]
    rows = []
    for point in points:
        flops = point["flops"]
        if flops is None:
            return "Not counted: the model's configuration does not say what it takes."
        row = [f"{point['prompt_tokens']:,}"]
        for way in ways:
            saved = flops["reduction_percent"][way]
            row += [f"{flops['full'][way]:.3g}", f"{flops['block'][way]:.3g}", f"{saved:.1f} %"]
        rows.append(row)
    return table(header, rows)


def decode(result: dict[str, Any]) -> list[str]:
    """Rates side by side."""
    settings = result["settings"]

    def rate(spread: dict[str, Any]) -> str:
        return f"**{spread['median']:.1f}** ({spread['min']:.1f} to {spread['max']:.1f})"

    rows = []
    for point in result["points"]:
        bound = point["bound_tokens_per_s"]
        rows.append(
            [
                f"{point['prompt_tokens']:,}",
                *(rate(way["tokens_per_s"]) for way in point["ways"].values()),
                f"{point['ratio']:.2f}x",
                "unknown" if bound is None else f"{bound:,.0f}",
                "yes" if point["same_tokens"] >= settings["new_tokens"] else f"first {point['same_tokens']}",
            ]
        )
    header = ["prompt tokens", "blockrag", "transformers", "ratio", "bound", "same tokens"]
    sections = [
        _heading(result, "Decoding"),
        "Tokens per second behind the same composed prompt, greedy: median (least to most) of "
        f"{settings['repeats']} answers of {settings['new_tokens']} tokens, taking turns. transformers is its own "
        "`generate` with `DynamicCache` and sdpa attention. The bound reads weights and cache once per token at this "
        "machine's copy bandwidth.",
        table(header, rows),
    ]
    batched = result.get("batches") or []
    if batched:
        rows = [
            [
                f"{one['prompt_tokens']:,}",
                str(one["batch_size"]),
                rate(one["tokens_per_s"]),
                f"{one['over_single']:.2f}x",
            ]
            for one in batched
        ]
        sections += [
            "## Several prompts at once",
            "Tokens per second of all prompts together, decoding only.",
            table(["prompt tokens", "prompts", "tokens per second", "over one by one"], rows),
        ]
    return sections


def compose(result: dict[str, Any]) -> list[str]:
    """Bandwidth by length and precision."""
    rows = [
        [
            point["precision"],
            f"{point['tokens']:,}",
            str(point["blocks"]),
            size(point["bytes_at_rest"]),
            size(point["cache_bytes"]),
            *(
                cell
                for way in ("request", "place")
                for cell in (
                    spread_cell(point["seconds"][way]),
                    f"{point['bytes_per_s'][way] / 1e9:.1f}",
                    f"{point['share_of_copy'][way]:.0%}",
                )
            ),
            f"{point['bytes_per_s']['copy'] / 1e9:.1f}",
        ]
        for point in result["points"]
    ]
    header = ["at rest", "tokens", "blocks", "read", "written"]
    header += ["as a request, ms", "GB/s", "of copy", "placing alone, ms", "GB/s", "of copy", "copy, GB/s"]
    return [
        _heading(result, "Composing"),
        "Blocks in memory to a prompt's cache. As a request: block keys, store, checksums, conversion, rotation, "
        "placing; placing alone: from blocks decoded before. GB/s counts bytes read at rest plus bytes written to the "
        "cache, of copy is the share of what a plain copy into the same rows reaches, counted the same way and "
        "measured in the same turns (its GB/s in the last column). Median (least to most).",
        table(header, rows),
    ]


def memory(result: dict[str, Any]) -> list[str]:
    """Peaks over the cache's bytes."""
    rows = [[one["step"], size(one["peak_bytes"]), f"{one['over_cache']:.2f}x"] for one in result["steps"]]
    return [
        _heading(result, "Memory"),
        "Peak of the resident set above what it was before the step, in a process of its own. A prompt of "
        f"{result['prompt_tokens']:,} tokens with {result['blocks']} passages, which take "
        f"{size(result['bytes_at_rest'])} at rest and {size(result['cache_bytes'])} in the cache; the model's weights "
        f"take {size(result['weight_bytes'])}.",
        table(["step", "peak", "over the cache's bytes"], rows),
    ]


def prebuild(result: dict[str, Any]) -> list[str]:
    """Tokens per second of each way."""
    bound = result["bound_tokens_per_s"]
    rows = []
    for name, way in result["ways"].items():
        rate = way["tokens_per_s"]
        rows.append(
            [
                name,
                spread_cell(way["seconds"]),
                f"**{rate['median']:,.0f}** ({rate['min']:,.0f} to {rate['max']:,.0f})",
                "unknown" if bound is None else f"{rate['median'] / bound:.0%}",
                milliseconds(way["processor_s"]["median"]),
            ]
        )
    settings = result["settings"]
    return [
        _heading(result, "Prebuilding"),
        f"{result['passages']} passages of 20 to 400 tokens, {result['tokens']:,} together, "
        f"{size(result['bytes_at_rest'])} at rest. Each way computes all of them anew, median (least to most) of "
        f"{settings['repeats']}, taking turns. *prebuild* is `BlockModel.materialize` to {settings['to']}: forwards, "
        "un-rotation, encoding, storing. *batched* is the forwards alone, without the language-model head, nothing "
        "kept, by padded tokens per forward. *one by one* is each passage alone through the whole model.",
        table(["way", "milliseconds", "tokens per second", "of the bound", "processor ms"], rows),
        f"Fastest runs: prebuilding reaches {result['of_batched']:.0%} of the best batched forward, and "
        f"{result['over_one_by_one']:.1f} times one passage at a time. The bound is the products with the weights "
        "that KV states need (of the last layer, keys and values alone), at this machine's matrix rate.",
    ]
