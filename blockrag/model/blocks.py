"""From block to KV states: out of the store when it is there and sound, otherwise computed and stored.

This is the only place where store, codec and prefill meet. A stored copy that fails verification is a miss: it is
recomputed, replaced, counted and logged. A computed block is handed out as it reads back from the store, so that a
request that had to compute it gets the same states, to the bit, as every later one that finds it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from blockrag import codec
from blockrag.errors import DamagedBlockError, InputError, StoreError
from blockrag.fingerprint import block_key
from blockrag.model.prefill import prefill_blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.codec import Precision
    from blockrag.kv import BlockKV
    from blockrag.model.profile import ModelProfile, Regime
    from blockrag.model.usage import GenerationTimings, Usage
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["BlockSource", "MaterializeReport"]

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True, slots=True)
class BlockSource:
    """KV states of blocks for one model.

    Args:
        model: The model, in evaluation mode.
        profile: Its profile.
        fingerprint: Digest of everything that shapes the model's KV states.
        precision: Precision at rest.
        namespace: Blocks of one namespace are not found from another.
        batch_tokens: Padded tokens per prefill forward.
        lock: Held during every forward: some models change their frequencies in it.
    """

    model: PreTrainedModel
    profile: ModelProfile
    fingerprint: str
    precision: Precision
    namespace: str
    batch_tokens: int
    lock: AbstractContextManager[object]

    def key(self, token_ids: Sequence[int], regime: Regime) -> str:
        """The block's key: 64 hexadecimal digits."""
        return block_key(token_ids, fingerprint=self.fingerprint, regime=regime.name, namespace=self.namespace)

    def fetch(
        self,
        blocks: Sequence[Block],
        regime: Regime,
        store: BlockStore,
        usage: Usage,
        timings: GenerationTimings,
    ) -> Iterator[tuple[list[int], BlockKV]]:
        """The KV states of a prompt's local blocks; what is missing is computed and stored.

        Args:
            blocks: Non-empty blocks; the same one may come several times and is then read once.
            regime: The regime of the prompt.
            store: Where blocks are kept.
            usage: Counts are added to it.
            timings: Seconds of loading and prefilling are added to it.

        Yields:
            The places in `blocks` a block takes, and its KV states. Drop them before taking the next.
        """
        places: dict[str, list[int]] = {}
        for index, block in enumerate(blocks):
            places.setdefault(self.key(block.token_ids, regime), []).append(index)
        missing: list[str] = []
        found = store.get_many(list(places))
        while True:
            started = time.perf_counter()
            entry = next(found, None)
            if entry is None:
                break
            key, data = entry
            kv = None if data is None else self._verified(key, data, usage)
            timings.load_s += time.perf_counter() - started
            if kv is None:
                missing.append(key)
                continue
            usage.blocks_reused += len(places[key])
            usage.tokens_reused += kv.num_tokens * len(places[key])
            yield places[key], kv
            del kv, data, entry
        computed = self._compute([(key, blocks[places[key][0]].token_ids) for key in missing], regime, store)
        while True:
            started = time.perf_counter()
            result = next(computed, None)
            timings.block_prefill_s += time.perf_counter() - started
            if result is None:
                break
            key, kv, _ = result
            usage.blocks_computed += len(places[key])
            usage.tokens_computed += kv.num_tokens * len(places[key])
            yield places[key], kv

    def materialize(
        self,
        blocks: Sequence[Block],
        regime: Regime,
        store: BlockStore,
        on_block: Callable[[Block, bool, int], None] | None,
        *,
        must_store: bool = True,
    ) -> MaterializeReport:
        """Store the blocks that the store lacks; see `BlockModel.materialize`.

        With `must_store=False` a block that the store refuses is logged and not an error.
        """
        by_key = {self.key(block.token_ids, regime): block for block in blocks}
        stored = store.contains_many(by_key)
        for key, block in by_key.items():
            if key in stored and on_block is not None:
                on_block(block, True, 0)
        missing = [(key, block.token_ids) for key, block in by_key.items() if key not in stored]
        bytes_new = 0
        for key, _, nbytes in self._compute(missing, regime, store, must_store=must_store):
            bytes_new += nbytes
            if on_block is not None:
                on_block(by_key[key], False, nbytes)
        tokens_new = sum(len(ids) for _, ids in missing)
        return MaterializeReport(
            blocks_new=len(missing),
            blocks_reused=len(stored),
            tokens_new=tokens_new,
            tokens_reused=sum(len(by_key[key].token_ids) for key in stored),
            bytes_new=bytes_new,
        )

    def _verified(self, key: str, data: memoryview, usage: Usage) -> BlockKV | None:
        try:
            return codec.decode(data, key=key, fingerprint=self.fingerprint, layout=self.profile.layout)
        except DamagedBlockError as error:
            usage.blocks_damaged += 1
            logger.warning("block %s... is recomputed: %s", key[:12], error)
            return None

    def _compute(
        self,
        missing: Sequence[tuple[str, Sequence[int]]],
        regime: Regime,
        store: BlockStore,
        *,
        must_store: bool = False,
    ) -> Iterator[tuple[str, BlockKV, int]]:
        """Prefill, encode, store; yields the key, the states as they read back, and the bytes at rest."""
        ids = [token_ids for _, token_ids in missing]
        computed = prefill_blocks(self.model, self.profile, regime, ids, batch_tokens=self.batch_tokens)
        while True:
            with self.lock:
                result = next(computed, None)
            if result is None:
                return
            key, kv = missing[result[0]][0], result[1]
            data = self._encode(key, kv)
            try:
                store.put(key, data)
            except StoreError as error:
                if must_store:
                    raise
                # The answer does not need the store: it only loses the reuse.
                logger.warning("block %s... was computed but not stored: %s", key[:12], error)
            read_back = codec.decode(data, key=key, fingerprint=self.fingerprint, layout=self.profile.layout)
            yield key, read_back, len(data)

    def _encode(self, key: str, kv: BlockKV) -> bytearray:
        try:
            return codec.encode(kv, key=key, fingerprint=self.fingerprint, precision=self.precision)
        except InputError:
            # Out of float16's range (or not finite, which float32 refuses as well): the header says per block.
            return codec.encode(kv, key=key, fingerprint=self.fingerprint, precision="float32")
