"""A running prompt: the cache of one conversation, its blocks, and the answers decoded from it.

`extend` takes blocks in order: a run of local blocks is fetched and composed, a global block goes through the model.
`answer` then decodes. Both can alternate, which is a conversation: nothing already in the cache is computed again.
What happens where a passage is not stored is decided here, before the first token (`OnMiss`).

The decoding loop is ours rather than `generate`: it streams without a thread (an abandoned stream simply stops), its
first token can be timed, and it cannot lose query tokens or drop the cache, as `generate` does in cases of its own.
The tests hold the two against each other.

The passages a prompt opens with, composed, outlive it: they wait in the pool for a prompt that opens with the same
ones in the same order. What they hold depends on nothing but those passages, so that nobody can tell the difference.
"""

from __future__ import annotations

import inspect
import logging
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
from blockrag.errors import InputError, MissingBlockError, PromptTooLongError
from blockrag.model.answer import Chunk, Generation, OngoingAnswer
from blockrag.model.cache import PromptCache
from blockrag.model.profile import positions_of, room_within
from blockrag.model.usage import GenerationTimings, Usage
from blockrag.prompt import Block

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from blockrag.kernels.at_rest import AtRest
    from blockrag.model.blocks import BlockSource
    from blockrag.model.device_pool import DevicePool
    from blockrag.model.pool import BufferPool
    from blockrag.model.profile import Regime
    from blockrag.model.sampling import GenerationOptions
    from blockrag.model.trained import TrainedRange
    from blockrag.stores.protocol import BlockStore

__all__ = ["OnMiss", "RunningPrompt"]

logger = logging.getLogger(__name__)

OnMiss = Literal["compute", "full", "error"]
"""What to do where passages of a prompt are not stored, or their stored copies are damaged.

"compute": compute and store them. "full": answer in full attention. "error": raise MissingBlockError. Only passages
count: what else a prompt is made of (its prefix, turns, separators) is short, is nobody's to ingest, and is computed.
"""

# Questions about the same passages differ a little in length; the next one should fit where this one was.
_SLACK_TOKENS = 64


class _SameStore:
    """A store as part of a key: equal to itself alone. Who asks another store expects what only that one does."""

    __slots__ = ("_store",)

    def __init__(self, store: BlockStore) -> None:
        self._store = store

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _SameStore) and other._store is self._store

    def __hash__(self) -> int:
        return id(self._store)


@dataclass(frozen=True, slots=True)
class _Opening:
    """The run of local blocks a prompt opens with.

    Args:
        store: Where they came from.
        keys: The keys of its blocks, in order.
        num_tokens: Its tokens.
    """

    store: _SameStore
    keys: tuple[str, ...]
    num_tokens: int


@dataclass(slots=True)
class RunningPrompt:
    """One prompt in progress.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        source: Computes and finds KV states; None for a model that can only attend in full.
        store: Where blocks are kept.
        pool: Where the cache's buffer comes from.
        device_pool: Hot blocks on the model's device.
        lock: Held during every forward: some models change their frequencies in it.
        stop_ids: Tokens that end an answer.
        trained: What the model was block-fine-tuned on.
        reencode: Whether passages are moved to their positions in the prompt. Without it the keys of every local block
            stay at the positions 0, 1, ...: the paper's ablation ("w/o-pos"), of use for nothing but evaluation. Such a
            prompt neither finds composed passages nor leaves any.
        on_miss: What to do where a passage is not stored.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    source: BlockSource | None
    store: BlockStore
    pool: BufferPool
    device_pool: DevicePool[AtRest] | None
    lock: AbstractContextManager[object]
    stop_ids: frozenset[int]
    trained: TrainedRange
    reencode: bool = True
    on_miss: OnMiss = "compute"
    usage: Usage = field(default_factory=Usage)
    timings: GenerationTimings = field(default_factory=GenerationTimings)
    token_ids: list[int] = field(default_factory=list)
    cache: Cache | None = None
    logits: torch.Tensor | None = None
    _regime: Regime | None = None
    # What the cache begins with, once it does and where it may be kept.
    _opening: _Opening | None = None
    _pending: list[int] = field(default_factory=list)
    # Local blocks in the cache.
    _composed: int = 0
    # Tokens the cache has seen; recurrent caches cannot tell.
    _placed: int = 0
    _started: float = 0.0
    _first_token_at: float = 0.0
    _failed: bool = False

    def extend(self, blocks: Sequence[Block], *, room: int) -> None:
        """Append blocks to the prompt; afterwards `logits` are those after the last global block.

        Args:
            blocks: Local blocks attend to themselves only; a global block sees everything before it.
            room: Tokens to make room for behind the blocks; no more than the model can place are reserved.

        Raises:
            PromptTooLongError: The prompt exceeds what the model can place.
            MissingBlockError: A passage is not stored, with `on_miss="error"`.
            InputError: An earlier call failed halfway: what the cache holds is no prompt.

        Warns:
            BeyondTrainingWarning: It exceeds what the model was block-fine-tuned on.
        """
        if self._failed:
            raise InputError("an error left this prompt unfinished; close it and start another")
        self._started = time.perf_counter()
        self.usage, self.timings = Usage(), GenerationTimings()
        is_first = self.cache is None
        try:
            # Later on there is no way back from a block that turns out to be damaged: it is computed.
            self._extend(blocks, room, must_find=self.on_miss == "error" or (self.on_miss == "full" and is_first))
        except MissingBlockError as error:
            if is_first:
                self._start_over()
            if self.on_miss != "full":
                raise
            logger.warning("the question is answered in full attention: %s", error)
            spent = self.usage
            self.usage = Usage(
                blocks_missing=len(error.sources),
                blocks_damaged=spent.blocks_damaged,
                store_failures=spent.store_failures,
            )
            self._extend([_seen_whole(blocks)], room, must_find=False)

    def answer(self, options: GenerationOptions, stop: Sequence[str]) -> Generator[Chunk, None, Generation]:
        """Decode an answer; the generator's return value is the `Generation`.

        Args:
            options: How to generate.
            stop: The template's stop strings, besides the options' own.
        """
        answer = self.begin(options, stop)
        while True:
            chunk = self.step(answer)
            if chunk is not None:
                yield chunk
            if answer.finish_reason is not None:
                return self.finish(answer)
            self._forward(self.take_pending())

    def begin(self, options: GenerationOptions, stop: Sequence[str]) -> OngoingAnswer:
        """Start an answer whose forwards the caller runs; see `answer`."""
        limit = self._room_after(len(self.token_ids))
        return OngoingAnswer(
            options,
            stop,
            stop_ids=self.stop_ids,
            budget=options.max_new_tokens if limit is None else min(limit, options.max_new_tokens),
            tokenizer=self.tokenizer,
            device=self.model.device,
        )

    def step(self, answer: OngoingAnswer) -> Chunk | None:
        """Choose the next token from `logits`; it waits in `take_pending` for its forward."""
        if self.logits is None:
            raise AssertionError("an answer needs a global block before it")
        known = len(self.token_ids)
        chunk = answer.choose(self.logits, self.token_ids)
        self._pending = self.token_ids[known:]
        self.usage.new_tokens = len(answer.token_ids)
        if self.usage.new_tokens == 1:
            self._first_token_at = time.perf_counter()
            self.timings.ttft_s = self._first_token_at - self._started
        return chunk

    def finish(self, answer: OngoingAnswer) -> Generation:
        """The answer that `step` brought to its end."""
        if answer.finish_reason is None:
            raise AssertionError("the answer goes on")
        self._forget(answer.tokens_hidden)
        self.timings.decode_s = time.perf_counter() - self._first_token_at
        return Generation(answer.text, tuple(answer.token_ids), answer.finish_reason, self.usage, self.timings)

    def take_pending(self) -> list[int]:
        """The tokens that are part of the prompt and not yet in the cache; the caller puts them there."""
        pending, self._pending = self._pending, []
        return pending

    def close(self) -> None:
        """Give the cache's buffer back, with what the prompt opened with still in it. Safe to call twice."""
        if isinstance(self.cache, PromptCache):
            if self._opening is None:
                self.cache.release()
            else:
                self.cache.release(key=self._opening, tokens=self._opening.num_tokens)
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
        if self.source is None:
            return room_within(positions_of(self.model), prompt_tokens)
        return self.source.profile.room_after(prompt_tokens)

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

    def _extend(self, blocks: Sequence[Block], room: int, *, must_find: bool) -> None:
        """See `extend`; with `must_find`, a passage that is not stored is an error whenever it is noticed."""
        added = sum(len(block.token_ids) for block in blocks) + len(self._pending)
        tokens = len(self.token_ids) - len(self._pending) + added
        limit = self._admit(tokens)
        room = room if limit is None else min(room, limit)
        composed = self._composed + sum(block.local for block in blocks)
        leading: list[Block] = []
        if self.cache is None:
            leading = list(takewhile(lambda block: block.local, blocks))
            opening = self._opening_of(leading)
            if opening is not None and self._reopen(opening, leading, free=added - opening.num_tokens + room):
                blocks, leading = blocks[len(leading) :], []
        if self.on_miss != "compute":
            self._require_passages(blocks)
        self._failed = True
        self._composed = composed
        if composed:
            self.trained.check(blocks=composed, tokens=tokens)
        if self.cache is None:
            slack = 0 if opening is None else _SLACK_TOKENS
            room = room + slack if limit is None else min(room + slack, limit)
            self.cache = self._new_cache(sum(len(block.token_ids) for block in leading), added + room)
            self._compose(leading, must_find=must_find)
            self._opening, blocks = opening, blocks[len(leading) :]
        for is_local, run in groupby(blocks, key=lambda block: block.local):
            if is_local:
                self._compose(list(run), must_find=must_find)
            else:
                for block in run:
                    self._forward_block(block.token_ids)
        self._failed = False

    def _reopen(self, opening: _Opening, leading: Sequence[Block], *, free: int) -> bool:
        """Go on from a finished prompt that opened alike, if one is kept with room for `free` tokens more."""
        self.cache = PromptCache.reopened(self.pool, opening, free=free)
        if self.cache is None:
            return False
        self.token_ids.extend(token for block in leading for token in block.token_ids)
        self._placed = opening.num_tokens
        self.usage.blocks_reused = self.usage.blocks_kept = len(opening.keys)
        self.usage.tokens_reused = self.usage.tokens_kept = opening.num_tokens
        self._opening = opening
        return True

    def _start_over(self) -> None:
        """Be as empty as at first."""
        self.close()
        self.token_ids.clear()
        self._pending.clear()
        self._composed = self._placed = 0
        self._regime = self._opening = None
        self._failed = False

    def _require_passages(self, blocks: Sequence[Block]) -> None:
        """Make sure, before anything is computed, that the passages among some blocks are stored.

        Raises:
            MissingBlockError: They are not.
        """
        local = [block for block in blocks if block.local and block.token_ids]
        if local and self.source is not None and self._regime is not None:
            self.source.require_passages(local, self._regime, self.store, self.device_pool, self.usage)

    def _opening_of(self, leading: list[Block]) -> _Opening | None:
        source, regime = self.source, self._regime
        if source is None or regime is None or not self.pool.max_kept_bytes or not self.reencode:
            return None
        keys = tuple(source.key(block.token_ids, regime) for block in leading if block.token_ids)
        num_tokens = sum(len(block.token_ids) for block in leading)
        return _Opening(_SameStore(self.store), keys, num_tokens) if keys else None

    def _new_cache(self, skipped: int, capacity: int) -> Cache:
        if self.source is None:
            return DynamicCache(config=self.model.config)
        return PromptCache(
            self.source.profile.layout,
            self.source.profile.structure,
            capacity=capacity,
            skipped=skipped,
            dtype=self.model.dtype,
            device=self.model.device,
            pool=self.pool,
        )

    def _compose(self, blocks: list[Block], *, must_find: bool) -> None:
        """Fetch a run of local blocks and place them behind what the cache holds."""
        if self._pending:
            # The last turn's final token precedes the new passages.
            self._forward(self.take_pending())
        blocks = [block for block in blocks if block.token_ids]
        if not blocks:
            return
        if self.source is None or self._regime is None or not isinstance(self.cache, PromptCache):
            raise AssertionError("local blocks need a model that can compose")
        lengths = [len(block.token_ids) for block in blocks]
        starts = list(accumulate(lengths[:-1], initial=len(self.token_ids)))
        restarts = None if self.reencode else starts
        composition = Composition(self.cache, sum(lengths), self._regime.ropes, self.device_pool, restarts)
        self.source.fetch(
            blocks,
            self._regime,
            self.store,
            partial(composition.place_at, starts),
            partial(composition.place_pooled, starts),
            self.usage,
            self.timings,
            in_threads=composition.in_threads,
            must_find_passages=must_find,
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
        tokens = [*self.take_pending(), *token_ids]
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


def _seen_whole(blocks: Sequence[Block]) -> Block:
    """Blocks as the one global block that full attention sees."""
    seen = [block.as_global() for block in blocks]
    token_ids = tuple(token for block in seen for token in block.token_ids)
    return Block(token_ids, "".join(block.text for block in seen), local=False, kind="query")


@cache
def _forward_parameters(forward: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
