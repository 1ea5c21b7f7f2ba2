"""Time to the first token, by prompt length: the whole prompt prefilled, or its passages composed from a store.

    python benchmarks/ttft.py --shape tiny-15m --lengths 512 1024 2048 4096 8192 --repeats 5

Every prompt is passages of random tokens and a query, put through `BlockModel.stream` up to its first chunk, so that
everything a request pays is counted: keys, store, checks, conversion, rotation, forward, sampling, text. The modes:

    full           attention="full": no block is reused, the prompt is prefilled whole
    cold           block attention, empty store: every passage is computed, and put into a memory store
    disk-uncached  block attention, every passage in a directory; its files are dropped from the page cache before
    disk           block attention, every passage in a directory, read through the page cache
    memory         block attention, every passage in this process's memory

The modes take turns within each repeat, in an order that rotates, so that a slow minute of the machine does not fall
on one of them; the first round is dropped. Beside the times stand lower bounds from the copy and matrix rates
measured in the same run. Processor time is kept next to wall time: on a machine that others use it says what the work
takes without the waiting (that for the disk included), and `--clock processor` plots it.

JSON, a Markdown table and a plot go to `benchmarks/results/ttft-<shape>-<device>/`.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from machine import Rates, commit, describe_machine, load_average, measure_rates, synchronize, versions
from report import write_report
from shapes import SHAPES, build_model, random_prompt

from blockrag.evaluation.flops import ModelShape, flops_to_first_token
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.model.usage import GenerationTimings, Usage
from blockrag.prompt import SegmentedPrompt
from blockrag.stores import BlockStore, DiskStore, MemoryStore

__all__ = ["MODES", "main", "measure_point"]

MODES = ("full", "cold", "disk-uncached", "disk", "memory")
SCHEMA_VERSION = 1

_ONE_TOKEN = GenerationOptions(max_new_tokens=1, ignore_eos=True)
_PARTS = ("load_s", "compose_s", "block_prefill_s", "query_prefill_s")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write the three files, print the table."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    _check(parser, arguments)
    model = build_model(arguments.shape, device=arguments.device, seed=arguments.seed)
    load_before = load_average()
    rates = measure_rates(arguments.device, model.model.dtype)
    points = []
    with tempfile.TemporaryDirectory(prefix="blockrag-ttft-") as directory:
        for length in arguments.lengths:
            print(f"{arguments.shape}, {length} tokens ...", file=sys.stderr, flush=True)
            points.append(measure_point(model, arguments, length, rates, Path(directory) / str(length)))
    result = {
        "schema": SCHEMA_VERSION,
        "benchmark": "time to first token",
        "command": _command(arguments),
        **commit(),
        "note": arguments.note,
        "versions": versions(),
        "machine": describe_machine(arguments.device),
        "load_average": {"before": load_before, "after": load_average()},
        "rates": asdict(rates),
        "model": _describe_model(model, arguments.shape),
        "settings": {
            "modes": arguments.modes,
            "repeats": arguments.repeats,
            "query_tokens": arguments.query_tokens,
            "block_tokens": arguments.block_tokens,
            "seed": arguments.seed,
            "clock": arguments.clock,
        },
        "points": points,
    }
    name = f"ttft-{arguments.shape}-{arguments.device}"
    print(write_report(result, arguments.output / name))
    return 0


def measure_point(
    model: BlockModel, arguments: argparse.Namespace, length: int, rates: Rates, directory: Path
) -> dict[str, Any]:
    """All modes at one prompt length.

    Args:
        model: The model.
        arguments: The parsed command line.
        length: Tokens of the prompt.
        rates: What the machine reaches.
        directory: An empty or new directory for the disk store.

    Returns:
        One entry of the result's "points".
    """
    prompt = random_prompt(
        length,
        query_tokens=arguments.query_tokens,
        block_tokens=arguments.block_tokens,
        vocabulary=model.model.config.vocab_size,
        seed=arguments.seed + length,
    )
    memory, disk = MemoryStore(), DiskStore(directory)
    try:
        model.materialize(prompt.local_blocks, memory)
        model.materialize(prompt.local_blocks, disk)
        # Written back now, so that pages can be dropped later and no write disturbs a measurement.
        os.sync()
        stores: dict[str, Callable[[], BlockStore]] = {
            "full": lambda: memory,
            "cold": MemoryStore,
            "disk-uncached": lambda: _without_page_cache(disk, directory),
            "disk": lambda: disk,
            "memory": lambda: memory,
        }
        samples = _interleaved(model, prompt, {mode: stores[mode] for mode in arguments.modes}, arguments)
        at_rest = memory.stats().bytes
    finally:
        memory.close()
        disk.close()
    return _summarize(model, prompt, samples, rates, at_rest)


def _interleaved(
    model: BlockModel,
    prompt: SegmentedPrompt,
    stores: dict[str, Callable[[], BlockStore]],
    arguments: argparse.Namespace,
) -> dict[str, list[dict[str, float]]]:
    """Samples of each mode; the first round warms buffers and caches up and is dropped."""
    samples: dict[str, list[dict[str, float]]] = {mode: [] for mode in stores}
    first_tokens: set[int] = set()
    order = list(stores)
    for repeat in range(arguments.repeats + 1):
        for mode in order:
            token, sample = _first_token(model, prompt, mode, stores[mode](), arguments.device)
            if mode != "full":
                first_tokens.add(token)
            if repeat:
                samples[mode].append(sample)
        order = [*order[1:], order[0]]
    if len(first_tokens) > 1:
        raise RuntimeError(f"composing from different stores gave different first tokens: {sorted(first_tokens)}")
    return samples


def _first_token(
    model: BlockModel, prompt: SegmentedPrompt, mode: str, store: BlockStore, device: str
) -> tuple[int, dict[str, float]]:
    """Run one request to its first chunk; returns the token, and the seconds of the whole and its parts."""
    stream = model.stream(prompt, _ONE_TOKEN, attention="full" if mode == "full" else "block", store=store)
    synchronize(device)
    started, processor_started = time.perf_counter(), time.process_time()
    chunk = next(stream)
    synchronize(device)
    ttft_s, processor_s = time.perf_counter() - started, time.process_time() - processor_started
    generation = stream.finish()
    _check_usage(generation.usage, prompt, mode)
    return chunk.token_id, {"ttft_s": ttft_s, "processor_s": processor_s, **_parts(generation.timings, ttft_s)}


def _parts(timings: GenerationTimings, ttft_s: float) -> dict[str, float]:
    parts = {name: getattr(timings, name) for name in _PARTS}
    # Block keys, opening the cache, sampling, decoding the token to text.
    return {**parts, "other_s": ttft_s - sum(parts.values())}


def _check_usage(usage: Usage, prompt: SegmentedPrompt, mode: str) -> None:
    """A store that lost a block would make the mode another one."""
    local = sum(len(block) for block in prompt.local_blocks)
    expected = 0 if mode in ("full", "cold") else local
    if usage.tokens_reused != expected or usage.prompt_tokens != prompt.num_tokens:
        raise RuntimeError(f"mode {mode} reused {usage.tokens_reused} tokens of {usage.prompt_tokens}, not {expected}")


def _without_page_cache(store: BlockStore, directory: Path) -> BlockStore:
    """The store, once the kernel has dropped the pages of its files (posix_fadvise(2), POSIX_FADV_DONTNEED)."""
    for path in directory.rglob("*.val"):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)
    return store


def _summarize(
    model: BlockModel,
    prompt: SegmentedPrompt,
    samples: dict[str, list[dict[str, float]]],
    rates: Rates,
    at_rest: int,
) -> dict[str, Any]:
    bounds = _bounds(model, prompt, rates, at_rest)
    modes = {
        mode: {
            "ttft_s": _spread([sample["ttft_s"] for sample in taken]),
            "processor_s": _spread([sample["processor_s"] for sample in taken]),
            "parts_s": {part: statistics.median(sample[part] for sample in taken) for part in (*_PARTS, "other_s")},
            "bound_s": bounds[mode],
        }
        for mode, taken in samples.items()
    }
    return {
        "prompt_tokens": prompt.num_tokens,
        "blocks": len(prompt.local_blocks),
        "bytes_at_rest": at_rest,
        "cache_bytes": _cache_bytes(model, prompt),
        "modes": modes,
        "full_over": {measure: _ratios(modes, measure) for measure in ("ttft_s", "processor_s")},
    }


def _ratios(modes: dict[str, dict[str, Any]], measure: str) -> dict[str, float]:
    """How many times as long as each other mode the full prefill takes, by medians."""
    medians = {mode: entry[measure]["median"] for mode, entry in modes.items()}
    return {mode: medians["full"] / median for mode, median in medians.items() if mode != "full" and "full" in medians}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "iqr": upper - lower,
        "samples": list(values),
    }


def _bounds(model: BlockModel, prompt: SegmentedPrompt, rates: Rates, at_rest: int) -> dict[str, float]:
    """Seconds below which no implementation of a mode can be on this machine.

    Counted FLOPs at the matrix rate, or one read of the weights if that takes longer; composing adds one read of the
    blocks at rest and one write of the cache, at the copy rate, and on a GPU the blocks' way there. What a medium
    adds to a disk read is left out.
    """
    shape = ModelShape.from_config(model.model.config)
    blocks = [len(block) for block in prompt.local_blocks]
    query = prompt.num_tokens - sum(blocks)
    # A copy reads and writes every byte.
    bytes_per_s = 2 * rates.copy_bytes_per_s
    read_weights_s = (shape.num_parameters * model.model.dtype.itemsize) / bytes_per_s

    def compute_s(num_tokens: int, *, reused: int = 0, missed: Sequence[int] = ()) -> float:
        counted = flops_to_first_token(num_tokens=num_tokens, shape=shape, reused_tokens=reused, missed_blocks=missed)
        flops = counted.with_reuse if missed else counted.with_attention
        return float(max((flops or 0) / rates.matrix_flops_per_s, read_weights_s))

    warm = (at_rest + _cache_bytes(model, prompt)) / bytes_per_s + compute_s(query, reused=sum(blocks))
    if rates.upload_bytes_per_s is not None:
        warm += at_rest / rates.upload_bytes_per_s
    return {
        "full": compute_s(prompt.num_tokens),
        "cold": compute_s(query, missed=blocks),
        "disk-uncached": warm,
        "disk": warm,
        "memory": warm,
    }


def _cache_bytes(model: BlockModel, prompt: SegmentedPrompt) -> int:
    """Bytes of the passages' KV states in the prompt's cache."""
    if model.profile is None:
        raise AssertionError("build_model() returns a model that composes")
    local = sum(len(block) for block in prompt.local_blocks)
    return model.profile.layout.nbytes(local, model.model.dtype.itemsize)


def _describe_model(model: BlockModel, shape: str) -> dict[str, Any]:
    if model.profile is None:
        raise AssertionError("build_model() returns a model that composes")
    config = model.model.config
    return {
        "shape": shape,
        "weights": "random",
        "parameters": sum(parameter.numel() for parameter in model.model.parameters()),
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "attention_heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "compute_dtype": str(model.model.dtype).removeprefix("torch."),
        "precision_at_rest": model.precision,
        "kv_bytes_per_token_at_rest": model.profile.layout.nbytes(1, 4 if model.precision == "float32" else 2),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time to the first token, full prefill against composed blocks.")
    parser.add_argument("--shape", choices=SHAPES, default="tiny-15m", help="model shape (default: %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="(default: %(default)s)")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="prompt lengths in tokens"
    )
    parser.add_argument("--modes", choices=MODES, nargs="+", default=_default_modes(), help="(default: all)")
    parser.add_argument("--repeats", type=int, default=5, help="measured repeats per point (default: %(default)s)")
    parser.add_argument("--query-tokens", type=int, default=50, help="tokens of the query (default: %(default)s)")
    parser.add_argument(
        "--block-tokens",
        type=int,
        nargs=2,
        default=[128, 256],
        metavar=("LEAST", "MOST"),
        help="tokens of a passage (default: 128 256)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts (default: %(default)s)")
    parser.add_argument(
        "--clock", choices=("wall", "processor"), default="wall", help="what the plot shows (default: %(default)s)"
    )
    parser.add_argument("--note", default="", help='kept with the results, such as "shared machine"')
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results", help="where the results' directory is made"
    )
    return parser


def _default_modes() -> list[str]:
    return [mode for mode in MODES if mode != "disk-uncached" or hasattr(os, "posix_fadvise")]


def _check(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device; use --device cpu")
    if "disk-uncached" in arguments.modes and not hasattr(os, "posix_fadvise"):
        parser.error("--modes disk-uncached needs posix_fadvise, which this system lacks; leave it out")
    if min(arguments.repeats, arguments.query_tokens, arguments.block_tokens[0]) < 1:
        parser.error("--repeats, --query-tokens and --block-tokens must be at least 1")
    if arguments.clock == "processor" and (arguments.device != "cpu" or torch.get_num_threads() > 1):
        # Waiting threads spin, which counts as processor time.
        parser.error("--clock processor needs --device cpu and one thread; set OMP_NUM_THREADS=1")
    if arguments.block_tokens[1] < 2 * arguments.block_tokens[0]:
        parser.error(f"--block-tokens {arguments.block_tokens}: the most must be at least twice the least")
    if min(arguments.lengths) <= arguments.query_tokens:
        parser.error(
            f"--lengths {min(arguments.lengths)} leaves no passage beside {arguments.query_tokens} query tokens"
        )
    arguments.lengths = sorted(set(arguments.lengths))
    arguments.modes = [mode for mode in MODES if mode in arguments.modes]


def _command(arguments: argparse.Namespace) -> str:
    """The command that repeats the measurement; the output's place is this machine's own."""
    words = ["python benchmarks/ttft.py"]
    for name in ("shape", "device", "lengths", "modes", "repeats", "query_tokens", "block_tokens", "seed", "clock"):
        value = getattr(arguments, name)
        words.append(f"--{name.replace('_', '-')}")
        words.extend(str(one) for one in (value if isinstance(value, list) else [value]))
    return " ".join(words)


if __name__ == "__main__":
    sys.exit(main())
