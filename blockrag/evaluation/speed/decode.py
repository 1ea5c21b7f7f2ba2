"""Tokens per second behind a composed prompt: blockrag's decoding loop against transformers' `generate`.

Both go on from the same KV states with greedy decoding: blockrag's own loop, cache and attention, and transformers'
`generate` with its `DynamicCache` and sdpa attention. A rate is the tokens after the first one over the time between
the first and the last, as each side hands them out, text included on blockrag's side. The ways take turns, and the
tokens of the two are compared. Several prompts at once follow: the time of a batch with long answers less that of the
same batch with answers of one token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from blockrag.errors import InputError
from blockrag.evaluation.speed.bounds import model_shape
from blockrag.evaluation.speed.forward import dynamic_cache, stock_attention
from blockrag.evaluation.speed.frame import Frame, Progress, spread, take_turns
from blockrag.evaluation.speed.machine import synchronize
from blockrag.evaluation.speed.prompts import PromptSettings, random_prompt
from blockrag.model.sampling import GenerationOptions
from blockrag.stores import MemoryStore

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from blockrag.evaluation.speed.machine import Rates
    from blockrag.evaluation.speed.shapes import Subject
    from blockrag.model.cache import PromptCache
    from blockrag.prompt import SegmentedPrompt

__all__ = ["DecodeSettings", "measure_decode"]

OURS, THEIRS = "blockrag", "transformers"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeSettings:
    """What to measure.

    Args:
        lengths: Tokens of each whole prompt.
        batch_lengths: Tokens of each prompt of a batch; empty leaves batches out.
        batch_sizes: Prompts decoded together.
        new_tokens: Tokens of each answer, at least two.
        repeats: Measured repeats per point.
        query_tokens: Tokens of the query.
        block_tokens: Least and most tokens of a passage.
        seed: Of the prompts.

    Raises:
        InputError: A number is not possible.
    """

    lengths: tuple[int, ...] = (512, 2048, 8192, 32768)
    batch_lengths: tuple[int, ...] = (512, 2048)
    batch_sizes: tuple[int, ...] = (1, 8)
    new_tokens: int = 32
    repeats: int = 3
    query_tokens: int = 50
    block_tokens: tuple[int, int] = (128, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.repeats, self.new_tokens - 1, *self.batch_sizes) < 1 or not self.lengths:
            raise InputError(
                f"repeats {self.repeats} and batch sizes {self.batch_sizes} must be at least 1, new tokens "
                f"{self.new_tokens} at least 2, and lengths not empty"
            )
        shortest = min(*self.lengths, *self.batch_lengths) if self.batch_lengths else min(self.lengths)
        if shortest <= self.query_tokens:
            raise InputError(
                f"a prompt of {shortest} tokens leaves no passage beside a query of {self.query_tokens}; "
                "pass greater lengths or a shorter query"
            )
        object.__setattr__(self, "lengths", tuple(sorted(set(self.lengths))))
        _ = self.prompts

    @property
    def prompts(self) -> PromptSettings:
        """What the prompts look like."""
        return PromptSettings(query_tokens=self.query_tokens, block_tokens=self.block_tokens, seed=self.seed)


@dataclass(frozen=True, slots=True)
class _Decoded:
    """One answer: its tokens, and when each of them came."""

    token_ids: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def tokens_per_s(self) -> float:
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def measure_decode(
    subject: Subject, settings: DecodeSettings, *, note: str = "", progress: Progress = lambda line: None
) -> dict[str, Any]:
    """Decoding rates at every length.

    Args:
        subject: The model.
        settings: What to measure.
        note: Kept with the result.
        progress: Told what is going on.

    Returns:
        The result; see docs/benchmarks.md for its keys.

    Raises:
        InputError: The model cannot place the longest prompt and its answer, or it has windowed layers.
    """
    subject.profile.room_after(max(*settings.lengths, *settings.batch_lengths, 0) + settings.new_tokens)
    if any(window is not None for window in subject.profile.structure.windows):
        raise InputError("decoding is compared for models without windowed layers only; choose another model")
    frame = Frame("decode", subject, settings, note, progress)
    frame.open()
    points = []
    for length in settings.lengths:
        progress(f"decode, {subject.name}: {length:,} tokens ...")
        prompt = random_prompt(subject.model, length, settings.prompts)
        samples = _measure_point(subject, settings, prompt, progress)
        points.append(_summary(prompt, samples))
        if points[-1]["same_tokens"] < settings.new_tokens:
            frame.warn(
                f"at {length:,} tokens the two differ from new token {points[-1]['same_tokens'] + 1} on: "
                f"nearly equal logits, rounded differently in {subject.model.model.dtype}"
            )
    batches = []
    for length in settings.batch_lengths:
        progress(f"decode, {subject.name}: batches of {length:,} tokens ...")
        batches += _measure_batches(subject, settings, length, progress)
    rates = frame.close()
    for point in points:
        point["bound_tokens_per_s"] = _bound(subject, point["prompt_tokens"] + settings.new_tokens / 2, rates)
    return frame.result(rates, points=points, batches=batches)


def _measure_point(
    subject: Subject, settings: DecodeSettings, prompt: SegmentedPrompt, progress: Progress
) -> dict[str, list[_Decoded]]:
    store = MemoryStore()
    subject.model.materialize(prompt.local_blocks, store)
    samples: dict[str, list[_Decoded]] = {}
    ways: dict[str, Callable[[], _Decoded]] = {
        OURS: lambda: _ours(subject, prompt, store, settings.new_tokens),
        THEIRS: lambda: _theirs(subject, prompt, store, settings.new_tokens),
    }

    def run(way: str, counts: bool) -> float:
        decoded = ways[way]()
        if counts:
            samples.setdefault(way, []).append(decoded)
        return decoded.times[-1] - decoded.times[0]

    take_turns(list(ways), run, repeats=settings.repeats, progress=progress)
    store.close()
    return {way: samples[way] for way in ways}


def _ours(subject: Subject, prompt: SegmentedPrompt, store: MemoryStore, new_tokens: int) -> _Decoded:
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
    ids, times = [], []
    for chunk in subject.model.stream(prompt, options, attention="block", store=store):
        times.append(_now(subject.device))
        ids.append(chunk.token_id)
    return _Decoded(tuple(ids), tuple(times))


def _theirs(subject: Subject, prompt: SegmentedPrompt, store: MemoryStore, new_tokens: int) -> _Decoded:
    model = subject.model.model
    arrivals = _Arrivals(subject.device)
    ids = torch.tensor([list(prompt.token_ids)], device=model.device)
    with stock_attention(model), _without_end(model):
        config = GenerationConfig(
            max_new_tokens=new_tokens, do_sample=False, use_cache=True, pad_token_id=0, disable_compile=True
        )
        cache = _copied_cache(subject, prompt, store)
        output = model.generate(ids, generation_config=config, past_key_values=cache, streamer=arrivals)
    return _Decoded(tuple(output[0, ids.shape[1] :].tolist()), tuple(arrivals.times))


def _measure_batches(
    subject: Subject, settings: DecodeSettings, length: int, progress: Progress
) -> list[dict[str, Any]]:
    """Tokens per second of all prompts together, by the number of prompts."""
    prompts = [
        random_prompt(subject.model, length, replace(settings.prompts, seed=settings.seed + number))
        for number in range(max(settings.batch_sizes))
    ]
    store = MemoryStore()
    subject.model.materialize([block for prompt in prompts for block in prompt.local_blocks], store)
    rates: dict[int, list[float]] = {size: [] for size in settings.batch_sizes}

    def seconds(size: int, new_tokens: int) -> float:
        options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
        # Twice what the prompts take, so that they are not split.
        room = 2 * size * subject.cache_bytes(length + new_tokens)
        started = _now(subject.device)
        answers = subject.model.generate(
            prompts[:size], options, attention="block", store=store, batch_size=size, max_batch_bytes=room
        )
        taken = _now(subject.device) - started
        if any(len(answer.token_ids) != new_tokens for answer in answers):
            raise RuntimeError(f"a batch of {size} gave answers of other lengths than {new_tokens} tokens")
        return taken

    def run(way: str, counts: bool) -> float:
        size = int(way)
        alone = seconds(size, 1)
        whole = seconds(size, settings.new_tokens)
        if counts:
            rates[size].append(size * (settings.new_tokens - 1) / max(whole - alone, 1e-9))
        return whole

    take_turns([str(size) for size in rates], run, repeats=settings.repeats, progress=progress)
    store.close()
    spreads = {size: spread(taken) for size, taken in rates.items()}
    smallest = spreads[min(spreads)]["median"] / min(spreads)
    return [
        {
            "prompt_tokens": length,
            "batch_size": size,
            "tokens_per_s": one,
            "over_single": one["median"] / smallest,
        }
        for size, one in spreads.items()
    ]


class _Arrivals(BaseStreamer):  # type: ignore[misc]
    """Notes when `generate` hands out each token; what comes first is the prompt."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._prompt_seen = False
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt, then with every token."""
        if self._prompt_seen:
            self.times.append(_now(self._device))
        self._prompt_seen = True

    def end(self) -> None:
        """Called behind the last token."""


@contextmanager
def _without_end(model: PreTrainedModel) -> Iterator[None]:
    """No token ends an answer; `generate` takes the model's own where its configuration names none."""
    original = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = None
    try:
        yield
    finally:
        model.generation_config.eos_token_id = original


def _copied_cache(subject: Subject, prompt: SegmentedPrompt, store: MemoryStore) -> DynamicCache:
    """The composed passages as transformers' own cache."""
    running = subject.model.start(attention="block", store=store)
    try:
        running.extend(list(takewhile(lambda block: block.local, prompt.blocks)), room=1)
        composed: PromptCache = running.cache  # type: ignore[assignment]
        return dynamic_cache([(layer.keys.clone(), layer.values.clone()) for layer in composed.kv_layers])
    finally:
        running.close()


def _now(device: str) -> float:
    synchronize(device)
    return time.perf_counter()


def _summary(prompt: SegmentedPrompt, samples: dict[str, list[_Decoded]]) -> dict[str, Any]:
    ways = {way: {"tokens_per_s": spread([one.tokens_per_s for one in taken])} for way, taken in samples.items()}
    return {
        "prompt_tokens": prompt.num_tokens,
        "ways": ways,
        "ratio": ways[OURS]["tokens_per_s"]["median"] / ways[THEIRS]["tokens_per_s"]["median"],
        "same_tokens": _same([one.token_ids for taken in samples.values() for one in taken]),
    }


def _same(answers: Sequence[tuple[int, ...]]) -> int:
    """Leading tokens that all answers share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*answers, strict=True)))


def _bound(subject: Subject, context: float, rates: Rates) -> float | None:
    """Tokens per second that reading the weights and the cache once per token allows."""
    shape = model_shape(subject)
    if shape is None:
        return None
    nbytes: float = shape.num_parameters * subject.model.model.dtype.itemsize + subject.cache_bytes(1) * context
    # A copy reads and writes every byte, this only reads.
    return 2 * rates.copy_bytes_per_s / nbytes
