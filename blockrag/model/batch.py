"""Several prompts decoded together: one forward per step, whose weights are read once for all of them.

Each prompt is composed and prefilled by itself, in its own row of one buffer, exactly as it would be alone; then all
rows take a step at a time. Rows whose answer has ended are passengers until half of them are, and then leave.

Knows which prompts may share a batch: those for which the model computes positions in the same way, of lengths that do
not leave most of the buffer to padding. That a model can be batched at all is measured, once, on two short prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import TYPE_CHECKING

import torch

from blockrag.errors import InputError
from blockrag.model.cache import BatchCache, PromptSize
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import Block, SegmentedPrompt

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from blockrag.model.answer import Generation, OngoingAnswer
    from blockrag.model.pool import BufferPool
    from blockrag.model.profile import ModelProfile
    from blockrag.model.running import RunningPrompt

__all__ = ["BatchLimits", "answer_together", "group_prompts", "padding_error"]

# How many times the bytes of its prompts a batch may take.
_PADDING = 2
_PROBE_LENGTHS = (12, 3)


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """How large a batch may be.

    Args:
        prompts: Prompts that decode together, at least one.
        nbytes: Bytes of their caches; a longer prompt is answered by itself.

    Raises:
        InputError: A value is out of range.
    """

    prompts: int
    nbytes: int

    def __post_init__(self) -> None:
        if self.prompts < 1:
            raise InputError(f"batch_size={self.prompts!r} is not a number of prompts; pass 1 to answer one by one")
        if self.nbytes < 0:
            raise InputError(f"max_batch_bytes={self.nbytes!r} is negative; pass 0 to answer one by one")


def group_prompts(
    prompts: Sequence[SegmentedPrompt],
    profile: ModelProfile,
    max_new_tokens: int,
    *,
    dtype: torch.dtype,
    limits: BatchLimits,
) -> list[list[int]]:
    """Which prompts decode together: the longest first, beside those nearest in length.

    Args:
        prompts: The prompts.
        profile: The model's profile.
        max_new_tokens: Tokens each may be answered with.
        dtype: The dtype the model computes in.
        limits: How large a batch may be.

    Returns:
        Indices into `prompts`, each exactly once.

    Raises:
        PromptTooLongError: A prompt exceeds what the model can place.
    """
    rooms = [_room(profile, prompt, max_new_tokens) for prompt in prompts]

    def nbytes(group: Sequence[int]) -> int:
        sizes = [_size(prompts[index]) for index in group]
        room = max(rooms[index] for index in group)
        return BatchCache.nbytes_for(profile.layout, profile.structure, sizes, room=room, dtype=dtype)

    groups: list[list[int]] = []
    for regime in profile.regimes:
        chosen = [i for i, prompt in enumerate(prompts) if profile.regime_for(prompt.num_tokens) is regime]
        group: list[int] = []
        alone = 0
        for index in sorted(chosen, key=lambda i: -prompts[i].num_tokens):
            alone += nbytes([index])
            longer = [*group, index]
            together = nbytes(longer)
            if group and (len(longer) > limits.prompts or together > min(limits.nbytes, _PADDING * alone)):
                groups.append(group)
                longer, alone = [index], nbytes([index])
            group = longer
        groups += [group] if group else []
    return groups


def answer_together(
    prompts: Sequence[SegmentedPrompt],
    options: GenerationOptions,
    *,
    start: Callable[[], RunningPrompt],
    profile: ModelProfile,
    pool: BufferPool,
) -> list[Generation]:
    """Answer prompts of one position regime in one batch.

    Args:
        prompts: At least one.
        options: How to generate; each answer has a sampler of its own.
        start: Gives an empty running prompt.
        profile: The model's profile.
        pool: Where the buffer comes from and goes back to.

    Returns:
        The answers, in the order of `prompts`.
    """
    running = [start() for _ in prompts]
    cache = _cache_of(running[0].model, prompts, options, profile, pool)
    try:
        answers = [_begun(one, cache, row, prompts[row], options) for row, one in enumerate(running)]
        rows = _Rows(running[0].model, running[0].lock, cache, [prompt.num_tokens for prompt in prompts])
        generations: dict[int, Generation] = {}
        while True:
            for index, answer in enumerate(answers):
                if answer.finish_reason is not None and index not in generations:
                    generations[index] = running[index].finish(answer)
            going = [index for index in range(len(prompts)) if index not in generations]
            if not going:
                return [generations[index] for index in range(len(prompts))]
            for index, logits in rows.forward({index: running[index].take_pending()[0] for index in going}).items():
                running[index].logits = logits
                running[index].step(answers[index])
    finally:
        for one in running:
            one.close()
        cache.release()


def padding_error(
    *, start: Callable[[], RunningPrompt], profile: ModelProfile, pool: BufferPool
) -> tuple[float, float]:
    """What a prompt's logits depend on the prompts beside it: zero, up to rounding, if the model heeds its mask.

    Args:
        start: Gives an empty running prompt.
        profile: The model's profile.
        pool: Where buffers come from and go back to.

    Returns:
        The largest difference between logits of a padded batch of two and of each alone, and the largest logit.
    """
    options = GenerationOptions(max_new_tokens=2, ignore_eos=True)
    prompts = [SegmentedPrompt((Block(tuple(range(n)), "", local=False, kind="query"),)) for n in _PROBE_LENGTHS]
    running = [start() for _ in range(2 * len(prompts))]
    alone, together = running[: len(prompts)], running[len(prompts) :]
    cache = _cache_of(running[0].model, prompts, options, profile, pool)
    try:
        expected = []
        for one, prompt in zip(alone, prompts, strict=True):
            one.extend(prompt.blocks, room=options.max_new_tokens)
            list(one.answer(options, prompt.stop))
            expected.append(one.logits)
        for row, one in enumerate(together):
            _begun(one, cache, row, prompts[row], options)
        rows = _Rows(running[0].model, running[0].lock, cache, _PROBE_LENGTHS)
        actual = rows.forward({row: one.take_pending()[0] for row, one in enumerate(together)})
    finally:
        for one in running:
            one.close()
        cache.release()
    pairs = [(actual[row].float(), logits.float()) for row, logits in enumerate(expected) if logits is not None]
    return max(float((a - b).abs().max()) for a, b in pairs), max(float(b.abs().max()) for _, b in pairs)


class _Rows:
    """The rows of a batch that is being decoded: which prompt each of them is, and where it stands.

    Args:
        model: The model.
        lock: Held during every forward.
        cache: The filled cache.
        lengths: Tokens of each row.
    """

    def __init__(
        self, model: PreTrainedModel, lock: AbstractContextManager[object], cache: BatchCache, lengths: Sequence[int]
    ) -> None:
        self._model, self._lock, self._cache = model, lock, cache
        # Which prompt a row is, and the position its next token takes.
        self._prompts = list(range(len(lengths)))
        self._positions = list(lengths)
        # Leading columns of a row that are padding.
        self._padding = [max(lengths) - length for length in lengths]
        self._columns = max(lengths)

    @torch.no_grad()
    def forward(self, tokens: Mapping[int, int]) -> dict[int, torch.Tensor]:
        """One step of all prompts that go on.

        Args:
            tokens: Prompt to its newest token; a prompt that was left out once stays out.

        Returns:
            Prompt to its logits, shape (vocabulary,).
        """
        if 2 * len(tokens) <= len(self._prompts):
            self._keep([row for row, prompt in enumerate(self._prompts) if prompt in tokens])
        device = self._model.device
        # A passenger says anything, at its last position: a later one might be past what the model can place.
        ids = torch.tensor([[tokens.get(prompt, 0)] for prompt in self._prompts], device=device)
        positions = torch.tensor([[position] for position in self._positions], device=device)
        self._columns += 1
        with self._lock:
            output = self._model(
                input_ids=ids,
                position_ids=positions,
                attention_mask=self._mask(device),
                past_key_values=self._cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self._positions = [
            position + (prompt in tokens) for prompt, position in zip(self._prompts, self._positions, strict=True)
        ]
        return {prompt: output.logits[row, -1] for row, prompt in enumerate(self._prompts) if prompt in tokens}

    def _keep(self, rows: Sequence[int]) -> None:
        surplus = min(self._padding[row] for row in rows)
        self._columns -= surplus
        self._cache.compact(rows, self._columns)
        self._prompts = [self._prompts[row] for row in rows]
        self._positions = [self._positions[row] for row in rows]
        self._padding = [self._padding[row] - surplus for row in rows]

    def _mask(self, device: torch.device) -> torch.Tensor | None:
        """What is not padding, bool, shape (rows, columns); None where nothing is: the kernels are faster without."""
        if not any(self._padding):
            return None
        padding = torch.tensor(self._padding, device=device)
        return torch.arange(self._columns, device=device)[None] >= padding[:, None]


def _cache_of(
    model: PreTrainedModel,
    prompts: Sequence[SegmentedPrompt],
    options: GenerationOptions,
    profile: ModelProfile,
    pool: BufferPool,
) -> BatchCache:
    return BatchCache(
        profile.layout,
        profile.structure,
        [_size(prompt) for prompt in prompts],
        room=max(_room(profile, prompt, options.max_new_tokens) for prompt in prompts),
        dtype=model.dtype,
        device=model.device,
        pool=pool,
    )


def _begun(
    running: RunningPrompt, cache: BatchCache, row: int, prompt: SegmentedPrompt, options: GenerationOptions
) -> OngoingAnswer:
    """Compose and prefill one prompt in its row, and choose the first token of its answer."""
    running.cache = cache.row(row)
    running.extend(prompt.blocks, room=options.max_new_tokens)
    answer = running.begin(options, prompt.stop)
    running.step(answer)
    # The row is the batch's from here on.
    running.cache = None
    return answer


def _room(profile: ModelProfile, prompt: SegmentedPrompt, max_new_tokens: int) -> int:
    limit = profile.room_after(prompt.num_tokens)
    return max_new_tokens if limit is None else min(limit, max_new_tokens)


def _size(prompt: SegmentedPrompt) -> PromptSize:
    leading = takewhile(lambda block: block.local, prompt.blocks)
    return PromptSize(prompt.num_tokens, skipped=sum(len(block.token_ids) for block in leading))
