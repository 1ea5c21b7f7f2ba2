"""From blocks to KV states, for one model: what they are called, where they are found, who computes them.

Ties together the key of a block, `Fetch` (finding) and `BlockWriter` (computing and storing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from blockrag.fingerprint import block_key
from blockrag.model.fetch import Fetch
from blockrag.model.inflight import InFlight
from blockrag.model.materialize import BlockWriter, MaterializeReport
from blockrag.model.readers import Readers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.codec import Precision
    from blockrag.model.fetch import Place, PlacePooled
    from blockrag.model.profile import ModelProfile, Regime
    from blockrag.model.usage import GenerationTimings, Usage
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore

__all__ = ["BlockSource"]


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
        readers: The threads that read, verify and place blocks.
        flights: Blocks that are on their way for one request, for others to wait for.
    """

    model: PreTrainedModel
    profile: ModelProfile
    fingerprint: str
    precision: Precision
    namespace: str
    batch_tokens: int
    lock: AbstractContextManager[object]
    readers: Readers = field(default_factory=Readers)
    flights: InFlight = field(default_factory=InFlight)

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
        place: Place,
        place_pooled: PlacePooled,
        usage: Usage,
        timings: GenerationTimings,
        *,
        in_threads: bool,
    ) -> None:
        """Place a prompt's local blocks; what is missing is computed and stored.

        Args:
            blocks: Non-empty blocks; the same one may come several times and is then read once.
            regime: The regime of the prompt.
            store: Where blocks are kept.
            place: Takes each distinct block and its places in `blocks`.
            place_pooled: Takes those that need not be fetched.
            usage: Counts are added to it.
            timings: Seconds of loading, checking, placing and prefilling are added to it.
            in_threads: Whether `place` may be called from several threads.
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
        fetch.run(lambda missing: self.writer.compute([(key, token_ids[key]) for key in missing], regime, store))

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
