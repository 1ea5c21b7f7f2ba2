"""A running prompt: the cache of one conversation, its blocks, and the answers decoded from it.

`extend` takes blocks in order: a run of local blocks is fetched and composed, a global block goes through the model.
`answer` then decodes. Both can alternate, which is a conversation: nothing already in the cache is computed again.

The decoding loop is ours rather than `generate`: it streams without a thread (an abandoned stream simply stops), its
first token can be timed, and it cannot lose query tokens or drop the cache, as `generate` does in cases of its own.
The tests hold the two against each other.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import accumulate, groupby, takewhile
from typing import TYPE_CHECKING, Literal

import torch
from transformers.cache_utils import Cache, DynamicCache

from blockrag.compose import Composition
from blockrag.errors import PromptTooLongError
from blockrag.model.cache import BufferPool, PromptCache
from blockrag.model.detokenize import TextStream
from blockrag.model.sampling import GenerationOptions, Sampler
from blockrag.model.usage import GenerationTimings, Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from blockrag.model.blocks import BlockSource
    from blockrag.model.profile import Regime
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["Chunk", "FinishReason", "Generation", "RunningPrompt"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer: the text that became certain with `token_id` (possibly none); one chunk per token."""

    text: str
    token_id: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Args:
        text: The answer, without stop strings.
        token_ids: All tokens generated, the final end-of-sequence token included.
        finish_reason: "stop" (end of sequence or a stop string) or "length".
        usage: Counted work.
        timings: Measured seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: GenerationTimings


@dataclass(slots=True)
class RunningPrompt:
    """One prompt in progress.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        source: Computes and finds KV states; None for a model that can only attend in full.
        store: Where blocks are kept.
        pool: Where the cache's buffer comes from.
        lock: Held during every forward: some models change their frequencies in it.
        stop_ids: Tokens that end an answer.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: BlockSource | None
    store: BlockStore
    pool: BufferPool
    lock: AbstractContextManager[object]
    stop_ids: frozenset[int]
    usage: Usage = field(default_factory=Usage)
    timings: GenerationTimings = field(default_factory=GenerationTimings)
    token_ids: list[int] = field(default_factory=list)
    cache: Cache | None = None
    logits: torch.Tensor | None = None
    _regime: Regime | None = None
    _pending: list[int] = field(default_factory=list)
    # Tokens the cache has seen; recurrent caches cannot tell.
    _placed: int = 0
    _started: float = 0.0

    def extend(self, blocks: Sequence[Block], *, room: int) -> None:
        """Append blocks to the prompt; afterwards `logits` are those after the last global block.

        Args:
            blocks: Local blocks attend to themselves only; a global block sees everything before it.
            room: Tokens to make room for behind the blocks; no more than the model can place are reserved.

        Raises:
            PromptTooLongError: The prompt exceeds what the model can place.
        """
        self._started = time.perf_counter()
        self.usage, self.timings = Usage(), GenerationTimings()
        added = sum(len(block.token_ids) for block in blocks) + len(self._pending)
        limit = self._admit(len(self.token_ids) - len(self._pending) + added)
        if self.cache is None:
            self.cache = self._new_cache(blocks, added, room if limit is None else min(room, limit))
        for is_local, run in groupby(blocks, key=lambda block: block.local):
            if is_local:
                self._compose(list(run))
            else:
                for block in run:
                    self._forward_block(block.token_ids)

    def answer(self, options: GenerationOptions, stop: Sequence[str]) -> Generator[Chunk, None, Generation]:
        """Decode an answer; the generator's return value is the `Generation`.

        Args:
            options: How to generate.
            stop: The template's stop strings, besides the options' own.
        """
        limit = self._room_after(len(self.token_ids))
        budget = options.max_new_tokens if limit is None else min(limit, options.max_new_tokens)
        sampler = Sampler(options, self.model.device)
        stream = TextStream(self.tokenizer, (*stop, *options.stop))
        stop_ids = frozenset() if options.ignore_eos else self.stop_ids
        generated: list[int] = []
        reason: FinishReason = "length"
        first_token_at = 0.0
        while True:
            if self.logits is None:
                raise AssertionError("answer() needs a global block before it")
            token = sampler.choose(self.logits, self.token_ids)
            if not generated:
                first_token_at = time.perf_counter()
                self.timings.ttft_s = first_token_at - self._started
            generated.append(token)
            self.usage.new_tokens = len(generated)
            if token in stop_ids:
                # Not kept: the next turn's markup closes this one.
                reason = "stop"
                if rest := stream.finish():
                    yield Chunk(rest, token)
                break
            self.token_ids.append(token)
            self._pending = [token]
            text = stream.push(token)
            if stream.stopped or len(generated) >= budget:
                # The last token may complete a stop string and begin a character that never came.
                text += stream.finish()
                reason = "stop" if stream.stopped else "length"
                yield Chunk(text, token)
                break
            yield Chunk(text, token)
            self._forward(self._take_pending())
        if stream.stopped:
            self._forget(stream.tokens_hidden)
        self.timings.decode_s = time.perf_counter() - first_token_at
        return Generation(stream.text, tuple(generated), reason, self.usage, self.timings)

    def close(self) -> None:
        """Give the cache's buffer back. Safe to call twice."""
        if isinstance(self.cache, PromptCache):
            self.cache.release()
        self.cache = self.logits = None

    def _forget(self, count: int) -> None:
        """Take the last tokens back, those of a stop string: the next turn's markup says it again.

        A window may already have dropped what would be seen again; then they stay, which is exact as well.
        """
        in_cache = count - len(self._pending)
        if count < 1 or not isinstance(self.cache, PromptCache):
            return
        if in_cache > min(layer.forgettable for layer in self.cache.kv_layers):
            return
        self._pending = []
        for layer in self.cache.kv_layers:
            layer.crop(-in_cache)
        self._placed -= in_cache
        del self.token_ids[-count:]

    def _room_after(self, prompt_tokens: int) -> int | None:
        return None if self.source is None else self.source.profile.room_after(prompt_tokens)

    def _admit(self, prompt_tokens: int) -> int | None:
        """Check that a prompt of that many tokens can be placed; returns the tokens that may follow it."""
        room = self._room_after(prompt_tokens)
        if self.source is None:
            return room
        profile = self.source.profile
        regime = profile.regime_for(prompt_tokens)
        if self._regime is not None and regime is not self._regime:
            raise PromptTooLongError(
                f"this conversation grows to {prompt_tokens} tokens, past the {profile.regime_limit} up to which the "
                "model's short position factors hold; start a new conversation"
            )
        self._regime = regime
        return room

    def _new_cache(self, blocks: Sequence[Block], num_tokens: int, room: int) -> Cache:
        if self.source is None:
            return DynamicCache(config=self.model.config)
        leading = takewhile(lambda block: block.local, blocks)
        return PromptCache(
            self.source.profile.layout,
            self.source.profile.structure,
            capacity=num_tokens + room,
            skipped=sum(len(block.token_ids) for block in leading),
            dtype=self.model.dtype,
            device=self.model.device,
            pool=self.pool,
        )

    def _compose(self, blocks: list[Block]) -> None:
        """Fetch a run of local blocks and place them behind what the cache holds."""
        if self._pending:
            # The last turn's final token precedes the new passages.
            self._forward(self._take_pending())
        blocks = [block for block in blocks if block.token_ids]
        if not blocks:
            return
        if self.source is None or self._regime is None or not isinstance(self.cache, PromptCache):
            raise AssertionError("local blocks need a model that can compose")
        lengths = [len(block.token_ids) for block in blocks]
        starts = list(accumulate(lengths[:-1], initial=len(self.token_ids)))
        composition = Composition(self.cache, sum(lengths), self._regime.ropes)
        self.source.fetch(
            blocks,
            self._regime,
            self.store,
            partial(composition.place_at, starts),
            self.usage,
            self.timings,
            in_threads=composition.in_threads,
        )
        started = time.perf_counter()
        composition.finish()
        self.timings.compose_s += time.perf_counter() - started
        self.token_ids.extend(token for block in blocks for token in block.token_ids)
        self._placed += sum(lengths)

    def _forward_block(self, token_ids: Sequence[int]) -> None:
        if not token_ids:
            return
        started = time.perf_counter()
        tokens = [*self._take_pending(), *token_ids]
        # Recurrent models continue exactly by one token at a time only.
        step = 1 if self.source is None and self._placed else len(tokens)
        for first in range(0, len(tokens), step):
            self._forward(tokens[first : first + step])
        self.token_ids.extend(token_ids)
        self.usage.blocks_computed += 1
        self.usage.tokens_computed += len(token_ids)
        self.timings.query_prefill_s += time.perf_counter() - started

    @torch.no_grad()
    def _forward(self, token_ids: Sequence[int]) -> None:
        """Run tokens behind the cache; they see everything in it."""
        if self.cache is None:
            raise AssertionError("extend() opens the cache before anything runs")
        accepted = _forward_parameters(type(self.model).forward)
        device = self.model.device
        arguments: dict[str, object] = {
            # Models without attention have another name for the cache, and no positions.
            "past_key_values" if "past_key_values" in accepted else "cache_params": self.cache,
        }
        if "position_ids" in accepted:
            positions = torch.arange(self._placed, self._placed + len(token_ids), device=device)
            arguments["position_ids"] = positions[None]
        ids = torch.tensor([list(token_ids)], device=device)
        with self.lock:
            output = self.model(input_ids=ids, use_cache=True, logits_to_keep=1, **arguments)
        self._placed += len(token_ids)
        self.logits = output.logits[0, -1]

    def _take_pending(self) -> list[int]:
        pending, self._pending = self._pending, []
        return pending


@cache
def _forward_parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
