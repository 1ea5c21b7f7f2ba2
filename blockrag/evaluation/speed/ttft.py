"""Time to the first token, by prompt length: the whole prompt prefilled, or its passages composed from a store.

Every prompt is passages of random tokens and a query. The modes:

    full           attention="full": no block is reused, the prompt is prefilled whole
    stock          the same by transformers alone: its sdpa attention, its dynamic cache, torch's default products
    cold           block attention, empty store: every passage is computed, and put into a memory store
    disk-uncached  every passage in a directory; its files are dropped from the page cache before each request
    disk           every passage in a directory, read through the page cache
    memory         every passage in this process's memory
    pinned         every passage in page-locked memory, copied to the GPU while the query already runs
    device         every passage in the pool of hot blocks on the GPU
    kept           the same passages in the same order as in the prompt before: they are still composed
    seed           every passage in memory as tensors, composed as the method's published code does it (`seed.py`)

Stores given by URL add a mode each, named after their scheme. The modes take turns within each repeat. Beside the
times stand lower bounds from rates measured in the same run, the steps of a warm request measured one at a time, the
FLOPs, how fast the warm times grow with the prompt, and from which prompt on they are ahead of full prefill.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from blockrag.errors import InputError
from blockrag.evaluation.speed.bounds import Work
from blockrag.evaluation.speed.forward import stock_attention
from blockrag.evaluation.speed.frame import Frame, Progress, crossing, slope, spread, take_turns
from blockrag.evaluation.speed.prompts import PromptSettings, random_prompt
from blockrag.evaluation.speed.retrieval import RandomIndex
from blockrag.evaluation.speed.seed import SeedBlocks, seed_can_compose
from blockrag.evaluation.speed.steps import measure_steps, stored_blocks
from blockrag.evaluation.speed.stores import ComparedStores
from blockrag.evaluation.speed.ways import FirstToken, composed, drop_page_cache, seeded, stock_prefilled
from blockrag.stores import MemoryStore

if TYPE_CHECKING:
    from blockrag.evaluation.speed.machine import Rates
    from blockrag.evaluation.speed.shapes import Subject
    from blockrag.prompt import SegmentedPrompt
    from blockrag.stores.protocol import BlockStore

__all__ = ["LENGTHS", "MODES", "TtftSettings", "available_modes", "measure_ttft"]

LENGTHS = (50, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""The lengths of the paper's table (arXiv 2409.15355, table 3)."""
MODES = ("full", "stock", "cold", "seed", "disk-uncached", "disk", "memory", "pinned", "device", "kept")

_GPU_MODES = ("pinned", "device")
# No block is composed.
_WHOLE = ("full", "stock")
_GROWTH = range(1024, 32768 + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TtftSettings:
    """What to measure.

    Args:
        lengths: Tokens of each whole prompt.
        modes: Of `MODES`.
        once: Modes that run a single time, without warming up: those that take minutes.
        repeats: Measured repeats per point.
        query_tokens: Tokens of the query.
        block_tokens: Least and most tokens of a passage.
        passages: Passages of the index that is searched; 0 leaves retrieval out.
        seed: Of prompts and vectors.

    Raises:
        InputError: A number or name is not possible.
    """

    lengths: tuple[int, ...] = LENGTHS
    modes: tuple[str, ...] = MODES
    once: tuple[str, ...] = ()
    repeats: int = 5
    query_tokens: int = 50
    block_tokens: tuple[int, int] = (128, 256)
    passages: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [mode for mode in (*self.modes, *self.once) if mode not in MODES]
        if unknown:
            raise InputError(f"there is no mode {unknown[0]!r}; use some of {','.join(MODES)}")
        if "kept" in self.once:
            raise InputError("the mode 'kept' repeats a prompt, so it cannot run once; leave it out of --once")
        if self.repeats < 1 or self.passages < 0 or not self.lengths:
            raise InputError(
                f"repeats {self.repeats} must be at least 1, passages {self.passages} at least 0, and lengths not empty"
            )
        if min(self.lengths) < self.query_tokens:
            raise InputError(
                f"a prompt of {min(self.lengths)} tokens leaves no place for a query of {self.query_tokens}; "
                "pass greater lengths or a shorter query"
            )
        if "disk-uncached" in self.modes and not hasattr(os, "posix_fadvise"):
            raise InputError("the mode 'disk-uncached' needs posix_fadvise, which this system lacks; leave it out")
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        object.__setattr__(self, "modes", tuple(mode for mode in MODES if mode in self.modes))
        _ = self.prompts

    @property
    def prompts(self) -> PromptSettings:
        """What the prompts look like."""
        return PromptSettings(query_tokens=self.query_tokens, block_tokens=self.block_tokens, seed=self.seed)


def available_modes() -> tuple[str, ...]:
    """`MODES`, without those that need what this system lacks."""
    lacking = () if torch.cuda.is_available() else _GPU_MODES
    if not hasattr(os, "posix_fadvise"):
        lacking = (*lacking, "disk-uncached")
    return tuple(mode for mode in MODES if mode not in lacking)


def measure_ttft(
    subject: Subject,
    settings: TtftSettings,
    *,
    stores: Sequence[str] = (),
    note: str = "",
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Times to the first token at every length.

    Args:
        subject: The model.
        settings: What to measure.
        stores: URLs of stores to measure as well; what is put there is taken out again. The URLs are not kept with
            the result.
        note: Kept with the result.
        progress: Told what is going on.

    Returns:
        The result; see docs/benchmarks.md for its keys.

    Raises:
        InputError: The model cannot place the longest prompt, or a store cannot be opened.
        RuntimeError: A mode reused another number of tokens than it should, or chose another first token.
    """
    subject.profile.room_after(max(settings.lengths))
    if subject.device == "cpu" and (needing := [mode for mode in _GPU_MODES if mode in settings.modes]):
        raise InputError(f"the mode {needing[0]!r} needs --device cuda; leave it out of --modes")
    frame = Frame("ttft", subject, settings, note, progress)
    frame.open()
    if "seed" in settings.modes and not seed_can_compose(subject.profile):
        frame.warn("this model rotates or windows in ways the published code does not handle: no mode 'seed'")
    raw: list[_Point] = []
    fills_disk = not {"disk", "disk-uncached"}.isdisjoint(settings.modes)
    with ComparedStores.opened(stores, fills_disk=fills_disk) as opened, ExitStack() as stack:
        if warning := opened.warning():
            frame.warn(warning)
        index = RandomIndex(settings.passages, seed=settings.seed) if settings.passages else None
        if index is not None:
            stack.enter_context(closing(index))
        for length in settings.lengths:
            progress(f"ttft, {subject.name}: {length:,} tokens ...")
            point = _Point(random_prompt(subject.model, length, settings.prompts))
            _measure_point(subject, settings, opened, point, progress)
            if index is not None and 0 < len(point.blocks) <= settings.passages:
                point.search_s = index.search_s(len(point.blocks), repeats=settings.repeats)
            raw.append(point)
    rates = frame.close()
    points = [_summary(subject, point, rates) for point in raw]
    return frame.result(
        rates,
        storage={"filesystem": opened.filesystem},
        modes=list(points[0]["modes"]),
        points=points,
        growth=_growth(points, raw, rates, subject),
        break_even=_break_even(points),
    )


@dataclass(slots=True)
class _Point:
    """One prompt and what was measured on it."""

    prompt: SegmentedPrompt
    samples: dict[str, list[FirstToken]] = field(default_factory=dict)
    steps: dict[str, Any] = field(default_factory=dict)
    search_s: list[float] = field(default_factory=list)
    at_rest_bytes: int = 0

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(len(block) for block in self.prompt.local_blocks)


def _measure_point(
    subject: Subject, settings: TtftSettings, stores: ComparedStores, point: _Point, progress: Progress
) -> None:
    """All modes at one prompt length, then the steps of a warm request one at a time."""
    point.at_rest_bytes = stores.fill(subject.model, point.prompt.local_blocks)
    ways = _ways(subject, settings, stores, point)

    def run(mode: str, counts: bool) -> float:
        taken = ways[mode]()
        if counts:
            point.samples.setdefault(mode, []).append(taken)
        return taken.ttft_s

    take_turns(list(ways), run, repeats=settings.repeats, once=settings.once, progress=progress)
    point.samples = {mode: point.samples[mode] for mode in ways}
    _check_tokens(point.samples, exact=subject.model.model.dtype == torch.float32)
    # What the modes hold (of a long prompt and a large model, gigabytes) is not needed for the steps.
    ways.clear()
    point.steps = measure_steps(subject, point.prompt, stores.memory, repeats=settings.repeats)


def _ways(
    subject: Subject, settings: TtftSettings, stores: ComparedStores, point: _Point
) -> dict[str, Callable[[], FirstToken]]:
    """What each mode does, in the order of `MODES`, those of the given stores behind."""
    model, prompt, local = subject.model, point.prompt, sum(point.blocks)

    def block(store: BlockStore, reused: int = local) -> FirstToken:
        return composed(model, prompt, store, attention="block", reused=reused)

    def uncached() -> FirstToken:
        drop_page_cache(stores.directory)
        return block(stores.disk)

    def stock() -> FirstToken:
        with stock_attention(model.model):
            return stock_prefilled(model, prompt)

    ways: dict[str, Callable[[], FirstToken]] = {
        "full": lambda: composed(model, prompt, stores.memory, attention="full", reused=0),
        "stock": stock,
        "cold": lambda: block(MemoryStore(), 0),
        "disk-uncached": uncached,
        "disk": lambda: block(stores.disk),
        "memory": lambda: block(stores.memory),
    }
    if "pinned" in settings.modes:
        pinned = MemoryStore(pinned=True)
        for key, data in stores.memory.get_many(list({model.block_key(one.token_ids) for one in prompt.local_blocks})):
            if data is not None:
                pinned.put(key, data)
        ways["pinned"] = lambda: block(pinned)
    if "device" in settings.modes:
        # Filled by the round that does not count.
        pooling = subject.again(pool_bytes=2 * point.at_rest_bytes + (1 << 20)).model
        ways["device"] = lambda: composed(pooling, prompt, stores.memory, attention="block", reused=local)
    if "kept" in settings.modes:
        keeping = subject.again(keeps=True).model
        ways["kept"] = lambda: composed(keeping, prompt, stores.memory, attention="block", reused=local)
    if "seed" in settings.modes and seed_can_compose(subject.profile):
        blocks = SeedBlocks(model.model, subject.profile, stored_blocks(subject, prompt, stores.memory))

        def seed() -> FirstToken:
            with stock_attention(model.model):
                return seeded(model, prompt, blocks)

        ways["seed"] = seed
    chosen = {mode: ways[mode] for mode in settings.modes if mode in ways}
    return chosen | {name: partial(block, store) for name, store in stores.others.items()}


def _check_tokens(samples: Mapping[str, Sequence[FirstToken]], *, exact: bool) -> None:
    """Composing gives one first token, wherever the blocks come from; in float32 also the published way."""
    composing = {mode: {one.token_id for one in taken} for mode, taken in samples.items() if mode not in _WHOLE}
    if not exact:
        composing.pop("seed", None)
    if len(set().union(*composing.values())) > 1:
        raise RuntimeError(f"composing gave different first tokens: {composing}")


def _summary(subject: Subject, point: _Point, rates: Rates) -> dict[str, Any]:
    """One entry of the result's "points"."""
    work = _work(subject, point)
    bounds = {} if work is None else _bounds(work, rates, list(point.samples))
    modes = {
        mode: {
            "ttft_s": spread([one.ttft_s for one in taken]),
            "processor_s": spread([one.processor_s for one in taken]),
            "parts_s": {part: statistics.median(one.parts_s[part] for one in taken) for part in taken[0].parts_s},
            "first_token": taken[0].token_id,
            "bound_s": bounds.get(mode),
        }
        for mode, taken in point.samples.items()
    }
    return {
        "prompt_tokens": point.prompt.num_tokens,
        "blocks": len(point.blocks),
        "bytes_at_rest": point.at_rest_bytes,
        "cache_bytes": subject.cache_bytes(sum(point.blocks)),
        "modes": modes,
        **{f"{whole}_over": {m: _ratios(modes, whole, m) for m in ("ttft_s", "processor_s")} for whole in _WHOLE},
        "steps_s": point.steps,
        "search_s": spread(point.search_s) if point.search_s else None,
        "flops": None if work is None else work.flops(),
    }


def _work(subject: Subject, point: _Point) -> Work | None:
    query = point.prompt.num_tokens - sum(point.blocks)
    return Work.of(subject, point.blocks, query, point.at_rest_bytes)


def _bounds(work: Work, rates: Rates, modes: Sequence[str]) -> dict[str, float]:
    others = {
        "full": work.full_s(rates),
        "stock": work.full_s(rates),
        "cold": work.cold_s(rates),
        "kept": work.query_s(rates),
        "device": work.warm_s(replace(rates, upload_bytes_per_s=None)),
        # Its blocks lie in memory as they go into the cache.
        "seed": work.warm_s(rates, at_rest_bytes=work.cache_bytes),
    }
    return {mode: others.get(mode, work.warm_s(rates)) for mode in modes}


def _ratios(modes: dict[str, dict[str, Any]], whole: str, measure: str) -> dict[str, float]:
    """How many times as long as each other mode one that prefills the whole prompt takes, by medians."""
    medians = {mode: entry[measure]["median"] for mode, entry in modes.items()}
    return {mode: medians[whole] / median for mode, median in medians.items() if mode != whole and whole in medians}


def _growth(points: Sequence[dict[str, Any]], raw: Sequence[_Point], rates: Rates, subject: Subject) -> dict[str, Any]:
    """Seconds per token by which each warm mode grows between 1K and 32K tokens, beside what arithmetic gives."""
    chosen = [(point, one) for point, one in zip(points, raw, strict=True) if point["prompt_tokens"] in _GROWTH]
    lengths = [point["prompt_tokens"] for point, _ in chosen]
    works = [work for _, one in chosen if (work := _work(subject, one)) is not None]
    modes = {}
    for mode in raw[0].samples:
        taken = slope(lengths, [point["modes"][mode]["ttft_s"]["median"] for point, _ in chosen])
        if mode in (*_WHOLE, "cold") or taken is None:
            continue
        bound = slope(lengths, [_growing_s(work, mode, rates) for work in works]) if works else None
        over = None if bound is None else taken / bound
        modes[mode] = {"s_per_token": taken, "bound_s_per_token": bound, "over_bound": over}
    return {"lengths": lengths, "modes": modes}


def _growing_s(work: Work, mode: str, rates: Rates) -> float:
    read = {"kept": None, "seed": work.cache_bytes}.get(mode, work.at_rest_bytes)
    return work.growing_s(rates, read_bytes=read)


def _break_even(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """From which prompt on each mode is ahead of full prefill, between the lengths measured with passages."""
    chosen = [point for point in points if point["blocks"]]
    if not chosen or "full" not in chosen[0]["modes"]:
        return {}
    lengths = [point["prompt_tokens"] for point in chosen]
    medians = {mode: [point["modes"][mode]["ttft_s"]["median"] for point in chosen] for mode in chosen[0]["modes"]}
    return {
        "shortest_measured": lengths[0],
        "prompt_tokens": {
            mode: crossing(lengths, medians["full"], taken) for mode, taken in medians.items() if mode not in _WHOLE
        },
    }
