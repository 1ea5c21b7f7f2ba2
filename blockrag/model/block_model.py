"""`BlockModel`: a causal language model that composes its prompts from stored blocks.

It brings the parts of this package together: a model and tokenizer loaded and probed, a prompt template, a store for
KV states, and generation. It does not know about passages' embeddings, indexes or documents.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import logging
import warnings
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, overload

import torch

from blockrag.codec import Precision
from blockrag.errors import InputError, UnsupportedModelError
from blockrag.fingerprint import check_namespace
from blockrag.model.answer import Chunk, Generation
from blockrag.model.batch import BatchLimits, padding_error
from blockrag.model.blocks import BlockSource
from blockrag.model.choices import (
    Attention,
    checked_attention,
    checked_bytes,
    checked_on_miss,
    checked_precision,
    default_precision,
)
from blockrag.model.facts import BlockAttentionFacts, NotBlockFineTunedWarning
from blockrag.model.guard import ForwardGuard
from blockrag.model.identity import fingerprint_of
from blockrag.model.loading import resolve_device, resolve_dtype
from blockrag.model.materialize import MaterializeReport
from blockrag.model.misses import MissExplanation, MissNotes
from blockrag.model.oracle import oracle_logits
from blockrag.model.pool import BufferPool, PoolStats, memory_share
from blockrag.model.prefill import prefill_blocks
from blockrag.model.profile import ModelProfile, Regime, positions_of, room_within, structure_of
from blockrag.model.running import OnMiss, RunningPrompt
from blockrag.model.sampling import GenerationOptions
from blockrag.model.several import SeveralPrompts
from blockrag.model.stream import ResultStream
from blockrag.model.trained import TrainedRange
from blockrag.model.verification import tolerance, verified_profile
from blockrag.model.weights import LoadedWeights, load_identified
from blockrag.prompt import SegmentedPrompt, template_for
from blockrag.stores import MemoryStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from blockrag.fingerprint import Fingerprint
    from blockrag.kernels.at_rest import AtRest
    from blockrag.kv import BlockKV
    from blockrag.model.device_pool import DevicePool
    from blockrag.prompt import Block, PromptTemplate
    from blockrag.stores.protocol import BlockStore

T_co = TypeVar("T_co", covariant=True)
T = TypeVar("T")


class ClosableIterator(Protocol[T_co]):
    """An iterator that can be stopped early."""

    def __next__(self) -> T_co:
        """The next piece."""
        ...

    def close(self) -> None:
        """Stop."""
        ...


__all__ = ["Attention", "BlockModel"]

logger = logging.getLogger(__name__)

_DEFAULT_STORE_BYTES = 2 << 30
# On a CPU 512 to 4,096 tokens are within 4 % of each other, so that memory decides; a GPU wants more.
_BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
_BATCH_PROMPTS = 32


@dataclass(slots=True)
class _Shared:
    """What a model and its views in other namespaces have in common, also where it is replaced.

    Args:
        pool: The memory of finished prompts; what it keeps lies under the keys of blocks, which name the namespace.
        worker: The one thread on which the model's asynchronous calls run.
    """

    pool: BufferPool
    worker: ThreadPoolExecutor


class BlockModel:
    """A causal language model with block attention.

    Args:
        model: A transformers causal language model; its attention function is set to the fastest exact one.
        tokenizer: Its tokenizer.
        template: How prompts are built; by default the one the checkpoint was trained with, or the one its chat
            template implies.
        attention: "block" composes prompts from stored blocks; "full" prefills them whole. Every call can choose
            again; "full" here also loads models that cannot be composed.
        store: Where KV states are kept; by default 2 GiB of memory.
        precision: Precision at rest: "float32", "bfloat16", "float16", "int8" or "int4"; by default the computing
            dtype where it has 16 bits, and float16 where it has 32. docs/guide/storage-and-sizing.md says what int8 and
            int4 change.
        namespace: Blocks stored under one namespace are not found from another.
        facts: What is known of the checkpoint's block fine-tuning; `from_pretrained` reads it from the checkpoint.
        kept_bytes: Bytes of finished prompts whose passages stay composed for the next prompt that opens with the same
            ones in the same order; 0 for none. By default an eighth of the memory, on a host at most 4 GiB.
        device_pool: Where hot blocks stay on the model's GPU, as they are at rest; by default nowhere.
        on_miss: What to do where passages of a prompt are not stored: "compute" them, answer in "full" attention, or
            raise an "error". Every call can choose again.

    Raises:
        UnsupportedModelError: With attention="block", when the model's KV states cannot be composed exactly.
        InputError: An attention, precision or `on_miss` there is not.

    Warns:
        NotBlockFineTunedWarning: With attention="block", when the model is not known to be block-fine-tuned.
        BeyondTrainingWarning: Later, at the first prompt with more blocks or tokens than it was block-fine-tuned on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        template: PromptTemplate | None = None,
        attention: Attention = "block",
        store: BlockStore | None = None,
        precision: Precision | None = None,
        namespace: str = "",
        facts: BlockAttentionFacts | None = None,
        kept_bytes: int | None = None,
        device_pool: DevicePool[AtRest] | None = None,
        on_miss: OnMiss = "compute",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.attention = checked_attention(attention)
        self.facts = facts or BlockAttentionFacts()
        self.template = template or self.facts.template or template_for(tokenizer, name_or_path=tokenizer.name_or_path)
        self.store: BlockStore = MemoryStore(max_bytes=_DEFAULT_STORE_BYTES) if store is None else store
        self.precision: Precision = checked_precision(precision or default_precision(model.dtype))
        self.namespace = check_namespace(namespace)
        self.on_miss = checked_on_miss(on_miss)
        self._kept_bytes = checked_bytes(kept_bytes)
        self._weights: LoadedWeights | None = None
        self.device_pool = device_pool
        self._lock = ForwardGuard(model)
        if "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise UnsupportedModelError(
                f"{type(model).__name__} is not a causal language model of transformers 5: its forward takes no "
                "logits_to_keep; load it with AutoModelForCausalLM"
            )
        self._trained = TrainedRange(self.facts, self.name)
        self._shared = _Shared(self._new_pool(), ThreadPoolExecutor(1, thread_name_prefix="blockrag-model"))
        self.profile: ModelProfile | None = None
        try:
            self.profile = verified_profile(model)
        except UnsupportedModelError:
            if attention == "block":
                raise
            model.set_attn_implementation("eager")
        if attention == "block" and not self.facts.block_fine_tuned:
            warnings.warn(
                f"{self.name} is not known to be fine-tuned for block attention: without it, answers over composed "
                "passages lose much of their accuracy (arXiv 2409.15355, table 1: 71.3 to 50.0). Fine-tune it, use "
                'attention="full", or pass facts=BlockAttentionFacts(block_fine_tuned=True) if you know it is.',
                NotBlockFineTunedWarning,
                stacklevel=2,
            )

    @classmethod
    def from_pretrained(
        cls,
        id_or_path: str | Path,
        *,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: Attention = "block",
        template: PromptTemplate | None = None,
        store: BlockStore | None = None,
        precision: Precision | None = None,
        namespace: str = "",
        block_fine_tuned: bool | None = None,
        kept_bytes: int | None = None,
        device_pool: DevicePool[AtRest] | None = None,
        on_miss: OnMiss = "compute",
        revision: str | None = None,
    ) -> BlockModel:
        """Load a model from a directory or the Hugging Face hub.

        Args:
            id_or_path: A directory with a saved model, or a hub id.
            device: "auto" (CUDA when there is one), "cpu", "cuda", "cuda:1", ...
            dtype: "auto" (the checkpoint's own on a GPU, float32 on a CPU), "float32", "bfloat16" or "float16".
            attention: See `BlockModel`.
            template: See `BlockModel`.
            store: See `BlockModel`.
            precision: See `BlockModel`.
            namespace: See `BlockModel`.
            block_fine_tuned: Overrides what the checkpoint says of itself.
            kept_bytes: See `BlockModel`.
            device_pool: See `BlockModel`.
            on_miss: See `BlockModel`.
            revision: Branch, tag or commit on the hub.

        Raises:
            InputError: The model, device or dtype does not exist.
            UnsupportedModelError: See `BlockModel`.
        """
        placed = resolve_device(device)
        model, tokenizer, facts, weights = load_identified(
            id_or_path, device=placed, dtype=resolve_dtype(dtype, placed), revision=revision
        )
        if block_fine_tuned is not None:
            facts = replace(facts, block_fine_tuned=block_fine_tuned)
        loaded = cls(
            model,
            tokenizer,
            template=template,
            attention=attention,
            store=store,
            precision=precision,
            namespace=namespace,
            facts=facts,
            kept_bytes=kept_bytes,
            device_pool=device_pool,
            on_miss=on_miss,
        )
        loaded._weights = weights
        return loaded

    def in_namespace(self, namespace: str) -> BlockModel:
        """This model for another tenant: the same weights, store, memory and thread, and none of the same blocks.

        Blocks of one namespace are found from no other: not in the store, not among the prompts that stay composed or
        the blocks on the device, and not while another request computes them, for each of these goes by the block's
        key, which the namespace is part of. Views are cheap; two of one namespace share all of it.

        Args:
            namespace: What separates tenants; who knows it can compute the keys of its blocks. Empty for the space of
                all who name none.

        Raises:
            InputError: The name cannot be encoded.
        """
        check_namespace(namespace)
        if self.profile is not None:
            # Found once for all views: it reads the weights, and its threads, flights and notes are shared.
            view_source = replace(self._source, namespace=namespace)
        view = copy.copy(self)
        view.namespace = namespace
        if self.profile is not None:
            view.__dict__["_source"] = view_source
        return view

    @property
    def name(self) -> str:
        """The hub id or directory name the model was loaded from, or its class."""
        path = str(self.model.config._name_or_path or "")
        return (Path(path).name if Path(path).is_dir() else path) or type(self.model).__name__

    @cached_property
    def fingerprint(self) -> Fingerprint:
        """Everything that shapes this model's KV states; settled when it is first asked for, or blocks are stored.

        Reads all weights once, unless they were loaded from a checkpoint whose digest is known from an earlier time.
        Whoever changes the model afterwards (weights, adapters, their scale) makes a new `BlockModel` of it.
        """
        loaded = self._weights
        return fingerprint_of(
            self.model,
            self.tokenizer,
            self.template,
            self._composable(),
            self.precision,
            weights=loaded.digest if loaded is not None and loaded.still_of(self.model) else None,
        )

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the model's end-of-sequence tokens and stop strings that are one token."""
        ids: set[int] = set()
        for eos in (self.model.generation_config.eos_token_id, self.tokenizer.eos_token_id):
            ids.update(eos if isinstance(eos, (list, tuple)) else [] if eos is None else [eos])
        added = self.tokenizer.get_added_vocab()
        ids.update(added[text] for text in self.template.stop if text in added)
        return frozenset(ids)

    @property
    def context_window(self) -> int | None:
        """Most tokens of prompt and answer together: what can be placed exactly, or what the configuration says."""
        return positions_of(self.model) if self.profile is None else self.profile.max_tokens

    def room_after(self, prompt_tokens: int) -> int | None:
        """Tokens that may follow a prompt of that many tokens; None without limit.

        Raises:
            PromptTooLongError: The prompt itself does not fit.
        """
        if self.profile is None:
            return room_within(self.context_window, prompt_tokens)
        return self.profile.room_after(prompt_tokens)

    def block_key(self, token_ids: Sequence[int]) -> str:
        """The key under which `materialize` stores a block: 64 hexadecimal digits."""
        return self._source.key(token_ids, self._shortest_regime(len(token_ids)))

    def prefill(self, blocks: Sequence[Sequence[int]]) -> list[BlockKV]:
        """Compute blocks' KV states, batched; nothing is stored.

        Args:
            blocks: Token ids of each block, none of them empty.

        Returns:
            KV states with un-rotated keys, in the order of `blocks`, in the model's dtype on its device.

        Raises:
            InputError: A block is empty.
            PromptTooLongError: A block is longer than any prompt the model can place.
        """
        profile = self._composable()
        for index, block in enumerate(blocks):
            if not block:
                raise InputError(f"block {index} has no tokens; drop it")
            profile.room_after(len(block), what=f"block {index}")
        computed: dict[int, BlockKV] = {}
        for regime in profile.regimes:
            chosen = [index for index, block in enumerate(blocks) if self._shortest_regime(len(block)) is regime]
            with self._lock:
                for index, kv in prefill_blocks(
                    self.model, profile, regime, [blocks[i] for i in chosen], batch_tokens=self._batch_tokens
                ):
                    computed[chosen[index]] = kv
        return [computed[index] for index in range(len(blocks))]

    def materialize(
        self,
        blocks: Sequence[Block],
        store: BlockStore | None = None,
        *,
        on_block: Callable[[Block, bool, int], None] | None = None,
    ) -> MaterializeReport:
        """Make sure the store holds these blocks, computing only those it lacks.

        A model with two position regimes gets them in the regime of its shorter prompts; the first long prompt
        computes, and stores, those of the other.

        Args:
            blocks: Non-empty blocks; repeated ones count once.
            store: Where to keep them; by default the model's store.
            on_block: Called after each block with the block, whether it was stored already, and its new bytes.

        Returns:
            What was computed and what was there.

        Raises:
            PromptTooLongError: A block is longer than any prompt the model can place.
            StoreFullError: A block does not fit the store.
        """
        profile = self._composable()
        for block in blocks:
            profile.room_after(len(block.token_ids), what=f"the block of {block.source or block.kind!r}")
        target = self.store if store is None else store
        reports = []
        for regime in profile.regimes:
            chosen = [block for block in blocks if self._shortest_regime(len(block.token_ids)) is regime]
            reports.append(self._source.materialize(chosen, regime, target, on_block))
        return MaterializeReport.total(reports)

    @overload
    def generate(
        self,
        prompt: SegmentedPrompt,
        options: GenerationOptions | None = None,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
        reencode: bool = ...,
    ) -> Generation: ...

    @overload
    def generate(
        self,
        prompt: Sequence[SegmentedPrompt],
        options: GenerationOptions | None = None,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
        batch_size: int = ...,
        max_batch_bytes: int | None = None,
        reencode: bool = ...,
    ) -> list[Generation]: ...

    def generate(
        self,
        prompt: SegmentedPrompt | Sequence[SegmentedPrompt],
        options: GenerationOptions | None = None,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
        batch_size: int = _BATCH_PROMPTS,
        max_batch_bytes: int | None = None,
        reencode: bool = True,
    ) -> Generation | list[Generation]:
        """Answer one prompt, or each of several.

        The missing blocks of several prompts are computed together, once. Prompts of similar length then decode
        together, each with a sampler, a seed and stop strings of its own: its answer is the one it would get alone, up
        to the rounding of logits (1e-5 in float32). A model that cannot be composed, or does not heed a padding mask,
        answers them one after the other.
        Prompts that decode together neither find passages composed by an earlier prompt nor leave any behind.

        Args:
            prompt: One prompt or a sequence of them, from `BlockModel.template`.
            options: How to generate.
            attention: "block" or "full"; by default the model's.
            store: Where blocks are kept; by default the model's store.
            on_miss: What to do where passages are not stored; by default the model's. Unless that is "compute", prompts
                are answered one after the other.
            batch_size: Prompts that decode together at most.
            max_batch_bytes: Bytes their caches may take together; by default an eighth of the memory, on a host at most
                4 GiB. A prompt that needs more is answered by itself.
            reencode: False leaves every passage at the positions 0, 1, ...: the paper's ablation, which answers worse.

        Raises:
            PromptTooLongError: A prompt exceeds what the model can place; none is answered.
            MissingBlockError: With on_miss="error", a passage of any prompt is not stored, or a stored copy is damaged.
            NotFiniteError: The model computed NaN or infinity for a passage or a prompt.
            InputError: A limit is out of range.
        """
        if isinstance(prompt, SegmentedPrompt):
            return self.stream(
                prompt, options, attention=attention, store=store, on_miss=on_miss, reencode=reencode
            ).finish()
        nbytes = memory_share(self.model.device) if max_batch_bytes is None else max_batch_bytes
        limits = BatchLimits(prompts=batch_size, nbytes=nbytes)
        return self._generate_all(
            list(prompt),
            options or GenerationOptions(),
            self._mode(attention),
            store,
            limits,
            on_miss=self._on_miss(on_miss),
            reencode=reencode,
        )

    def stream(
        self,
        prompt: SegmentedPrompt,
        options: GenerationOptions | None = None,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
        reencode: bool = True,
    ) -> ResultStream[Chunk, Generation]:
        """Answer one prompt piece by piece; see `generate`. Nothing runs before the first piece is asked for."""
        mode = self._mode(attention)
        chosen = self._on_miss(on_miss)
        run = self._run(prompt, options or GenerationOptions(), mode, store, on_miss=chosen, reencode=reencode)
        return ResultStream(run)

    async def agenerate(
        self,
        prompt: SegmentedPrompt,
        options: GenerationOptions | None = None,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
    ) -> Generation:
        """`generate` for one prompt, on the model's worker thread."""
        stream = self.stream(prompt, options, attention=attention, store=store, on_miss=on_miss)
        async for _ in self.on_worker(stream):
            pass
        return stream.result

    async def astream(
        self,
        prompt: SegmentedPrompt,
        options: GenerationOptions | None = None,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
    ) -> AsyncIterator[Chunk]:
        """`stream`, on the model's worker thread; leaving the loop early frees the worker and the cache."""
        stream = self.stream(prompt, options, attention=attention, store=store, on_miss=on_miss)
        async for chunk in self.on_worker(stream):
            yield chunk

    def start(
        self,
        *,
        attention: Attention | None = None,
        store: BlockStore | None = None,
        on_miss: OnMiss | None = None,
        reencode: bool = True,
    ) -> RunningPrompt:
        """An empty running prompt, for conversations: extend it, let it answer, extend it again, close it."""
        mode = self._mode(attention)
        return RunningPrompt(
            model=self.model,
            tokenizer=self.tokenizer,
            source=None if mode == "full" and self.profile is None else self._source,
            store=self.store if store is None else store,
            pool=self._pool,
            device_pool=self.device_pool,
            lock=self._lock,
            stop_ids=self.stop_ids,
            trained=self._trained,
            reencode=reencode,
            on_miss=self._on_miss(on_miss),
        )

    async def on_worker(self, pieces: ClosableIterator[T]) -> AsyncIterator[T]:
        """Iterate over something that runs this model, one step at a time, on the model's worker thread.

        Leaving the loop early closes the iterator, behind a step that is still running.
        """
        loop = asyncio.get_running_loop()
        try:
            while (piece := await loop.run_in_executor(self._worker, next, pieces, None)) is not None:
                yield piece
        finally:
            self._worker.submit(pieces.close)

    def explain_misses(self, store: BlockStore | None = None, blocks: Sequence[Block] = ()) -> MissExplanation | None:
        """Why a store may have none of this model's blocks: in what it differs from the model that wrote there.

        The same is logged, once per store, when a prompt or an ingestion misses blocks.

        Args:
            store: The store; by default the model's.
            blocks: Blocks to look for under the other model's fingerprint, in this model's namespace.

        Returns:
            What changed; None if the store has been written for this model, or for none.

        Raises:
            StoreError: The store cannot be read.
        """
        target = self.store if store is None else store
        regime = self._composable().regimes[0]
        return self._source.explain_misses(target, regime, [block.token_ids for block in blocks])

    def prompt_memory(self) -> PoolStats:
        """What finished prompts left in memory: passages kept composed, and buffers in reserve."""
        return self._pool.stats()

    def forget_kept(self) -> None:
        """Free the memory of finished prompts; those in progress free theirs when they end.

        For when passages must not stay in memory after they were deleted. Answers do not depend on it: kept blocks are
        found by their token ids, so that what is kept is never out of date.
        """
        self._shared.pool = self._new_pool()
        if self.device_pool is not None:
            self.device_pool.clear()

    def reference_logits(self, blocks: Sequence[Block]) -> torch.Tensor:
        """Logits (tokens, vocabulary) of one forward under the dense block mask: the oracle, for tests."""
        with self._lock.exclusive:
            return oracle_logits(
                self.model,
                structure_of(self.model),
                [block.token_ids for block in blocks],
                [block.local for block in blocks],
            )

    def _run(
        self,
        prompt: SegmentedPrompt,
        options: GenerationOptions,
        attention: Attention,
        store: BlockStore | None,
        *,
        on_miss: OnMiss,
        reencode: bool,
    ) -> Generator[Chunk, None, Generation]:
        running = self.start(attention=attention, store=store, on_miss=on_miss, reencode=reencode)
        try:
            running.extend((prompt.as_full() if attention == "full" else prompt).blocks, room=options.max_new_tokens)
            return (yield from running.answer(options, prompt.stop))
        finally:
            running.close()

    def _generate_all(
        self,
        prompts: list[SegmentedPrompt],
        options: GenerationOptions,
        attention: Attention,
        store: BlockStore | None,
        limits: BatchLimits,
        *,
        on_miss: OnMiss,
        reencode: bool,
    ) -> list[Generation]:
        if attention == "full":
            prompts = [prompt.as_full() for prompt in prompts]
        stream = partial(
            self.stream, options=options, attention=attention, store=store, on_miss=on_miss, reencode=reencode
        )
        if self.profile is None:
            return [stream(prompt).finish() for prompt in prompts]
        several = SeveralPrompts(
            source=self._source,
            store=self.store if store is None else store,
            device_pool=self.device_pool,
            pool=self._pool,
            alone=lambda prompt: stream(prompt).finish(),
            start=partial(self.start, attention=attention, store=store, on_miss=on_miss, reencode=reencode),
            batches_exactly=lambda: self._batches_exactly,
        )
        return several.answer(prompts, options, limits, compose=attention == "block", on_miss=on_miss)

    @cached_property
    def _batches_exactly(self) -> bool:
        """Whether a prompt's answer does not depend on those beside it: measured before the first batch."""
        error, scale = padding_error(
            start=lambda: self.start(attention="full"), profile=self._composable(), pool=self._pool
        )
        if error <= tolerance(self.model) * scale:
            return True
        logger.warning(
            "%s answers prompts one after the other: beside another prompt its logits change by %.1e on a scale of "
            "%.1e, so it does not heed a padding mask",
            self.name,
            error,
            scale,
        )
        return False

    def _new_pool(self) -> BufferPool:
        share = memory_share(self.model.device)
        kept = share if self._kept_bytes is None else self._kept_bytes
        return BufferPool(max_bytes=max(share, kept), kept_bytes=kept)

    def _shortest_regime(self, num_tokens: int) -> Regime:
        """The regime of the shortest prompt that can hold a block of that many tokens and a question."""
        return self._composable().regime_for(num_tokens + 1)

    def _on_miss(self, on_miss: OnMiss | None) -> OnMiss:
        return self.on_miss if on_miss is None else checked_on_miss(on_miss)

    def _mode(self, attention: Attention | None) -> Attention:
        mode = self.attention if attention is None else checked_attention(attention)
        if mode == "block":
            self._composable()
        return mode

    def _composable(self) -> ModelProfile:
        if self.profile is None:
            raise UnsupportedModelError(
                f'{self.name} was loaded with attention="full" because its KV states cannot be composed; '
                'load it with attention="block" to see why'
            )
        return self.profile

    @cached_property
    def _source(self) -> BlockSource:
        return BlockSource(
            model=self.model,
            profile=self._composable(),
            precision=self.precision,
            namespace=self.namespace,
            batch_tokens=self._batch_tokens,
            lock=self._lock,
            notes=MissNotes(self.fingerprint),
        )

    @property
    def _pool(self) -> BufferPool:
        return self._shared.pool

    @property
    def _worker(self) -> ThreadPoolExecutor:
        return self._shared.worker

    @property
    def _batch_tokens(self) -> int:
        return _BATCH_TOKENS.get(self.model.device.type, _BATCH_TOKENS["cpu"])
