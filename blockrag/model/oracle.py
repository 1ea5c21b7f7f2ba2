"""The oracle: logits of a whole prompt in one forward under the dense block mask.

Slow and quadratic in memory, and therefore never used to answer. It is what every other path is compared with, at
load time on a few tokens and in the tests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from blockrag.attention import TokenLayout
from blockrag.model.masks import mask_argument

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
    layout = TokenLayout.of_segments([len(block) for block in blocks], local, device=model.device)
    mask = mask_argument(model, structure, layout)
    positions = torch.arange(ids.shape[1], device=model.device)[None]
    logits: torch.Tensor = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits[0]
    return logits
