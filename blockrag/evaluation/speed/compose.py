"""Bytes per second that composing moves: blocks read at rest, a prompt's cache written.

The KV states are random numbers, encoded once per precision into a memory store; nothing runs through the model, so
that long prompts of large models need no prefill. Two figures per point: composing as a request does it (block keys,
store, checksums, conversion, rotation, placing), and placing alone, from blocks that were decoded before. Both stand
beside the bandwidth of a plain copy measured in the same run, counted the same way: bytes read plus bytes written.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

import torch

from blockrag import codec
from blockrag.codec import Precision
from blockrag.errors import InputError
from blockrag.evaluation.speed.frame import Frame, Progress, spread, take_turns
from blockrag.evaluation.speed.machine import synchronize
from blockrag.evaluation.speed.prompts import PromptSettings, random_blocks, random_prompt
from blockrag.evaluation.speed.steps import Placer
from blockrag.kv import BlockKV
from blockrag.stores import MemoryStore

if TYPE_CHECKING:
    from blockrag.evaluation.speed.machine import Rates
    from blockrag.evaluation.speed.shapes import Subject
    from blockrag.prompt import Block
    from blockrag.quantize import StoredKV

__all__ = ["ComposeSettings", "measure_compose"]

_WAYS = ("request", "place", "copy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ComposeSettings:
    """What to measure.

    Args:
        lengths: Tokens of the passages together.
        precisions: At rest.
        large_blocks: Blocks of the additional case at the greatest length: few and large; 0 leaves it out.
        repeats: Measured repeats per point.
        block_tokens: Least and most tokens of a passage.
        seed: Of lengths, tokens and KV states.

    Raises:
        InputError: A number or name is not possible.
    """

    lengths: tuple[int, ...] = (2048, 8192, 32768)
    precisions: tuple[Precision, ...] = get_args(Precision)
    large_blocks: int = 2
    repeats: int = 7
    block_tokens: tuple[int, int] = (128, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [precision for precision in self.precisions if precision not in get_args(Precision)]
        if unknown:
            raise InputError(f"there is no precision {unknown[0]!r}; use some of {','.join(get_args(Precision))}")
        if self.repeats < 1 or self.large_blocks < 0 or not self.lengths or min(self.lengths) < 1:
            raise InputError(
                f"repeats {self.repeats} and lengths {self.lengths} must be at least 1, large blocks "
                f"{self.large_blocks} at least 0"
            )
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        _ = self.prompts

    @property
    def prompts(self) -> PromptSettings:
        """What the prompts look like."""
        return PromptSettings(query_tokens=1, block_tokens=self.block_tokens, seed=self.seed)


def measure_compose(
    subject: Subject, settings: ComposeSettings, *, note: str = "", progress: Progress = lambda line: None
) -> dict[str, Any]:
    """Composing at every length and precision, with many blocks and with few large ones.

    Args:
        subject: The model.
        settings: What to measure.
        note: Kept with the result.
        progress: Told what is going on.

    Returns:
        The result; see docs/benchmarks.md for its keys.

    Raises:
        InputError: The model cannot place the longest prompt.
    """
    subject.profile.room_after(max(settings.lengths) + 1)
    frame = Frame("compose", subject, settings, note, progress)
    frame.open()
    cases = [
        (length, random_prompt(subject.model, length + 1, settings.prompts).local_blocks) for length in settings.lengths
    ]
    if settings.large_blocks:
        longest = max(settings.lengths)
        size = longest // settings.large_blocks
        cases.append((longest, tuple(random_blocks(subject.model, [size] * settings.large_blocks, seed=settings.seed))))
    points = []
    for precision in settings.precisions:
        kept = subject.again(precision=precision)
        for length, blocks in cases:
            progress(f"compose, {subject.name}: {length:,} tokens in {len(blocks)} blocks, {precision} ...")
            points.append(_measure_point(kept, blocks, settings, progress))
    rates = frame.close()
    for point in points:
        _add_rates(point, rates)
    return frame.result(rates, points=points)


def _measure_point(
    subject: Subject, blocks: Sequence[Block], settings: ComposeSettings, progress: Progress
) -> dict[str, Any]:
    samples: dict[str, list[float]] = {way: [] for way in _WAYS}
    tokens = sum(len(block) for block in blocks)
    with closing(MemoryStore()) as store:
        decoded = _fill(subject, blocks, store, settings.seed)
        at_rest = store.stats().bytes
        placer = Placer(subject, decoded, room=1)
        timed = {
            "request": lambda: _request_s(subject, blocks, store),
            "place": lambda: _seconds(subject, placer.place),
            # Into the very memory of the cache: how fast that is depends on where the memory lies.
            "copy": lambda: _seconds(subject, placer.copy),
        }

        def run(way: str, counts: bool) -> float:
            seconds = timed[way]()
            if counts:
                samples[way].append(seconds)
            return seconds

        try:
            take_turns(_WAYS, run, repeats=settings.repeats, progress=progress)
        finally:
            placer.close()
    return {
        "tokens": tokens,
        "blocks": len(blocks),
        "precision": subject.model.precision,
        "bytes_at_rest": at_rest,
        "cache_bytes": subject.cache_bytes(tokens),
        "seconds": {way: spread(taken) for way, taken in samples.items()},
    }


def _fill(subject: Subject, blocks: Sequence[Block], store: MemoryStore, seed: int) -> list[StoredKV]:
    """Put random KV states of the blocks into a store; returns them as they read back."""
    generator = torch.Generator().manual_seed(seed)
    fingerprint = subject.model.fingerprint.digest
    decoded = []
    for block in blocks:
        elements = subject.layout.elements_per_token * len(block)
        kv = BlockKV(subject.layout, len(block), torch.randn(elements, generator=generator))
        key = subject.model.block_key(block.token_ids)
        store.put(key, codec.encode(kv, key=key, fingerprint=fingerprint, precision=subject.model.precision))
        data = store.get(key)
        if data is None:
            raise AssertionError("a memory store without a budget keeps what it is given")
        decoded.append(codec.decode(data, key=key, fingerprint=fingerprint, layout=subject.layout))
    return decoded


def _request_s(subject: Subject, blocks: Sequence[Block], store: MemoryStore) -> float:
    """Seconds of a request's way from token ids to a composed cache."""
    running = subject.model.start(attention="block", store=store)
    synchronize(subject.device)
    started = time.perf_counter()
    running.extend(blocks, room=1)
    synchronize(subject.device)
    seconds = time.perf_counter() - started
    reused = running.usage.blocks_reused
    running.close()
    if reused != len(blocks):
        raise RuntimeError(f"{reused} of {len(blocks)} blocks came from the store")
    return seconds


def _seconds(subject: Subject, action: Callable[[], None]) -> float:
    synchronize(subject.device)
    started = time.perf_counter()
    action()
    synchronize(subject.device)
    return time.perf_counter() - started


def _add_rates(point: dict[str, Any], rates: Rates) -> None:
    """Bytes per second, and the share of the bandwidth of a plain copy into the same memory in the same turns."""
    moved = point["bytes_at_rest"] + point["cache_bytes"]
    seconds = {way: taken["median"] for way, taken in point["seconds"].items()}
    copied = seconds.pop("copy")
    copy = 2 * point["cache_bytes"] / copied
    point["bound_s"] = moved / (2 * rates.copy_bytes_per_s)
    point["bytes_per_s"] = {"copy": copy, **{way: moved / taken for way, taken in seconds.items()}}
    point["share_of_copy"] = {way: moved / taken / copy for way, taken in seconds.items()}
