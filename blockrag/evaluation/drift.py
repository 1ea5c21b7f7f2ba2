"""What a precision at rest changes: answers, next-token distributions, bytes; with anyone's model and questions.

The reference is the same model with its KV states kept in float32, which loses nothing. Each question is answered
greedily from them; then, for each precision, the reference's tokens are given one by one, and after each the
distribution of the next token is compared. As long as the most likely token is the reference's, that is the greedy
decoding of the precision itself; where it is not, the answer is decoded on its own and its text compared.

Knows neither where questions come from nor what the right answers are.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from blockrag.codec import payload_nbytes
from blockrag.errors import InputError
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import NotBlockFineTunedWarning
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import Block

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.prompt import SegmentedPrompt

__all__ = ["SMALL_MODEL_WARNING", "ChangedAnswer", "Drift", "PrecisionDrift", "measure_drift"]

SMALL_MODEL_WARNING: Final = (
    "Small models lack the outlier channels that large ones have in their keys, and have sharp heads of their own; "
    "what int8 and above all int4 change must be measured on the model in question, with its own questions."
)

_REFERENCE: Final = "float32"


@dataclass(frozen=True, slots=True)
class ChangedAnswer:
    """A question whose answer a precision changed.

    Args:
        index: Which prompt.
        reference: Text from the unquantised KV states.
        answer: Text from those of the precision.
    """

    index: int
    reference: str
    answer: str


@dataclass(frozen=True, slots=True)
class PrecisionDrift:
    """What one precision changed.

    Divergences are those of Kullback and Leibler, in nats, of the precision's next-token distribution from the
    reference's.

    Args:
        precision: The precision at rest.
        changed: The answers whose text differs.
        first_token_kl_mean: Divergence at the first token of the answers, mean over questions.
        first_token_kl_max: The largest of them.
        answer_kl_mean: Divergence along the reference answers, mean over all their tokens.
        answer_kl_max: The largest of them.
        bytes_per_token: Of the local blocks at rest, scales included, headers not.
        bytes_over_float16: That, beside float16.
    """

    precision: Precision
    changed: tuple[ChangedAnswer, ...]
    first_token_kl_mean: float
    first_token_kl_max: float
    answer_kl_mean: float
    answer_kl_max: float
    bytes_per_token: float
    bytes_over_float16: float


@dataclass(frozen=True, slots=True)
class Drift:
    """What several precisions changed on the same questions.

    Args:
        questions: How many.
        answer_tokens: Tokens of the reference answers, ends of sequence included.
        blocks: Different local blocks the prompts have.
        block_tokens_mean: Their mean length.
        reference: Text of each reference answer.
        precisions: What each precision changed.
    """

    questions: int
    answer_tokens: int
    blocks: int
    block_tokens_mean: float
    reference: tuple[str, ...]
    precisions: tuple[PrecisionDrift, ...]

    def unchanged(self, drift: PrecisionDrift) -> float:
        """Share of the answers whose text is the reference's."""
        return 1 - len(drift.changed) / self.questions


@dataclass(slots=True)
class _Found:
    """What has been seen of one precision: divergences token by token, and answers that changed."""

    first_kl: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    changed: list[ChangedAnswer] = field(default_factory=list)


def measure_drift(
    model: BlockModel,
    prompts: Sequence[SegmentedPrompt],
    precisions: Sequence[Precision],
    *,
    max_new_tokens: int = 64,
    progress: Callable[[int], None] = lambda done: None,
) -> Drift:
    """Answer prompts from KV states kept at several precisions, and compare with keeping them unquantised.

    Every block is computed once per precision and kept in memory; the model's own store is not touched.

    Args:
        model: The model, loaded with attention="block".
        prompts: The questions with their passages, from `model.template`.
        precisions: Precisions at rest to compare.
        max_new_tokens: Tokens after which an answer ends.
        progress: Told how many prompts are done.

    Raises:
        InputError: There is no prompt or no precision.
        UnsupportedModelError: The model cannot be composed.
    """
    if not prompts or not precisions:
        raise InputError(f"{len(prompts)} prompts and {len(precisions)} precisions leave nothing to compare")
    options = GenerationOptions(max_new_tokens=max_new_tokens)
    reference = _keeping(model, _REFERENCE)
    others = {precision: _keeping(model, precision) for precision in precisions}
    found = {precision: _Found() for precision in precisions}
    texts, tokens = [], 0
    for index, prompt in enumerate(prompts):
        generation = reference.generate(prompt, options)
        expected = _log_probabilities(reference, prompt, generation.token_ids)
        for precision, other in others.items():
            _compare(found[precision], other, prompt, index, generation.token_ids, expected, generation.text, options)
        texts.append(generation.text)
        tokens += len(generation.token_ids)
        progress(index + 1)
    lengths = [len(ids) for ids in {block.token_ids for prompt in prompts for block in prompt.local_blocks}]
    return Drift(
        questions=len(prompts),
        answer_tokens=tokens,
        blocks=len(lengths),
        block_tokens_mean=sum(lengths) / max(1, len(lengths)),
        reference=tuple(texts),
        precisions=tuple(_summary(model, precision, found[precision], lengths) for precision in precisions),
    )


def _keeping(model: BlockModel, precision: Precision) -> BlockModel:
    """The same weights, keeping its KV states in a memory of its own; nothing is kept composed between prompts."""
    with warnings.catch_warnings():
        # Said when `model` was loaded.
        warnings.simplefilter("ignore", NotBlockFineTunedWarning)
        return BlockModel(
            model.model,
            model.tokenizer,
            template=model.template,
            facts=model.facts,
            precision=precision,
            kept_bytes=0,
        )


def _log_probabilities(model: BlockModel, prompt: SegmentedPrompt, answer: Sequence[int]) -> torch.Tensor:
    """Of the next token before each token of `answer`, given those before it; float64, (tokens, vocabulary)."""
    running = model.start()
    try:
        running.extend(prompt.blocks, room=len(answer))
        rows = []
        for position in range(len(answer)):
            if position:
                running.extend([Block((answer[position - 1],), text="", local=False, kind="turn")], room=0)
            if running.logits is None:
                raise AssertionError("a prompt ends with a global block")
            rows.append(running.logits.double().log_softmax(-1))
        return torch.stack(rows)
    finally:
        running.close()


def _compare(
    found: _Found,
    model: BlockModel,
    prompt: SegmentedPrompt,
    index: int,
    answer: Sequence[int],
    expected: torch.Tensor,
    text: str,
    options: GenerationOptions,
) -> None:
    actual = _log_probabilities(model, prompt, answer)
    # Rounding may leave a little less than zero.
    divergences = (expected.exp() * (expected - actual)).sum(-1).clamp_min(0).tolist()
    found.first_kl.append(divergences[0])
    found.kl += divergences
    if not torch.equal(actual.argmax(-1), expected.argmax(-1)):
        other = model.generate(prompt, options).text
        if other != text:
            found.changed.append(ChangedAnswer(index, text, other))


def _summary(model: BlockModel, precision: Precision, found: _Found, lengths: Sequence[int]) -> PrecisionDrift:
    if model.profile is None:
        raise AssertionError("a model that was composed has a profile")
    at_rest, float16 = (
        sum(payload_nbytes(model.profile.layout, length, name) for length in lengths) for name in (precision, "float16")
    )
    return PrecisionDrift(
        precision=precision,
        changed=tuple(found.changed),
        first_token_kl_mean=sum(found.first_kl) / len(found.first_kl),
        first_token_kl_max=max(found.first_kl),
        answer_kl_mean=sum(found.kl) / len(found.kl),
        answer_kl_max=max(found.kl),
        bytes_per_token=at_rest / max(1, sum(lengths)),
        bytes_over_float16=at_rest / max(1, float16),
    )
