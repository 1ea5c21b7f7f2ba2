"""The ways to a first token: one request each, timed from the call to the token.

Everything a request pays is inside the time (keys, store, checks, conversion, rotation, forward, sampling, text);
opening stores and dropping pages is not. Nothing here repeats or summarises.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

from transformers.cache_utils import DynamicCache

from blockrag.evaluation.speed.forward import query_logits
from blockrag.evaluation.speed.machine import synchronize
from blockrag.model.sampling import GenerationOptions
from blockrag.model.usage import GenerationTimings, Usage

if TYPE_CHECKING:
    from collections.abc import Mapping

    from blockrag.evaluation.speed.seed import SeedBlocks
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.prompt import SegmentedPrompt
    from blockrag.stores.protocol import BlockStore

__all__ = ["FirstToken", "composed", "drop_page_cache", "seeded", "stock_prefilled"]

_ONE_TOKEN = GenerationOptions(max_new_tokens=1, ignore_eos=True)
# Not parts of the way to the first token.
_WHOLES = {"ttft_s", "decode_s"}
# The parts that a request which composes by itself can name.
_SEED_PARTS = ("compose_s", "query_prefill_s")


@dataclass(frozen=True, slots=True)
class FirstToken:
    """One request up to its first token.

    Args:
        token_id: The token.
        ttft_s: Wall-clock seconds.
        processor_s: Processor seconds of all threads.
        parts_s: Wall-clock seconds by step, "other_s" being the rest.
    """

    token_id: int
    ttft_s: float
    processor_s: float
    parts_s: Mapping[str, float]


@dataclass(slots=True)
class _Stopwatch:
    """Wall-clock and processor seconds since it was made, once everything given to the device has ended."""

    device: str
    _started: float = field(init=False)
    _processor: float = field(init=False)

    def __post_init__(self) -> None:
        synchronize(self.device)
        self._started, self._processor = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        synchronize(self.device)
        return time.perf_counter() - self._started, time.process_time() - self._processor


def composed(
    model: BlockModel, prompt: SegmentedPrompt, store: BlockStore, *, attention: Attention, reused: int | None
) -> FirstToken:
    """One request through `BlockModel.stream`.

    Args:
        model: The model.
        prompt: The prompt.
        store: Where its blocks are, or go.
        attention: "block" or "full".
        reused: Tokens that must come from the store: losing a block would make this another measurement. None skips
            the check.

    Raises:
        RuntimeError: Another number of tokens was reused.
    """
    stream = model.stream(prompt, _ONE_TOKEN, attention=attention, store=store)
    watch = _Stopwatch(str(model.model.device.type))
    chunk = next(stream)
    ttft_s, processor_s = watch.read()
    generation = stream.finish()
    _check(generation.usage, prompt, reused)
    parts = {
        one.name: float(getattr(generation.timings, one.name))
        for one in fields(GenerationTimings)
        if one.name not in _WHOLES
    }
    # Block keys, opening the cache, sampling, decoding the token to text.
    parts["other_s"] = ttft_s - sum(parts.values())
    return FirstToken(chunk.token_id, ttft_s, processor_s, parts)


def seeded(model: BlockModel, prompt: SegmentedPrompt, blocks: SeedBlocks) -> FirstToken:
    """One request the published way; run it under `stock_attention`."""
    query = prompt.blocks[-1].token_ids
    device = str(model.model.device.type)
    watch = _Stopwatch(device)
    cache = blocks.compose()
    compose_s, _ = watch.read()
    logits = blocks.first_logits(query, cache)
    synchronize(device)
    query_prefill_s = watch.read()[0] - compose_s
    token_id = int(logits.argmax())
    ttft_s, processor_s = watch.read()
    parts = dict(zip(_SEED_PARTS, (compose_s, query_prefill_s), strict=True))
    parts["other_s"] = ttft_s - sum(parts.values())
    return FirstToken(token_id, ttft_s, processor_s, parts)


def stock_prefilled(model: BlockModel, prompt: SegmentedPrompt) -> FirstToken:
    """One request as transformers serves it by itself: the whole prompt at once; run it under `stock_attention`."""
    token_ids = [token for block in prompt.as_full().blocks for token in block.token_ids]
    watch = _Stopwatch(str(model.model.device.type))
    token_id = int(query_logits(model.model, DynamicCache(config=model.model.config), token_ids, 0).argmax())
    ttft_s, processor_s = watch.read()
    return FirstToken(
        token_id, ttft_s, processor_s, {**dict.fromkeys(_SEED_PARTS, 0.0), "query_prefill_s": ttft_s, "other_s": 0.0}
    )


def drop_page_cache(directory: Path) -> None:
    """Let the kernel drop the pages of a store's block files (posix_fadvise(2), POSIX_FADV_DONTNEED)."""
    for path in directory.rglob("*"):
        # Closing a file of an open SQLite database here would release the locks its connection holds on it.
        if not path.is_file() or ".db" in path.name:
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


def _check(usage: Usage, prompt: SegmentedPrompt, reused: int | None) -> None:
    if reused is not None and (usage.tokens_reused != reused or usage.prompt_tokens != prompt.num_tokens):
        raise RuntimeError(f"{usage.tokens_reused} tokens of {usage.prompt_tokens} were reused, {reused} expected")
