"""One forward for the sake of its KV states: the states of every layer, whole, and nothing computed behind them.

A layer's KV states exist before its attention and its MLP run, so once the last layer that keeps any has handed its own
over, the rest of the forward is thrown away: all of that layer, the layers that reuse other layers' states, and the
final norm. The cache layer that gets the last states ends the forward with an exception. transformers restores its
configuration and its output recorders on the way out (`finally` in `merge_with_config_defaults` and
`capture_outputs`), and attention has no state of its own. Whether a model hands over in the early forward what it
hands over in a whole one is asked of it by the probe (`blockrag.model.profile`).

Nothing here knows what the states are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.model.cache import LayerStructure

__all__ = ["CaptureLayer", "capture"]


class _AllCaptured(Exception):
    """Ends a forward; no error. An Exception, so that whatever cleans up after errors cleans up after it."""


class CaptureLayer(DynamicLayer):  # type: ignore[misc]
    """A layer for one forward from an empty cache: keeps the states it is given, whatever the layer's window is.

    transformers' windowed layer drops all but the last tokens, which a stored block needs.

    Args:
        index: The layer's place in the cache.
        awaited: The places that have no states yet, shared by the layers of a cache; the layer that takes the last
            one out ends the forward. None: nobody ends it.
    """

    def __init__(self, index: int, awaited: set[int] | None) -> None:
        super().__init__()
        self._index, self._awaited = index, awaited

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the states (batch, heads, tokens, head_dim) and return them as they are."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        if self._awaited is not None:
            self._awaited.discard(self._index)
            if not self._awaited:
                raise _AllCaptured
        return key_states, value_states

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (batch, heads, tokens, head_dim), which the layer then holds no longer."""
        keys, values = self.keys, self.values
        del self.keys, self.values
        return keys, values


@torch.no_grad()
def capture(
    model: PreTrainedModel, structure: LayerStructure, ids: torch.Tensor, offset: int, *, early: bool
) -> Sequence[CaptureLayer]:
    """Run tokens through the model without its language-model head, and keep the KV states.

    Args:
        model: The model, in evaluation mode.
        structure: Its layers.
        ids: Token ids, shape (batch, tokens); rows are independent, and causal attention needs no mask for padding
            on the right.
        offset: Position of the first token.
        early: Whether the forward ends when all states are there; see `ModelProfile.captures_early`.

    Returns:
        The layers that keep states, in their order, with `keys` and `values` (batch, heads, tokens, head_dim) as the
        model rotated them; `keys` is None where the model kept its states elsewhere.
    """
    awaited = set(structure.indices) if early else None
    kept = [CaptureLayer(index, awaited) for index in structure.indices]
    layers: list[Any] = [DummyLayer() for _ in range(structure.num_layers)]
    for index, layer in zip(structure.indices, kept, strict=True):
        layers[index] = layer
    positions = torch.arange(offset, offset + ids.shape[1], device=model.device)
    with contextlib.suppress(_AllCaptured):
        model.base_model(
            input_ids=ids.to(model.device),
            position_ids=positions[None].expand(ids.shape[0], -1),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
    return kept
