"""What one model does to its KV states, found by asking it: the facts that decide whether it can be composed.

Two probes run when a model is loaded; neither looks at the model's name.

1. *Shift probe.* The same tokens at positions 0, 1, ... and 37, 38, ...: for each layer, and for keys and values
   apart, find the rotation that maps one cache on the other. That finds partial and interleaved rotations, layers
   without positions, models with several frequency tables or the opposite sign, and latent attention, where the
   rotated tensor is what transformers calls values.
2. *Equivalence probe.* A prompt composed from separately computed blocks, one of them longer than any window, through
   the very cache and attention used in production, against one forward under the block mask.

A model that fails either is refused with the layer, the error and what to do instead. Both probes are needed: some
models pass the first and mix tokens elsewhere (convolutions, recurrent states).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import DummyLayer, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from blockrag.compose import LayerRopes
from blockrag.errors import PromptTooLongError, UnsupportedModelError
from blockrag.kv import KVLayout, LayerShape
from blockrag.model.cache import LayerStructure
from blockrag.model.capture import capture
from blockrag.rope import RopeSpec, rotate_, unrotate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["ModelProfile", "Regime", "positions_of", "probe_regimes", "room_within", "structure_of", "unprobed_profile"]

_PROBE_TOKENS = 9
_PROBE_SHIFT = 37
# Relative error of a shifted key: 5e-7 was measured in float32 over 85 families. In bfloat16 it is 5e-3 in the first
# layer and grows with every one after it, since each adds its own rounding: 2.1e-2 after 32 layers, 3.5e-2 after 80. A
# wrong rotation measures 1 and more.
_SHIFT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 2e-2}
_SHIFT_TOLERANCE_HALF = 1e-1


@dataclass(frozen=True, slots=True)
class Regime:
    """One way a model computes positions; models whose frequencies change with the prompt's length have two.

    Args:
        name: "default", "short" or "long"; part of a block's key.
        offset: Position of a block's first token when it is prefilled, chosen so that the model picks this regime.
        ropes: What turns, per layer that keeps KV states.
    """

    name: str
    offset: int
    ropes: tuple[LayerRopes, ...]


@dataclass(frozen=True, slots=True)
class ModelProfile:
    """Everything composing needs to know about a model.

    Args:
        layout: Shapes of the layers that keep KV states.
        structure: Which layers those are, and their windows.
        regimes: One, or a short and a long one with `regime_limit` between them.
        regime_limit: Tokens up to which the short regime holds; None with one regime.
        max_tokens: Prompt plus answer beyond which composition would not be exact, or the model is out of its range.
        attention: The attention function in use.
        captures_early: Whether a forward may end as soon as the last layer has handed its KV states over.
        shift_error: Largest relative error of the shift probe.
        equivalence_error: Largest logit difference of the equivalence probe.
        logit_scale: Largest absolute logit of the equivalence probe, to read the error by.
    """

    layout: KVLayout
    structure: LayerStructure
    regimes: tuple[Regime, ...]
    regime_limit: int | None
    max_tokens: int | None
    attention: str
    captures_early: bool
    shift_error: float
    equivalence_error: float = float("nan")
    logit_scale: float = float("nan")

    def regime_for(self, prompt_tokens: int) -> Regime:
        """The regime of a prompt of that many tokens, its query block included."""
        if self.regime_limit is not None and prompt_tokens > self.regime_limit:
            return self.regimes[1]
        return self.regimes[0]

    def room_after(self, prompt_tokens: int, *, what: str = "the prompt") -> int | None:
        """Tokens that may follow a prompt of that many tokens; None without limit.

        Raises:
            PromptTooLongError: The prompt itself does not fit.
        """
        limit = self.max_tokens
        if self.regime_limit is not None and prompt_tokens <= self.regime_limit:
            # Beyond the limit the model would change the frequencies of what is already in the cache.
            limit = self.regime_limit
        return room_within(limit, prompt_tokens, what=what)


def positions_of(model: PreTrainedModel) -> int | None:
    """The positions the model was made for; None where its configuration names none."""
    said = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(said) if said else None


def room_within(limit: int | None, prompt_tokens: int, *, what: str = "the prompt") -> int | None:
    """Tokens that may follow a prompt where prompt and answer together may have `limit`; None without limit.

    Raises:
        PromptTooLongError: The prompt itself does not fit.
    """
    if limit is None:
        return None
    if prompt_tokens >= limit:
        raise PromptTooLongError(
            f"{what} has {prompt_tokens} tokens and the model can place {limit}; "
            "retrieve fewer or shorter passages, or use a model with a longer context"
        )
    return limit - prompt_tokens


def structure_of(model: PreTrainedModel) -> LayerStructure:
    """The layers of a model's cache.

    Raises:
        UnsupportedModelError: A layer keeps another state than keys and values (recurrent, convolutional, indexed).
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise _refusal(model, "it takes no position_ids, so a block cannot be placed")
    chunked = _has_chunked_layers(model)
    indices, windows = [], []
    layers = DynamicCache(config=model.config).layers
    for index, layer in enumerate(layers):
        if type(layer) is DummyLayer:
            continue
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
            raise _refusal(
                model,
                f"layer {index} keeps a {type(layer).__name__} (a recurrent, convolutional or indexed state), "
                "which cannot be merged from blocks that never saw each other",
            )
        indices.append(index)
        sliding = isinstance(layer, DynamicSlidingWindowLayer) and not chunked
        windows.append(int(layer.sliding_window) if sliding else None)
    if not indices:
        raise _refusal(model, "none of its layers keeps keys and values")
    return LayerStructure(len(layers), tuple(indices), tuple(windows))


def probe_regimes(model: PreTrainedModel, structure: LayerStructure) -> ModelProfile:
    """Run the shift probe in every regime the model has.

    Returns:
        A profile whose equivalence probe has not run yet.

    Raises:
        UnsupportedModelError: No rotation explains how a layer's states depend on position.
    """
    limit = _longrope_limit(model)
    starts = [("default", 0)] if limit is None else [("short", 0), ("long", limit)]
    regimes, error = [], 0.0
    for name, offset in starts:
        before = _captured(model, structure, offset)
        after = _captured(model, structure, offset + _PROBE_SHIFT)
        # Read now: models with two regimes overwrite their frequencies in every forward.
        candidates = _rope_candidates(model)
        ropes = []
        for position, index in enumerate(structure.indices):
            found = []
            for kind in (0, 1):
                spec, misfit = _fit(before[position][kind], after[position][kind], candidates, offset)
                if misfit > _SHIFT_TOLERANCE.get(model.dtype, _SHIFT_TOLERANCE_HALF):
                    raise _refusal(
                        model,
                        f"layer {index} {('keys', 'values')[kind]} depend on position in a way that no rotation "
                        f"explains (relative error {misfit:.1e})",
                    )
                error = max(error, misfit)
                found.append(spec)
            ropes.append(LayerRopes(keys=found[0], values=found[1]))
        regimes.append(Regime(name, offset, tuple(ropes)))
    shapes = tuple(LayerShape(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in before)
    return ModelProfile(
        layout=KVLayout(shapes),
        structure=structure,
        regimes=tuple(regimes),
        regime_limit=limit,
        max_tokens=_max_tokens(model),
        attention=str(model.config._attn_implementation),
        captures_early=_captures_early(model, structure, before, offset),
        shift_error=error,
    )


def unprobed_profile(model: PreTrainedModel) -> ModelProfile:
    """Shapes and limits of a model whose weights are not there: what can be said of it before it computes anything.

    Args:
        model: On torch's meta device; its frequencies are spoilt by this, so that it is good for nothing else.

    Returns:
        A profile without regimes, whose probes have not run.

    Raises:
        UnsupportedModelError: A layer keeps another state than keys and values.
        RuntimeError: The model looks at numbers while it computes, and there are none.
    """
    structure = structure_of(model)
    for module in model.modules():
        # Frequencies that depend on how long the prompt is need its positions; shapes do not depend on them.
        if isinstance(getattr(module, "rope_type", None), str):
            module.rope_type = "default"
    captured = _captured(model, structure, 0)
    return ModelProfile(
        layout=KVLayout(tuple(LayerShape(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for k, v in captured)),
        structure=structure,
        regimes=(),
        regime_limit=_longrope_limit(model),
        max_tokens=_max_tokens(model),
        attention=str(model.config._attn_implementation),
        captures_early=False,
        shift_error=float("nan"),
    )


@contextmanager
def short_window(model: PreTrainedModel, window: int) -> Iterator[None]:
    """Shorten the model's sliding window for a probe, so that a block longer than it stays cheap."""
    config = model.config.get_text_config(decoder=True)
    original = getattr(config, "sliding_window", None)
    shorten = original is not None and original > window
    if shorten:
        config.sliding_window = window
    try:
        yield
    finally:
        if shorten:
            config.sliding_window = original


def _captured(
    model: PreTrainedModel, structure: LayerStructure, offset: int, *, early: bool = False
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values, (1, heads, tokens, dim) each, of fixed tokens placed at `offset`."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (1, _PROBE_TOKENS), generator=torch.Generator().manual_seed(0))
    taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(place: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        taken[place] = keys, values

    capture(model, structure, ids, offset, take, early=early)
    for place, index in enumerate(structure.indices):
        if place not in taken:
            raise _refusal(model, f"layer {index} left its cache empty, so its state is kept elsewhere")
    return [taken[place] for place in range(len(structure.indices))]


def _captures_early(
    model: PreTrainedModel, structure: LayerStructure, whole: Sequence[tuple[torch.Tensor, torch.Tensor]], offset: int
) -> bool:
    """Whether a forward that ends with the last layer's states gives those of a whole forward at `offset`."""
    early = _captured(model, structure, offset, early=True)
    pairs = [(a, b) for one, other in zip(early, whole, strict=True) for a, b in zip(one, other, strict=True)]
    # Some kernels add in another order every time they run; what a model hands over twice differs by its own size.
    tolerance = _SHIFT_TOLERANCE.get(model.dtype, _SHIFT_TOLERANCE_HALF)
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= tolerance * float(b.abs().max().clamp_min(1e-9))
        for a, b in pairs
    )


def _rope_candidates(model: PreTrainedModel) -> list[tuple[float, ...]]:
    """The distinct frequency tables among the model's buffers, each also turning the other way."""
    tables: dict[tuple[float, ...], None] = {}
    for name, buffer in model.named_buffers():
        leaf = name.rsplit(".", 1)[-1]
        if leaf.endswith("inv_freq") and "original" not in leaf and buffer.ndim == 1:
            frequencies = tuple(buffer.detach().float().tolist())
            tables[frequencies] = tables[tuple(-f for f in frequencies)] = None
    return list(tables)


def _fit(
    before: torch.Tensor, after: torch.Tensor, candidates: Sequence[tuple[float, ...]], offset: int
) -> tuple[RopeSpec, float]:
    """The spec that best maps states at `offset` to those `_PROBE_SHIFT` later, and its relative error."""
    before, after = before.float(), after.float()
    scale = float(after.abs().max().clamp_min(1e-9))
    best, best_error = RopeSpec(), float((before - after).abs().max()) / scale
    dim = before.shape[-1]
    for frequencies in candidates:
        rotated = 2 * len(frequencies)
        if rotated > dim:
            continue
        for kind in ("half", "interleaved"):
            for start in {0, dim - rotated}:
                spec = RopeSpec(kind, start, rotated, frequencies)
                moved = unrotate(before, spec, offset)
                rotate_(moved, spec, offset + _PROBE_SHIFT)
                error = float((moved - after).abs().max()) / scale
                # A clear win only: two specs that explain the states equally well must not alternate by rounding.
                if error < best_error * 0.2:
                    best, best_error = spec, error
    return best, best_error


def _longrope_limit(model: PreTrainedModel) -> int | None:
    """Tokens beyond which a LongRope model uses its long factors."""
    for parameters in _rope_parameters(model):
        if parameters.get("rope_type") == "longrope":
            return int(parameters["original_max_position_embeddings"])
    return None


def _rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """The rope parameters of the configuration, one per layer type where they differ."""
    parameters = getattr(model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    if "rope_type" in parameters:
        return [parameters]
    return [p for p in parameters.values() if isinstance(p, dict)]


def _has_chunked_layers(model: PreTrainedModel) -> bool:
    config = model.config.get_text_config(decoder=True)
    return "chunked_attention" in (getattr(config, "layer_types", None) or ())


def _max_tokens(model: PreTrainedModel) -> int | None:
    """The positions the model was made for; where attention is chunked, one chunk: its borders do not move along."""
    limits = [positions_of(model)]
    if _has_chunked_layers(model):
        limits.append(getattr(model.config.get_text_config(decoder=True), "attention_chunk_size", None))
    known = [int(limit) for limit in limits if limit]
    return min(known) if known else None


def _refusal(model: PreTrainedModel, reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{type(model).__name__} (model type {model.config.model_type!r}) cannot reuse block KV states: {reason}. "
        'Load it with attention="full", or choose a model whose layers all keep keys and values with rotary positions.'
    )
