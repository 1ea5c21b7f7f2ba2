"""Deciding that a model can be trusted with composed KV states: the attention it will use, and the equivalence probe.

The fastest attention that reproduces the oracle is chosen: folded grouped-query attention, transformers' own, then
the model's eager code. The probe runs with the cache class and attention of production, on the weights as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from blockrag.compose import Composition
from blockrag.errors import UnsupportedModelError
from blockrag.model.cache import PromptCache
from blockrag.model.folded import FOLDED_ATTENTION
from blockrag.model.linear import FastLinears
from blockrag.model.oracle import oracle_logits
from blockrag.model.pool import BufferPool
from blockrag.model.prefill import prefill_blocks
from blockrag.model.profile import ModelProfile, probe_regimes, short_window, structure_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["tolerance", "verified_profile"]

_WINDOW = 8
# Shorter than a window, longer than it, one token; then the query block: rows for vectors of them and a rest.
_LENGTHS = (5, _WINDOW + 5, 1, 18)
# Relative to the largest logit. A wrong rotation or mask measures 1e-2 and more, float32 rounding 1e-6.
_TOLERANCE = {torch.float32: 5e-4, torch.float64: 5e-4}
_TOLERANCE_HALF = 1e-1


def verified_profile(model: PreTrainedModel) -> ModelProfile:
    """Probe a model; leaves it with the fastest attention that is exact.

    Returns:
        The profile, with the errors of both probes.

    Raises:
        UnsupportedModelError: The model cannot be composed exactly; the message says why.
    """
    structure_of(model)
    failure: Exception | None = None
    for attention in (FOLDED_ATTENTION, "sdpa", "eager"):
        try:
            model.set_attn_implementation(attention)
            profile = _probe(model)
        except (ValueError, NotImplementedError, UnsupportedModelError) as error:
            # Not available for this model, or it computes something the attention does not implement.
            failure = error
            continue
        if profile.equivalence_error <= tolerance(model) * profile.logit_scale:
            return profile
        failure = UnsupportedModelError(
            f"{type(model).__name__} (model type {model.config.model_type!r}) cannot reuse block KV states: a composed "
            f"prompt differs from one forward under the block mask by {profile.equivalence_error:.1e} on logits of "
            f'scale {profile.logit_scale:.1e} with {attention} attention. Load it with attention="full", or choose '
            "another model."
        )
    if isinstance(failure, UnsupportedModelError):
        raise failure
    raise UnsupportedModelError(
        f"{type(model).__name__} (model type {model.config.model_type!r}) runs with none of the attention functions "
        f'that take a mask ({failure}). Load it with attention="full", or choose another model.'
    ) from failure


def tolerance(model: PreTrainedModel) -> float:
    """How far logits may be apart, relative to the largest, to count as the same computation."""
    return _TOLERANCE.get(model.dtype, _TOLERANCE_HALF)


def _probe(model: PreTrainedModel) -> ModelProfile:
    with short_window(model, _WINDOW):
        short = probe_regimes(model, structure_of(model))
        generator = torch.Generator().manual_seed(1)
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        blocks = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in _LENGTHS]
        expected = oracle_logits(model, short.structure, blocks, [True] * (len(blocks) - 1) + [False])[-_LENGTHS[-1] :]
        with FastLinears(model):
            actual = _composed_logits(model, short, blocks)
    error = float((actual.float() - expected.float()).abs().max())
    # The facts of the unshortened windows are those to keep.
    return replace(
        short,
        structure=structure_of(model),
        equivalence_error=error,
        logit_scale=float(expected.float().abs().max()),
    )


@torch.no_grad()
def _composed_logits(model: PreTrainedModel, profile: ModelProfile, blocks: Sequence[Sequence[int]]) -> torch.Tensor:
    """Logits (query tokens, vocabulary) of the last block over the composed others."""
    *local, query = blocks
    regime = profile.regimes[0]
    start = sum(len(block) for block in local)
    cache = PromptCache(
        profile.layout,
        profile.structure,
        capacity=start + len(query),
        skipped=start,
        dtype=model.dtype,
        device=model.device,
        pool=BufferPool(max_bytes=0),
    )
    composition = Composition(cache, start, regime.ropes)
    for index, kv in prefill_blocks(model, profile, regime, local, batch_tokens=1 << 10):
        composition.place(kv, sum(len(block) for block in local[:index]))
    composition.finish()
    positions = torch.arange(start, start + len(query), device=model.device)[None]
    ids = torch.tensor([list(query)], device=model.device)
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True).logits[0]
    return logits
