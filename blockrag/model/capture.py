"""One forward for the sake of its KV states: the states of every layer, whole, and nothing computed behind them.

A layer's KV states exist before its attention and its MLP run, so once the last layer that keeps any has handed its own
over, the rest of the forward is thrown away: all of that layer, the layers that reuse other layers' states, and the
final norm. The cache layer that gets the last states ends the forward with an exception. transformers restores its
configuration and its output recorders on the way out (`finally` in `merge_with_config_defaults` and
`capture_outputs`), and attention has no state of its own. Whether a model hands over in the early forward what it
hands over in a whole one is asked of it by the probe (`blockrag.model.profile`).

The states are handed on layer by layer, so that no more of them are kept than the caller wants. Nothing here knows
what they are for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.model.cache import LayerStructure

__all__ = ["CaptureLayer", "Take", "capture"]

Take: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], None]


class _AllCaptured(Exception):
    """Ends a forward; no error. An Exception, so that whatever cleans up after errors cleans up after it."""


class CaptureLayer(DynamicLayer):  # type: ignore[misc]
    """A layer for one forward from an empty cache: hands on the states it is given, whatever the layer's window is.

    transformers' windowed layer drops all but the last tokens, which a stored block needs.

    Args:
        place: The layer's place among those that keep states.
        take: Where its states go.
        awaited: The places that have no states yet, shared by the layers of a cache; the layer that takes the last
            one out ends the forward. None: nobody ends it, and the layer keeps its states for models that look.
    """

    def __init__(self, place: int, take: Take, awaited: set[int] | None) -> None:
        super().__init__()
        self._place, self._take, self._awaited = place, take, awaited

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Hand the states (batch, heads, tokens, head_dim) on and return them as they are."""
        self._take(self._place, key_states, value_states)
        if self._awaited is None:
            self.dtype, self.device = key_states.dtype, key_states.device
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return key_states, value_states
        self._awaited.discard(self._place)
        if not self._awaited:
            raise _AllCaptured
        return key_states, value_states


@torch.no_grad()
def capture(
    model: PreTrainedModel, structure: LayerStructure, ids: torch.Tensor, offset: int, take: Take, *, early: bool
) -> None:
    """Run tokens through the model without its language-model head, for their KV states.

    Args:
        model: The model, in evaluation mode.
        structure: Its layers.
        ids: Token ids, shape (batch, tokens); rows are independent, and causal attention needs no mask for padding
            on the right.
        offset: Position of the first token.
        take: Called with each layer that keeps states, while they are still in the processor's cache: its place among
            these layers, and its keys and values as the model rotated them, (batch, heads, tokens, head_dim) each, to
            be read only. Called again where the model replaces them. Not called for a layer whose states the model
            keeps elsewhere.
        early: Whether the forward ends when all layers have been taken; see `ModelProfile.captures_early`.
    """
    awaited = set(range(len(structure.indices))) if early else None
    layers: list[Any] = [DummyLayer() for _ in range(structure.num_layers)]
    for place, index in enumerate(structure.indices):
        layers[index] = CaptureLayer(place, take, awaited)
    positions = torch.arange(offset, offset + ids.shape[1], device=model.device)
    with contextlib.suppress(_AllCaptured):
        model.base_model(
            input_ids=ids.to(model.device),
            position_ids=positions[None].expand(ids.shape[0], -1),
            past_key_values=Cache(layers=layers),
            use_cache=True,
        )
