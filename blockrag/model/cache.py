"""The cache of one running prompt: cache layers that grow in place inside one pooled buffer.

A cache lives for one generation. transformers' own dynamic cache concatenates the whole cache for every layer and
token, which is 5 to 7 times the cost of decoding at 32K tokens, and freshly allocated memory costs 2 to 3 times the
copy into it. So all layers of a prompt are views of one buffer, taken from a pool, with room for the answer; a layer
appends by writing behind its last token. Windowed layers hold only the tokens that can still be seen.

Nothing here knows where KV states come from or how keys are rotated.
Source: https://huggingface.co/docs/transformers/kv_cache
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from blockrag.kv import KVLayout, LayerShape

__all__ = ["BufferPool", "CaptureLayer", "GrowingLayer", "GrowingSlidingLayer", "LayerStructure", "PromptCache"]

# A kernel that reads 64 bytes at a time must not straddle two layers.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """Which of a model's cache layers keep KV states, and how far each of them sees."""

    num_layers: int
    indices: tuple[int, ...]
    windows: tuple[int | None, ...]


class BufferPool:
    """Reuses the large buffers of finished prompts, up to a byte cap.

    Args:
        max_bytes: Bytes kept for reuse; beyond that, what came back first is freed first.
    """

    def __init__(self, max_bytes: int = 4 << 30) -> None:
        self.max_bytes = max_bytes
        self._free: list[torch.Tensor] = []
        self._lock = threading.Lock()

    @property
    def free_bytes(self) -> int:
        """Bytes waiting for reuse."""
        with self._lock:
            return sum(buffer.numel() for buffer in self._free)

    def acquire(self, nbytes: int, device: torch.device) -> torch.Tensor:
        """A uint8 buffer of at least `nbytes` bytes, contents undefined: the smallest free one that is not wasteful."""
        with self._lock:
            fitting = [b for b in self._free if b.device == device and nbytes <= b.numel() <= 2 * nbytes + (1 << 20)]
            if fitting:
                best = min(fitting, key=torch.Tensor.numel)
                self._free = [b for b in self._free if b is not best]
                return best
        return torch.empty(nbytes, dtype=torch.uint8, device=device)

    def release(self, buffer: torch.Tensor) -> None:
        """Give a buffer back; the caller must not use any view of it afterwards."""
        with self._lock:
            self._free.append(buffer)
            while sum(b.numel() for b in self._free) > self.max_bytes:
                # The oldest: prompts tend to grow, and the sizes of today are those asked for next.
                self._free.pop(0)


class CaptureLayer(DynamicLayer):  # type: ignore[misc]
    """A layer for one forward from an empty cache: keeps the states it is given, whatever the layer's window is.

    transformers' windowed layer drops all but the last tokens, which a stored block needs.
    """

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Keep the states (batch, heads, tokens, head_dim) and return them as they are."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values, self.is_initialized = key_states, value_states, True
        return key_states, value_states


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A full-attention layer that appends in place.

    Args:
        keys: Room for the keys, shape (1, key_heads, capacity, key_dim).
        values: Room for the values, shape (1, value_heads, capacity, value_dim).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._key_room, self._value_room = keys, values
        self._set_length(0)

    def _set_length(self, length: int) -> None:
        self._length = length
        self.keys = self._key_room[:, :, :length]
        self.values = self._value_room[:, :, :length]

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; moves to a larger buffer of its own when the pooled one is full."""
        needed = self._length + tokens
        if needed <= self._key_room.shape[2]:
            return
        capacity = needed + needed // 4 + 64
        for name in ("_key_room", "_value_room"):
            room = getattr(self, name)
            larger = room.new_empty(*room.shape[:2], capacity, room.shape[-1])
            larger[:, :, : self._length] = room[:, :, : self._length]
            setattr(self, name, larger)

    def extend(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `tokens` tokens of undefined content.

        Returns:
            Views of the new keys and values, shapes (1, heads, tokens, head_dim), to be written by the caller.
        """
        self.reserve(tokens)
        start = self._length
        self._set_length(start + tokens)
        return self.keys[:, :, start:], self.values[:, :, start:]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append states (1, heads, tokens, head_dim); returns all keys and values the tokens may attend to."""
        keys, values = self.extend(key_states.shape[-2])
        keys.copy_(key_states)
        values.copy_(value_states)
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Tokens seen so far."""
        return self._length

    @property
    def forgettable(self) -> int:
        """Tokens `crop` can remove so that the next token still sees all it should."""
        return self._length

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens, or all there are.

        Raises:
            ValueError: The number is positive, which meant a final length in older releases of transformers.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}) is ambiguous; pass the tokens to remove as a negative number")
        self._set_length(max(0, self._length + tokens_to_remove))

    def reset(self) -> None:
        """Forget all tokens; the room stays."""
        self._set_length(0)

    def _adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Continue on tensors of another batch size (beam search); leaves the pooled buffer."""
        self._key_room, self._value_room = keys, values
        self._set_length(keys.shape[2])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch for beam search."""
        self._adopt(self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._adopt(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch."""
        self._adopt(self.keys[indices, ...], self.values[indices, ...])


class GrowingSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that appends in place and hands out only what the window can see.

    Args:
        keys: Room for the keys, shape (1, key_heads, capacity, key_dim).
        values: Room for the values, shape (1, value_heads, capacity, value_dim).
        window: Tokens a token sees, itself included.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, *, window: int) -> None:
        super().__init__(sliding_window=window)
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._rows = GrowingLayer(keys, values)
        # Tokens before the first one held: seen already, out of every future token's window.
        self._skipped = 0
        self._show(0)

    def _show(self, visible: int) -> None:
        held = self._rows.get_seq_length()
        self.keys = self._rows.keys[:, :, held - visible :]
        self.values = self._rows.values[:, :, held - visible :]
        self.cumulative_length = self._skipped + held

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, dropping first what no window reaches any more."""
        if self._rows.get_seq_length() + tokens > self._rows._key_room.shape[2]:
            keep = min(self.sliding_window - 1, self._rows.get_seq_length())
            self._skipped += self._rows.get_seq_length() - keep
            if keep:
                # The ranges may overlap: copy through a temporary of at most one window.
                self._rows._key_room[:, :, :keep] = self._rows.keys[:, :, -keep:].clone()
                self._rows._value_room[:, :, :keep] = self._rows.values[:, :, -keep:].clone()
            self._rows._set_length(keep)
            self._rows.reserve(tokens)

    def extend(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `tokens` tokens of undefined content; see `GrowingLayer.extend`."""
        visible = min(self._rows.get_seq_length(), self.sliding_window - 1) + tokens
        self.reserve(tokens)
        added = self._rows.extend(tokens)
        self._show(visible)
        return added

    def skip(self, tokens: int) -> None:
        """Count `tokens` tokens as seen without holding them; only on an empty layer."""
        self._skipped += tokens
        self._show(0)

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append states; returns the keys and values within the window of the first appended token."""
        keys, values = self.extend(key_states.shape[-2])
        keys.copy_(key_states)
        values.copy_(value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and first position of the keys the next `query_length` tokens will be given."""
        visible = min(self._rows.get_seq_length(), self.sliding_window - 1)
        return visible + query_length, self.cumulative_length - visible

    @property
    def forgettable(self) -> int:
        """Tokens `crop` can remove so that the next token still sees all it should."""
        held = self._rows.get_seq_length()
        return held - (self.sliding_window - 1) if self._skipped else held

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last `-tokens_to_remove` tokens.

        Raises:
            ValueError: The number is positive.
            RuntimeError: The next token would see tokens that were dropped already.
        """
        held = max(0, self._rows.get_seq_length() + tokens_to_remove)
        if self._skipped and tokens_to_remove < 0 and -tokens_to_remove > self.forgettable:
            raise RuntimeError(
                f"cannot forget {-tokens_to_remove} of the {self._rows.get_seq_length()} tokens this layer holds: "
                f"a window of {self.sliding_window} would reach before those; compose the prompt again"
            )
        self._rows.crop(tokens_to_remove)
        self._show(min(held, self.sliding_window - 1))

    def reset(self) -> None:
        """Forget all tokens; the room stays."""
        self._rows.reset()
        self._skipped = 0
        self._show(0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch for beam search."""
        self._rows.reorder_cache(beam_idx)
        self._show(self.keys.shape[2])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self._rows.batch_repeat_interleave(repeats)
        self._show(self.keys.shape[2])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch."""
        self._rows.batch_select_indices(indices)
        self._show(self.keys.shape[2])


class PromptCache(Cache):  # type: ignore[misc]
    """One prompt's cache: a layer per model layer, all inside one pooled buffer.

    Args:
        layout: Shapes of the layers that keep KV states.
        structure: Which layers those are, and how far each of them sees.
        capacity: Tokens to make room for; the cache grows beyond it at the price of a copy.
        skipped: Leading tokens that windowed layers need not hold, because the prompt goes on past their window.
        dtype: The dtype the model computes in.
        device: The model's device.
        pool: Where the buffer comes from and goes back to.
    """

    def __init__(
        self,
        layout: KVLayout,
        structure: LayerStructure,
        *,
        capacity: int,
        skipped: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: BufferPool,
    ) -> None:
        self._pool = pool
        plans = [
            _LayerPlan.of(shape, window, capacity, skipped)
            for shape, window in zip(layout.layers, structure.windows, strict=True)
        ]
        itemsize = dtype.itemsize
        self._buffer: torch.Tensor | None = pool.acquire(sum(p.nbytes(itemsize) for p in plans), device)
        layers: list[Any] = [DummyLayer() for _ in range(structure.num_layers)]
        offset = 0
        for index, plan, window in zip(structure.indices, plans, structure.windows, strict=True):
            keys, offset = _carve(self._buffer, offset, plan.shape.key_heads, plan.capacity, plan.shape.key_dim, dtype)
            values, offset = _carve(
                self._buffer, offset, plan.shape.value_heads, plan.capacity, plan.shape.value_dim, dtype
            )
            layers[index] = (
                GrowingLayer(keys, values) if window is None else GrowingSlidingLayer(keys, values, window=window)
            )
        self.kv_layers: tuple[GrowingLayer | GrowingSlidingLayer, ...] = tuple(layers[i] for i in structure.indices)
        super().__init__(layers=layers)

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far."""
        return int(self.kv_layers[0].get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of the pooled buffer."""
        return 0 if self._buffer is None else self._buffer.numel()

    def release(self) -> None:
        """Give the buffer back to the pool; the cache must not be used afterwards. Safe to call twice."""
        if self._buffer is not None:
            self._pool.release(self._buffer)
            self._buffer = None


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """One layer's part of the buffer: its shape and the tokens it has room for."""

    shape: LayerShape
    capacity: int

    @classmethod
    def of(cls, shape: LayerShape, window: int | None, capacity: int, skipped: int) -> _LayerPlan:
        # The first token after the skipped ones sees window - 1 tokens before it.
        unseen = 0 if window is None else max(0, skipped - (window - 1))
        return cls(shape, capacity - unseen)

    def nbytes(self, itemsize: int) -> int:
        keys = _aligned(self.shape.key_size * self.capacity * itemsize)
        return keys + _aligned(self.shape.value_size * self.capacity * itemsize)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _carve(
    buffer: torch.Tensor, offset: int, heads: int, capacity: int, dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """A view (1, heads, capacity, dim) of the buffer at a byte offset, and the offset behind it."""
    nbytes = heads * capacity * dim * dtype.itemsize
    view = buffer[offset : offset + nbytes].view(dtype).view(1, heads, capacity, dim)
    return view, offset + _aligned(nbytes)
