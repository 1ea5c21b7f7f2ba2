"""From blocks to KV states, for one model: what they are called, where they are found, who computes them.

Ties together the key of a block, `Fetch` (finding), `BlockWriter` (computing and storing) and `MissNotes` (saying why
blocks are missing).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from blockrag.errors import MissingBlockError, StoreError, UnsafeStoreError
from blockrag.fingerprint import block_key
from blockrag.model.fetch import Fetch
from blockrag.model.inflight import InFlight
from blockrag.model.materialize import BlockWriter, MaterializeReport
from blockrag.model.readers import Readers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.codec import Precision
    from blockrag.kernels.at_rest import AtRest
    from blockrag.model.device_pool import DevicePool
    from blockrag.model.fetch import Place, PlacePooled
    from blockrag.model.misses import KeyUnder, MissExplanation, MissNotes
    from blockrag.model.profile import ModelProfile, Regime
    from blockrag.model.usage import GenerationTimings, Usage
    from blockrag.prompt import Block
    from blockrag.quantize import StoredKV
    from blockrag.stores.protocol import BlockStore

__all__ = ["BlockSource"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class BlockSource:
    """KV states of blocks for one model.

    Args:
        model: The model, in evaluation mode.
        profile: Its profile.
        precision: Precision at rest.
        namespace: Blocks of one namespace are not found from another.
        batch_tokens: Padded tokens per prefill forward.
        lock: Held during every forward: some models change their frequencies in it.
        notes: What the model knows of the stores it has used; its fingerprint is the model's.
        readers: The threads that read, verify and place blocks.
        flights: Blocks that are on their way for one request, for others to wait for.
    """

    model: PreTrainedModel
    profile: ModelProfile
    precision: Precision
    namespace: str
    batch_tokens: int
    lock: AbstractContextManager[object]
    notes: MissNotes
    readers: Readers = field(default_factory=Readers)
    flights: InFlight = field(default_factory=InFlight)

    @property
    def writer(self) -> BlockWriter:
        """Computes and stores what is missing."""
        return BlockWriter(
            self.model,
            self.profile,
            self.fingerprint,
            self.precision,
            self.batch_tokens,
            self.lock,
            self._before_writing,
        )

    @property
    def fingerprint(self) -> str:
        """Digest of everything that shapes the model's KV states."""
        return self.notes.fingerprint.digest

    def key(self, token_ids: Sequence[int], regime: Regime) -> str:
        """The block's key: 64 hexadecimal digits."""
        return block_key(token_ids, fingerprint=self.fingerprint, regime=regime.name, namespace=self.namespace)

    def fetch(
        self,
        blocks: Sequence[Block],
        regime: Regime,
        store: BlockStore,
        place: Place,
        place_pooled: PlacePooled,
        usage: Usage,
        timings: GenerationTimings,
        *,
        in_threads: bool,
        must_find_passages: bool = False,
    ) -> None:
        """Place a prompt's local blocks; what is missing is computed and stored. None of them is evicted meanwhile.

        Args:
            blocks: Non-empty blocks; the same one may come several times and is then read once.
            regime: The regime of the prompt.
            store: Where blocks are kept.
            place: Takes each distinct block and its places in `blocks`.
            place_pooled: Takes those that need not be fetched.
            usage: Counts are added to it.
            timings: Seconds of loading, checking, placing and prefilling are added to it.
            in_threads: Whether `place` may be called from several threads.
            must_find_passages: Whether a passage that is missing is an error. A stored copy of one that is damaged is
                then deleted, so that the next ingestion stores it anew.

        Raises:
            MissingBlockError: With `must_find_passages`, before anything is computed.
        """
        places: dict[str, list[int]] = {}
        for index, block in enumerate(blocks):
            places.setdefault(self.key(block.token_ids, regime), []).append(index)
        token_ids = {key: blocks[where[0]].token_ids for key, where in places.items()}
        fetch = Fetch(
            places=places,
            tokens={key: len(ids) for key, ids in token_ids.items()},
            store=store,
            fingerprint=self.fingerprint,
            layout=self.profile.layout,
            flights=self.flights,
            readers=self.readers if in_threads else None,
            place=place,
            place_pooled=place_pooled,
            usage=usage,
            timings=timings,
        )
        refused: list[StoreError] = []

        def compute(missing: Sequence[str]) -> Iterator[tuple[str, StoredKV, int]]:
            if must_find_passages:
                passages = [key for key in missing if blocks[places[key][0]].kind == "passage"]
                self._refuse_missing([blocks[places[key][0]] for key in passages], regime, store, fetch.damaged)
            pairs = [(key, token_ids[key]) for key in missing]
            return self.writer.compute(pairs, regime, store, failures=refused)

        with store.pinned(places):
            fetch.run(compute)
        usage.store_failures += len(refused)

    def require_passages(
        self,
        blocks: Sequence[Block],
        regime: Regime,
        store: BlockStore,
        pool: DevicePool[AtRest] | None,
        usage: Usage,
    ) -> None:
        """Make sure that the passages among a prompt's blocks are stored, without reading them.

        Args:
            blocks: The blocks.
            regime: The regime of the prompt.
            store: Where they are kept.
            pool: Blocks on the model's device, which need not be stored.
            usage: Counts are added to it.

        Raises:
            MissingBlockError: Some are not stored, or the store cannot tell.
        """
        passages = {self.key(block.token_ids, regime): block for block in blocks if block.kind == "passage"}
        wanted = passages.keys() - (set() if pool is None else pool.held(passages))
        try:
            missing = wanted - store.contains_many(wanted)
        except UnsafeStoreError:
            raise
        except StoreError as error:
            usage.store_failures += 1
            logger.warning("the store cannot say which blocks it has; none counts as stored: %s", error)
            missing = wanted
        self._refuse_missing([block for key, block in passages.items() if key in missing], regime, store)

    def explain_misses(
        self, store: BlockStore, regime: Regime, blocks: Sequence[Sequence[int]]
    ) -> MissExplanation | None:
        """See `MissNotes.explain`."""
        return self.notes.explain(store, self._key_under(regime), blocks)

    def materialize(
        self,
        blocks: Sequence[Block],
        regime: Regime,
        store: BlockStore,
        on_block: Callable[[Block, bool, int], None] | None,
        *,
        must_store: bool = True,
        failures: list[StoreError] | None = None,
    ) -> MaterializeReport:
        """Store the blocks that the store lacks; see `BlockModel.materialize`.

        With `must_store=False` what the store refuses is logged, added to `failures`, and not an error.
        """
        by_key = {self.key(block.token_ids, regime): block for block in blocks}
        return self.writer.materialize(by_key, regime, store, on_block, must_store=must_store, failures=failures)

    def _before_writing(self, store: BlockStore, regime: Regime, blocks: Sequence[Sequence[int]]) -> None:
        self.notes.missed(store, self._key_under(regime), blocks)
        self.notes.writes(store)

    def _key_under(self, regime: Regime) -> KeyUnder:
        return partial(_key_under, regime.name, self.namespace)

    def _refuse_missing(
        self, passages: Sequence[Block], regime: Regime, store: BlockStore, damaged: Sequence[str] = ()
    ) -> None:
        """Raise if there are any, having said why and deleted the damaged ones.

        Raises:
            MissingBlockError: There are.
        """
        if not passages:
            return
        self.notes.missed(store, self._key_under(regime), [block.token_ids for block in passages])
        try:
            store.delete_many(damaged)
        except UnsafeStoreError:
            raise
        except StoreError as error:
            logger.warning("%d damaged blocks cannot be deleted: %s", len(damaged), error)
        raise MissingBlockError(tuple(block.source or block.text or str(block.token_ids) for block in passages))


def _key_under(regime: str, namespace: str, token_ids: Sequence[int], fingerprint: str) -> str:
    return block_key(token_ids, fingerprint=fingerprint, regime=regime, namespace=namespace)
