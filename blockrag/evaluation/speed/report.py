"""A result as files: JSON with every sample, Markdown, and plots where matplotlib is installed. It measures nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from blockrag.evaluation.speed import tables
from blockrag.evaluation.speed.text import count, place, rate

__all__ = ["Report", "markdown", "result_name", "write_report"]

_SECTIONS = {
    "ttft": tables.ttft,
    "decode": tables.decode,
    "prebuild": tables.prebuild,
    "compose": tables.compose,
    "memory": tables.memory,
}


@dataclass(frozen=True, slots=True)
class Report:
    """What was written.

    Args:
        text: The Markdown.
        files: All files, JSON and Markdown first.
        missing: How to get what could not be made; empty when nothing is missing.
    """

    text: str
    files: tuple[Path, ...]
    missing: str = ""


def result_name(result: dict[str, Any]) -> str:
    """The directory of a result among others, such as "ttft-tiny-15m-cpu"."""
    # A hub id has a slash in it.
    name = result["model"]["name"].replace("/", "--")
    return f"{result['benchmark']}-{name}-{result['machine']['device']}"


def write_report(result: dict[str, Any], output: Path) -> Report:
    """Write a result into a directory of its own; files of an earlier run are replaced.

    Args:
        result: What one of the benchmarks returned.
        output: Where the directory is made.
    """
    directory = output / result_name(result)
    directory.mkdir(parents=True, exist_ok=True)
    benchmark, text = result["benchmark"], markdown(result)
    files = [directory / f"{benchmark}.json", directory / f"{benchmark}.md"]
    files[0].write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    files[1].write_text(text, "utf-8")
    if find_spec("matplotlib") is None:
        return Report(text, tuple(files), "no plots: matplotlib is not installed; pip install 'blockrag[plot]'")
    from blockrag.evaluation.speed.plots import draw

    return Report(text, (*files, *draw(result, directory)))


def markdown(result: dict[str, Any]) -> str:
    """The tables of a result, and how it was measured."""
    sections = _SECTIONS[result["benchmark"]](result)
    warned = [f"**Warning: {warning}.**" for warning in result["warnings"]]
    return "\n\n".join([sections[0], *warned, *sections[1:], "## How it was measured", _provenance(result)]) + "\n"


def _provenance(result: dict[str, Any]) -> str:
    machine, rates, model, load = (result[name] for name in ("machine", "rates", "model", "load_average"))
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    commit = "blockrag as installed" if result["commit"] is None else f"commit {result['commit'][:12]}"
    busy = "" if result["busy_before"] is None else f"; {result['busy_before']:.0%} busy with other work before"
    upload = rates["upload_bytes_per_s"]
    lines = [
        f"`{result['command']}`",
        f"{result['date']}, {commit}{' with local changes' if result['modified'] else ''}; {versions}",
        f"{place(result)} of a machine with {machine['cores']} cores; load average {load['before']} before, "
        f"{load['after']} after{busy}; {result['duration_s']:.0f} s in all"
        + (f"; {result['note']}" if result["note"] else ""),
        f"measured before and after, the higher of the two: copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s, "
        f"matrix product {rate(rates['matrix_flops_per_s'])} in {model['compute_dtype']}"
        + (f", host to GPU {upload / 1e9:.1f} GB/s" if upload else ""),
        f"{count(model['parameters'])} parameters, {model['weights']}; {model['layers']} layers, "
        f"{model['attention_heads']} query and {model['kv_heads']} key heads; computes in {model['compute_dtype']}, "
        f"keeps {model['precision_at_rest']}; {model['kv_bytes_per_token_in_cache']:,} bytes per token in the cache",
    ]
    return "\n".join(f"- {line}" for line in lines)
