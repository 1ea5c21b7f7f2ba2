"""Computing blocks and storing them: prefill, encode, put.

A computed block is handed out as it reads back from the store, so that a request that had to compute it gets the same
states, to the bit, as every later one that finds it. Nothing here decides which blocks are missing for a prompt, or
looks into stored ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeAlias

from blockrag import codec
from blockrag.errors import InputError, NotFiniteError, StoreError, UnsafeStoreError
from blockrag.kv import BlockKV
from blockrag.model.overlap import overlapped
from blockrag.model.prefill import plan_batches, prefill_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.codec import Precision
    from blockrag.model.profile import ModelProfile, Regime
    from blockrag.prompt import Block
    from blockrag.quantize import StoredKV
    from blockrag.stores.protocol import BlockStore

__all__ = ["BlockWriter", "MaterializeReport"]

logger = logging.getLogger(__name__)

_Computed: TypeAlias = BlockKV | bytearray


@dataclass(frozen=True, slots=True)
class MaterializeReport:
    """What `BlockModel.materialize` did: blocks computed and stored, and blocks that were stored already."""

    blocks_new: int
    blocks_reused: int
    tokens_new: int
    tokens_reused: int
    bytes_new: int

    @classmethod
    def total(cls, reports: Sequence[MaterializeReport]) -> MaterializeReport:
        """The sum of several."""
        return cls(*(sum(getattr(report, field.name) for report in reports) for field in fields(cls)))


class BeforeWriting(Protocol):
    """Is told of blocks that are about to be computed for a store."""

    def __call__(self, store: BlockStore, regime: Regime, blocks: Sequence[Sequence[int]]) -> None:
        """Prepare the store; a StoreError is treated as one of writing a block."""
        ...


@dataclass(frozen=True, slots=True)
class BlockWriter:
    """Computes blocks of one model and stores them.

    Args:
        model: The model, in evaluation mode.
        profile: Its profile.
        fingerprint: Digest of everything that shapes the model's KV states.
        precision: Precision at rest.
        batch_tokens: Padded tokens per prefill forward.
        lock: Held during every forward: some models change their frequencies in it.
        before: Called before blocks are written to a store: the store, the regime, and the blocks' token ids.
    """

    model: PreTrainedModel
    profile: ModelProfile
    fingerprint: str
    precision: Precision
    batch_tokens: int
    lock: AbstractContextManager[object]
    before: BeforeWriting | None = None

    def compute(
        self,
        missing: Sequence[tuple[str, Sequence[int]]],
        regime: Regime,
        store: BlockStore,
        *,
        must_store: bool = False,
        failures: list[StoreError] | None = None,
    ) -> Iterator[tuple[str, StoredKV, int]]:
        """Prefill, encode, store.

        Args:
            missing: Keys and token ids of the blocks, each key once.
            regime: How the model computes positions in the prompts the blocks are for.
            store: Where they go.
            must_store: Whether a block that the store refuses is an error; else it is logged.
            failures: Gets what the store refused.

        Yields:
            A key, the KV states as they read back, and the bytes at rest; in the order of the batches.
        """
        refused = [] if failures is None else failures
        for key, data in self._stored(missing, regime, store, must_store=must_store, failures=refused):
            kv = codec.view_encoded(data, layout=self.profile.layout)
            yield key, kv, len(data)

    def materialize(
        self,
        by_key: Mapping[str, Block],
        regime: Regime,
        store: BlockStore,
        on_block: Callable[[Block, bool, int], None] | None,
        *,
        must_store: bool = True,
        failures: list[StoreError] | None = None,
    ) -> MaterializeReport:
        """Store the blocks that the store lacks; see `BlockModel.materialize`.

        With `must_store=False` a block that the store refuses is logged, added to `failures`, and not an error; where
        the store cannot say what it has, nothing is done.
        """
        refused = [] if failures is None else failures
        try:
            stored = store.contains_many(by_key)
        except UnsafeStoreError:
            raise
        except StoreError as error:
            if must_store:
                raise
            refused.append(error)
            logger.warning("no blocks are computed ahead, because the store cannot say which it has: %s", error)
            return MaterializeReport(0, 0, 0, 0, 0)
        for key, block in by_key.items():
            if key in stored and on_block is not None:
                on_block(block, True, 0)
        missing = [(key, block.token_ids) for key, block in by_key.items() if key not in stored]
        bytes_new = 0
        for key, data in self._stored(missing, regime, store, must_store=must_store, failures=refused):
            bytes_new += len(data)
            if on_block is not None:
                on_block(by_key[key], False, len(data))
        tokens_new = sum(len(ids) for _, ids in missing)
        return MaterializeReport(
            blocks_new=len(missing),
            blocks_reused=len(stored),
            tokens_new=tokens_new,
            tokens_reused=sum(len(by_key[key].token_ids) for key in stored),
            bytes_new=bytes_new,
        )

    def _stored(
        self,
        missing: Sequence[tuple[str, Sequence[int]]],
        regime: Regime,
        store: BlockStore,
        *,
        must_store: bool,
        failures: list[StoreError],
    ) -> Iterator[tuple[str, bytearray]]:
        """Keys and encoded blocks, each once the store has it; blocks are written while the next are computed."""
        batches = plan_batches([len(token_ids) for _, token_ids in missing], self.batch_tokens)

        def attempt(write: Callable[[], None], what: str) -> None:
            try:
                write()
            except UnsafeStoreError:
                raise
            except StoreError as error:
                if must_store:
                    raise
                # The answer does not need the store: it only loses the reuse.
                failures.append(error)
                if len(failures) == 1:
                    logger.warning("%s; further refusals are only counted: %s", what, error)

        def finish(computed: tuple[str, _Computed]) -> tuple[str, bytearray]:
            key, kv = computed
            data = self._encode(key, kv) if isinstance(kv, BlockKV) else kv
            attempt(lambda: store.put(key, data), f"block {key[:12]}... was computed but not stored")
            return key, data

        if missing and (before := self.before) is not None:
            blocks = [token_ids for _, token_ids in missing]
            attempt(lambda: before(store, regime, blocks), "the store does not note which model wrote to it")
        yield from overlapped((self._prefill([missing[i] for i in batch], regime) for batch in batches), finish)

    def _prefill(self, batch: Sequence[tuple[str, Sequence[int]]], regime: Regime) -> list[tuple[str, _Computed]]:
        """Keys and states of one batch: encoded already on a CPU, as the model computed them on a GPU.

        torch keeps a team of threads for each thread that calls it. Two teams on the same cores wait for each other:
        encoding in a second thread made prefill 1.5 times as long.
        """
        with self.lock:
            computed = prefill_batch(self.model, self.profile, regime, [token_ids for _, token_ids in batch])
        keys = [key for key, _ in batch]
        if self.model.device.type != "cpu":
            return list(zip(keys, computed, strict=True))
        # Each is let go once it is encoded: a batch is held once, not twice.
        computed.reverse()
        return [(key, self._encode(key, computed.pop())) for key in keys]

    def _encode(self, key: str, kv: BlockKV) -> bytearray:
        try:
            return codec.encode(kv, key=key, fingerprint=self.fingerprint, precision=self.precision)
        except InputError:
            try:
                # Out of float16's range: the header says per block what it is kept in.
                return codec.encode(kv, key=key, fingerprint=self.fingerprint, precision="float32")
            except InputError as error:
                # Nor does float32 hold it; the message names the layer.
                raise NotFiniteError(f"a block of {kv.num_tokens} tokens cannot be stored: {error}") from None
