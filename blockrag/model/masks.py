"""The block mask as a model takes it: one mask, or one for each type of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from blockrag.attention import TokenLayout, additive_mask, flex_mask, layout_mask

if TYPE_CHECKING:
    import torch
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PreTrainedModel

    from blockrag.model.cache import LayerStructure

__all__ = ["mask_argument"]


def mask_argument(model: PreTrainedModel, structure: LayerStructure, layout: TokenLayout) -> object:
    """What to pass as `attention_mask` so that the model attends as `layout` says.

    Args:
        model: The model; its attention function must take a dense mask, or be FlexAttention.
        structure: Its layers and windows.
        layout: Where the tokens belong, on the model's device.

    Returns:
        A mask, (rows, 1, tokens, tokens) bool, or additive for eager attention, or a BlockMask for FlexAttention; for
        models that mix layer types a dictionary from layer type to mask.
    """
    windows = {window for window in structure.windows if window is not None}
    full = _as_argument(model, layout, None)
    if not windows:
        return full
    windowed = _as_argument(model, layout, min(windows))
    # Models that mix layer types take one mask per type; those with windows everywhere take one mask.
    layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    if None not in structure.windows and len(layer_types) <= 1:
        return windowed
    return {layer_type: windowed if "sliding" in layer_type else full for layer_type in layer_types}


def _as_argument(model: PreTrainedModel, layout: TokenLayout, window: int | None) -> torch.Tensor | BlockMask:
    implementation = model.config._attn_implementation
    if implementation == "flex_attention":
        return flex_mask(layout, window=window)
    mask = layout_mask(layout, window=window)
    if implementation == "eager":
        mask = additive_mask(mask, model.dtype)
    return mask[:, None]
