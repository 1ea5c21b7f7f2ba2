"""From block to KV states: out of the store when it is there and sound, otherwise computed and stored.

A stored copy that fails verification is a miss: it is recomputed, replaced, counted and logged. How blocks are computed
and stored is said elsewhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag import codec
from blockrag.errors import DamagedBlockError
from blockrag.fingerprint import block_key
from blockrag.model.materialize import BlockWriter, MaterializeReport

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.codec import Precision
    from blockrag.kv import BlockKV
    from blockrag.model.profile import ModelProfile, Regime
    from blockrag.model.usage import GenerationTimings, Usage
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["BlockSource"]

logger = logging.getLogger(__name__)


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

    @property
    def writer(self) -> BlockWriter:
        """Computes and stores what is missing."""
        return BlockWriter(self.model, self.profile, self.fingerprint, self.precision, self.batch_tokens, self.lock)

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
        computed = self.writer.compute([(key, blocks[places[key][0]].token_ids) for key in missing], regime, store)
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
        return self.writer.materialize(by_key, regime, store, on_block, must_store=must_store)

    def _verified(self, key: str, data: memoryview, usage: Usage) -> BlockKV | None:
        try:
            return codec.decode(data, key=key, fingerprint=self.fingerprint, layout=self.profile.layout)
        except DamagedBlockError as error:
            usage.blocks_damaged += 1
            logger.warning("block %s... is recomputed: %s", key[:12], error)
            return None
