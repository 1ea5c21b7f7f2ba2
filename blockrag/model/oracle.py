"""The oracle: logits of a whole prompt in one forward under the dense block mask.

Slow and quadratic in memory, and therefore never used to answer. It is what every other path is compared with, at
load time on a few tokens and in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from blockrag.attention import additive_mask, block_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.model.cache import LayerStructure

__all__ = ["oracle_logits"]


@torch.no_grad()
def oracle_logits(
    model: PreTrainedModel,
    structure: LayerStructure,
    blocks: Sequence[Sequence[int]],
    local: Sequence[bool],
) -> torch.Tensor:
    """One forward of the whole prompt under its block mask.

    Args:
        model: The model; its attention must take a dense mask (not flash attention).
        structure: Its layers and windows.
        blocks: Token ids of each block.
        local: Whether each block attends only to itself.

    Returns:
        Logits of shape (tokens, vocabulary), in the model's dtype.
    """
    ids = torch.tensor([[token for block in blocks for token in block]], device=model.device)
    lengths = [len(block) for block in blocks]
    windows = {window for window in structure.windows if window is not None}
    full = _as_argument(model, block_mask(lengths, local))
    if not windows:
        mask: object = full
    else:
        windowed = _as_argument(model, block_mask(lengths, local, window=min(windows)))
        # Models that mix layer types take one mask per type; those with windows everywhere take one mask.
        layer_types = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
        mixed = None in structure.windows or len(layer_types) > 1
        mask = {t: windowed if "sliding" in t else full for t in layer_types} if mixed else windowed
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
    return logits


def _as_argument(model: PreTrainedModel, mask: torch.Tensor) -> torch.Tensor:
    """(1, 1, tokens, tokens), additive where the model's own attention is in use, boolean otherwise."""
    if model.config._attn_implementation == "eager":
        mask = additive_mask(mask, model.dtype)
    return mask[None, None].to(model.device)
