"""The steps to a first token, one at a time, on the same blocks: what each of them costs by itself.

A request overlaps them (a thread reads, checks and places one block after another while its bytes are still in the
processor's cache), so these seconds say what a step would cost alone; they do not add up to a request.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from blockrag import codec
from blockrag.compose import Composition
from blockrag.evaluation.speed.frame import spread
from blockrag.evaluation.speed.machine import synchronize
from blockrag.model.cache import PromptCache
from blockrag.model.pool import BufferPool
from blockrag.model.readers import Dealer, Readers
from blockrag.model.sampling import GenerationOptions, Sampler

if TYPE_CHECKING:
    from blockrag.evaluation.speed.shapes import Subject
    from blockrag.prompt import SegmentedPrompt
    from blockrag.quantize import StoredKV
    from blockrag.stores.protocol import BlockStore

__all__ = ["STEPS", "Placer", "measure_steps", "stored_blocks"]

STEPS = {
    "keys_s": "block keys",
    "read_s": "read",
    "checksum_s": "checksum",
    "decode_s": "checksum and decode",
    "dequantise_s": "convert",
    "place_s": "convert, rotate, place",
    "forward_s": "query forward",
    "sampling_s": "sampling",
}


def measure_steps(subject: Subject, prompt: SegmentedPrompt, store: BlockStore, *, repeats: int) -> dict[str, Any]:
    """Seconds of each step of `STEPS`, every block's in a row.

    Args:
        subject: The model.
        prompt: Its blocks are in the store.
        store: Where they are.
        repeats: Samples per step; one more before them warms up.
    """
    model = subject.model
    encoded = _encoded(subject, prompt, store)
    blocks = [_decoded(subject, key, data) for key, data in encoded]
    placer = Placer(subject, blocks, room=1)
    scratch = torch.empty(
        max((block.num_tokens for block in blocks), default=0) * subject.layout.elements_per_token,
        dtype=model.model.dtype,
        device=model.model.device,
    )
    sampler, ids = Sampler(GenerationOptions(max_new_tokens=1), model.model.device), prompt.token_ids
    steps: dict[str, Callable[[], object]] = {
        "keys_s": lambda: [model.block_key(block.token_ids) for block in prompt.local_blocks],
        "read_s": lambda: _read(store, [key for key, _ in encoded]),
        "checksum_s": lambda: [codec.read_header(data) for _, data in encoded],
        "decode_s": lambda: [_decoded(subject, key, data) for key, data in encoded],
        "dequantise_s": partial(_convert, blocks, scratch),
        "place_s": placer.place,
    }
    times: dict[str, list[float]] = {name: [] for name in STEPS}
    try:
        for repeat in range(repeats + 1):
            for name, step in steps.items():
                _note(times[name], repeat, _timed(step, subject.device))
    finally:
        placer.close()
    for repeat in range(repeats + 1):
        running = model.start(attention="block", store=store)
        if blocks:
            running.extend(prompt.local_blocks, room=len(prompt.blocks[-1]) + 1)
        # The request's own forward, behind a cache that is there already.
        _note(times["forward_s"], repeat, _timed(partial(running.extend, prompt.blocks[-1:], room=1), subject.device))
        if running.logits is None:
            raise AssertionError("a query leaves logits")
        choose = partial(sampler.choose, running.logits, ids)
        _note(times["sampling_s"], repeat, _timed(choose, subject.device))
        running.close()
    return {name: spread(taken) for name, taken in times.items()}


def _note(times: list[float], repeat: int, seconds: float) -> None:
    """Keep a sample; the first of all repeats only warms up."""
    if repeat:
        times.append(seconds)


class Placer:
    """Places the same blocks into the same cache again and again.

    Args:
        subject: The model.
        blocks: KV states in prompt order, in host memory.
        room: Tokens to make room for behind them.
    """

    def __init__(self, subject: Subject, blocks: Sequence[StoredKV], *, room: int) -> None:
        starts = [sum(block.num_tokens for block in blocks[:index]) for index in range(len(blocks))]
        self._work = list(zip(blocks, starts, strict=True))
        self._tokens = sum(block.num_tokens for block in blocks)
        self._regime = subject.profile.regime_for(self._tokens + room)
        self._readers = Readers()
        self._new_cache = partial(
            PromptCache,
            subject.layout,
            subject.profile.structure,
            capacity=self._tokens + room,
            skipped=self._tokens,
            dtype=subject.model.model.dtype,
            device=subject.model.model.device,
            pool=BufferPool(max_bytes=0),
        )
        self.cache = self._new_cache()
        self._like: PromptCache | None = None

    def place(self) -> None:
        """Convert, rotate and place all blocks, in as many threads as a request uses."""
        for layer in self.cache.kv_layers:
            layer.reset()
        if not self._work:
            return
        composition = Composition(self.cache, self._tokens, self._regime.ropes)
        threads = min(self._readers.count, len(self._work)) if composition.in_threads else 1
        dealer = Dealer(self._work, threads)

        def place_some() -> None:
            while piece := dealer.take():
                for block, start in piece:
                    composition.place(block, start)

        self._readers.run([place_some] * threads)
        composition.finish()

    def copy(self) -> None:
        """Copy as many bytes into the same rows, from a cache like it, with torch: what placing is compared with."""
        if self._like is None:
            self._like = self._new_cache()
            for layer in self._like.kv_layers:
                for rows in layer.extend(self._tokens):
                    rows.zero_()
        for layer, like in zip(self.cache.kv_layers, self._like.kv_layers, strict=True):
            layer.keys.copy_(like.keys[:, :, -layer.keys.shape[2] :])
            layer.values.copy_(like.values[:, :, -layer.values.shape[2] :])

    def close(self) -> None:
        """Give the memory back."""
        self.cache.release()
        if self._like is not None:
            self._like.release()


def stored_blocks(subject: Subject, prompt: SegmentedPrompt, store: BlockStore) -> list[StoredKV]:
    """The KV states of a prompt's passages as they lie in a store, in prompt order.

    Raises:
        RuntimeError: The store lacks one.
    """
    return [_decoded(subject, key, data) for key, data in _encoded(subject, prompt, store)]


def _encoded(subject: Subject, prompt: SegmentedPrompt, store: BlockStore) -> list[tuple[str, memoryview]]:
    """Key and bytes of every passage, in prompt order."""
    keys = [subject.model.block_key(block.token_ids) for block in prompt.local_blocks]
    found = dict(store.get_many(list(dict.fromkeys(keys))))
    encoded = []
    for key in keys:
        data = found[key]
        if data is None:
            raise RuntimeError(f"the store lost block {key}; give it room for the whole prompt")
        encoded.append((key, data))
    return encoded


def _read(store: BlockStore, keys: Sequence[str]) -> None:
    # Each dropped before the next one comes, as in a request.
    for _ in store.get_many(list(dict.fromkeys(keys))):
        pass


def _decoded(subject: Subject, key: str, data: memoryview) -> StoredKV:
    return codec.decode(data, key=key, fingerprint=subject.model.fingerprint.digest, layout=subject.layout)


def _convert(blocks: Sequence[StoredKV], scratch: torch.Tensor) -> None:
    """To the computing dtype, block after block into the same memory, without finding its place."""
    for block in blocks:
        offset = 0
        for layer in range(block.layout.num_layers):
            for states in (block.keys(layer), block.values(layer)):
                scratch[offset : offset + states.numel()].view(states.shape).copy_(states)
                offset += states.numel()


def _timed(step: Callable[[], object], device: str) -> float:
    synchronize(device)
    started = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - started
