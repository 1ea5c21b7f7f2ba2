"""What makes a model's KV states its own: the fingerprint of a model, its tokenizer and its template, factor by factor.

Everything that can change a block's numbers enters under one factor's name, so that a miss can say what changed. The
configuration is divided among three of them, whole: what is about rotation, what is about which tokens see each other,
and the rest. Adapters that are not merged are told apart from the weights they sit on, for half of what they do (scale,
which of them are active) is in no tensor.

    what changes                                    the factor that names it
    ----------------------------------------------  ------------------------
    weights, a merged adapter, another revision     weights
    hidden sizes, norms, activation, quantisation   config
    rope type, theta, scaling, rotated part         rope
    sliding window, chunks, kinds of layers         attention
    an adapter beside the weights: tensors, scale,  adapter
      active or not
    vocabulary, added tokens, BOS policy            tokenizer
    prefix and passage form, chat template          template
    whether passages can spell control tokens       splitting
    keys stored rotated or not                      positions
    the dtype that is computed in                   compute_dtype
    the precision at rest, with its scheme          precision
    transformers' major version                     library
    the layout of an encoded block                  format

A revision is its content: a commit that changes nothing of the above finds the blocks of the one before. Of the
libraries, transformers holds the models' code, and is declared compatible within a major version; what else computes
(torch, the kernels) only rounds.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

import transformers

from blockrag.fingerprint import FORMAT_VERSION, Fingerprint, hash_json, hash_tensors, hash_tokenizer
from blockrag.prompt.encode import SPLIT_POLICY
from blockrag.rope import POSITIONS_AT_REST

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from blockrag.codec import Precision
    from blockrag.model.profile import ModelProfile
    from blockrag.prompt import PromptTemplate

__all__ = ["adapter_factor", "fingerprint_of", "library_factor", "weights_factor"]

# Entries of a model's configuration that say nothing about what it computes.
_INERT = {"_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache"}
_ROPE = ("rope_", "rotary_", "partial_rotary", "no_rope", "original_max_position_embeddings")
_ATTENTION = (
    "sliding_window",
    "use_sliding_window",
    "max_window_layers",
    "layer_types",
    "attention_chunk_size",
    "attn_logit_softcapping",
)
# Entries of an adapter's configuration that say where it came from.
_INERT_ADAPTER = {"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"}


def fingerprint_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: PromptTemplate,
    profile: ModelProfile,
    precision: Precision,
    *,
    weights: str | None = None,
) -> Fingerprint:
    """The fingerprint of everything that shapes a model's KV states.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        template: How its prompts are built.
        profile: Its profile.
        precision: The precision at rest.
        weights: The weights' factor, where it is known; else all weights are read.
    """
    parts = _divided(model.config.to_dict())
    ropes = [
        [[r.keys.describe(), r.keys.frequencies, r.values.describe(), r.values.frequencies] for r in regime.ropes]
        for regime in profile.regimes
    ]
    return Fingerprint(
        weights=weights_factor(model) if weights is None else weights,
        config=hash_json(parts["config"]),
        rope=hash_json([parts["rope"], ropes]),
        attention=hash_json([parts["attention"], profile.structure.windows]),
        adapter=adapter_factor(model),
        tokenizer=hash_tokenizer(tokenizer),
        template=hash_json([template.digest(), getattr(tokenizer, "chat_template", None)]),
        splitting=SPLIT_POLICY,
        positions=POSITIONS_AT_REST,
        compute_dtype=str(model.dtype).removeprefix("torch."),
        precision=precision,
        library=library_factor(),
        format=str(FORMAT_VERSION),
    )


def weights_factor(model: PreTrainedModel) -> str:
    """The content of a model's parameters and buffers, under the names they have without adapters. Reads all of them.

    Raises:
        InputError: A tensor has no plain bytes to read.
    """
    adapted = [prefix for prefix, _ in _adapted(model)]
    return hash_tensors(
        (name.replace(".base_layer.", "."), tensor)
        for name, tensor in model.state_dict().items()
        if not _is_added(name, adapted)
    )


def adapter_factor(model: PreTrainedModel) -> str:
    """The adapters that sit in a model beside its weights: tensors, settings, and which of them are at work.

    Any library's whose layers say `base_layer` and `active_adapters`, as peft's do. "none" where there are none.
    """
    layers = list(_adapted(model))
    configs = getattr(model, "peft_config", None) or {}
    if not layers and not configs:
        return "none"
    prefixes = [prefix for prefix, _ in layers]
    added = {name: tensor for name, tensor in model.state_dict().items() if _is_added(name, prefixes)}
    settings = [
        [prefix, *(_plain(getattr(layer, name, None)) for name in ("active_adapters", "disable_adapters", "scaling"))]
        for prefix, layer in layers
    ]
    merged = [_plain(getattr(layer, "merged_adapters", None)) for _, layer in layers]
    kinds = {name: _plain(_without(config.to_dict(), _INERT_ADAPTER)) for name, config in dict(configs).items()}
    return hash_json([hash_tensors(added.items()), settings, merged, kinds])


def library_factor() -> str:
    """The library that holds the models' code, up to the part of its version that is declared compatible."""
    return f"transformers {transformers.__version__.partition('.')[0]}"


def _adapted(model: PreTrainedModel) -> Iterator[tuple[str, Any]]:
    """The layers that an adapter wraps, by the beginning of their tensors' names."""
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            yield f"{name}.", module


def _is_added(name: str, adapted: list[str]) -> bool:
    """Whether a tensor belongs to an adapter rather than to the layer it wraps."""
    return any(name.startswith(prefix) and not name.startswith(f"{prefix}base_layer.") for prefix in adapted)


def _divided(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """A configuration's entries by factor, under their paths; nested configurations are divided as well."""
    parts: dict[str, dict[str, Any]] = {"rope": {}, "attention": {}, "config": {}}

    def divide(entries: Mapping[str, Any], path: str) -> None:
        for name, value in entries.items():
            if name in _INERT:
                continue
            if name.endswith("_config") and isinstance(value, dict):
                divide(value, f"{path}{name}.")
            else:
                parts[_factor_of(name)][f"{path}{name}"] = value

    divide(config, "")
    return parts


def _factor_of(name: str) -> Literal["rope", "attention", "config"]:
    if name.startswith(_ROPE):
        return "rope"
    return "attention" if name.startswith(_ATTENTION) else "config"


def _without(entries: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in entries.items() if name not in names}


def _plain(value: object) -> object:
    """A setting as JSON types; sets are sorted."""
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, Enum):
        return str(value.value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
