"""Several prompts answered in one call: the blocks they lack computed together, then batches of similar length.

Decides the order of the work and who is charged for it. How a prompt is answered by itself, and how a batch decodes,
is known elsewhere (`running.py`, `batch.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from blockrag.model.batch import BatchLimits, answer_together, group_prompts
from blockrag.model.usage import Usage

if TYPE_CHECKING:
    from blockrag.errors import StoreError
    from blockrag.kernels.at_rest import AtRest
    from blockrag.model.answer import Generation
    from blockrag.model.blocks import BlockSource
    from blockrag.model.device_pool import DevicePool
    from blockrag.model.pool import BufferPool
    from blockrag.model.running import OnMiss, RunningPrompt
    from blockrag.model.sampling import GenerationOptions
    from blockrag.prompt import Block, SegmentedPrompt
    from blockrag.stores.protocol import BlockStore

__all__ = ["SeveralPrompts"]

_Computed: TypeAlias = set[tuple[str, tuple[int, ...]]]
"""The position regime and the token ids of blocks."""


@dataclass(frozen=True, slots=True)
class SeveralPrompts:
    """Answers prompts together where that is exact and pays, and one after the other where not.

    Args:
        source: Finds and computes blocks.
        store: Where blocks are kept.
        device_pool: Blocks on the model's device, if there are any.
        pool: The memory of prompts.
        alone: Answers one prompt by itself.
        start: Gives an empty running prompt.
        batches_exactly: Whether a prompt's answer does not depend on those beside it; asked before the first batch.
    """

    source: BlockSource
    store: BlockStore
    device_pool: DevicePool[AtRest] | None
    pool: BufferPool
    alone: Callable[[SegmentedPrompt], Generation]
    start: Callable[[], RunningPrompt]
    batches_exactly: Callable[[], bool]

    def answer(
        self,
        prompts: Sequence[SegmentedPrompt],
        options: GenerationOptions,
        limits: BatchLimits,
        *,
        compose: bool,
        on_miss: OnMiss,
    ) -> list[Generation]:
        """The answers, in the order of the prompts.

        Args:
            prompts: The prompts; with `compose=False` without local blocks.
            options: How to generate; each answer has a sampler of its own.
            limits: How large a batch may be.
            compose: Whether prompts are composed from stored blocks.
            on_miss: What to do where passages are not stored.

        Raises:
            PromptTooLongError: A prompt exceeds what the model can place; none is answered.
            MissingBlockError: With on_miss="error", a passage of any prompt is not stored, or a stored copy is damaged.
        """
        profile = self.source.profile
        groups = group_prompts(prompts, profile, options.max_new_tokens, dtype=self.source.model.dtype, limits=limits)
        if compose and on_miss != "compute":
            if on_miss == "error":
                self._require_passages(prompts)
            return [self.alone(prompt) for prompt in prompts]
        computed: _Computed = set()
        failures: list[StoreError] = []
        if compose:
            computed = self._materialize_together(prompts, failures)
        if any(len(group) > 1 for group in groups) and not self.batches_exactly():
            groups = [[index] for index in range(len(prompts))]
        generations: dict[int, Generation] = {}
        for group in groups:
            if len(group) == 1:
                answered = [self.alone(prompts[group[0]])]
            else:
                chosen = [prompts[index] for index in group]
                answered = answer_together(chosen, options, start=self.start, profile=profile, pool=self.pool)
            generations.update(zip(group, answered, strict=True))
        in_order = [generations[index] for index in range(len(prompts))]
        self._charge(prompts, in_order, computed)
        if failures:
            # They were no prompt's alone, and count once.
            in_order[0].usage.store_failures += len(failures)
        return in_order

    def _charge(
        self, prompts: Sequence[SegmentedPrompt], generations: Sequence[Generation], computed: _Computed
    ) -> None:
        """Count each block that was computed beforehand once, for the first prompt that has it."""
        left = set(computed)
        for prompt, generation in zip(prompts, generations, strict=True):
            regime = self.source.profile.regime_for(prompt.num_tokens).name
            new = [block.token_ids for block in prompt.local_blocks if (regime, block.token_ids) in left]
            generation.usage.charge(len(new), sum(map(len, new)))
            left.difference_update((regime, ids) for ids in new)

    def _materialize_together(self, prompts: Sequence[SegmentedPrompt], failures: list[StoreError]) -> _Computed:
        """Compute the blocks that are missing, and say which they were.

        What the store refuses is logged and added to `failures`; each prompt then looks after its blocks itself.
        """
        profile = self.source.profile
        by_regime: dict[str, list[Block]] = {}
        for prompt in prompts:
            by_regime.setdefault(profile.regime_for(prompt.num_tokens).name, []).extend(prompt.local_blocks)
        computed: _Computed = set()
        for regime in profile.regimes:
            if blocks := by_regime.get(regime.name):
                new: list[tuple[int, ...]] = []

                def note(block: Block, was_stored: bool, nbytes: int, new: list[tuple[int, ...]] = new) -> None:
                    if not was_stored:
                        new.append(block.token_ids)

                self.source.materialize(blocks, regime, self.store, note, must_store=False, failures=failures)
                computed.update((regime.name, ids) for ids in new)
        return computed

    def _require_passages(self, prompts: Sequence[SegmentedPrompt]) -> None:
        """Make sure that the passages of all prompts are stored, before any is answered.

        Raises:
            MissingBlockError: They are not.
        """
        profile = self.source.profile
        for regime in profile.regimes:
            mine = [prompt for prompt in prompts if profile.regime_for(prompt.num_tokens) is regime]
            blocks = [block for prompt in mine for block in prompt.local_blocks]
            self.source.require_passages(blocks, regime, self.store, self.device_pool, Usage())
