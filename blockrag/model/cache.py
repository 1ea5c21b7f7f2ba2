"""The cache of one running prompt: cache layers that grow in place inside one pooled buffer.

A cache lives for one answer, or for one conversation. transformers' own dynamic cache concatenates the whole cache for
every layer and token, which is 5 to 7 times the cost of decoding at 32K tokens, and freshly allocated memory costs 2 to
3 times the copy into it. So all layers of a prompt are views of one buffer, taken from a pool, with room for the
answer; a layer appends by writing behind its last token. Windowed layers hold only the tokens that can still be seen.

Prompts that decode together share one buffer with a row for each. All rows end in the same column, so that the distance
of two columns is the distance of two positions in every row, and windows are exact; what is left of a shorter prompt is
padding, zero because a mask only makes its weight zero. A row is filled through a `PromptCache` like any other prompt.

Nothing here knows where KV states come from or how keys are rotated.
Source: https://huggingface.co/docs/transformers/kv_cache
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from blockrag.kv import KVLayout, LayerShape
from blockrag.model.pool import BufferPool

__all__ = [
    "BatchCache",
    "GrowingLayer",
    "GrowingSlidingLayer",
    "LayerStructure",
    "PromptCache",
    "PromptSize",
]

# A kernel that reads 64 bytes at a time must not straddle two layers.
_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class LayerStructure:
    """Which of a model's cache layers keep KV states, and how far each of them sees."""

    num_layers: int
    indices: tuple[int, ...]
    windows: tuple[int | None, ...]


class GrowingLayer(DynamicLayer):  # type: ignore[misc]
    """A full-attention layer that appends in place.

    Args:
        keys: Room for the keys, shape (batch, key_heads, capacity, key_dim).
        values: Room for the values, shape (batch, value_heads, capacity, value_dim).
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True
        self._key_room, self._value_room = keys, values
        # Whether the room is still the one it began with.
        self.in_place = True
        self._deferred: list[Callable[[], None]] = []
        self._set_length(0)

    def _set_length(self, length: int) -> None:
        self._length = length
        self.keys = self._key_room[:, :, :length]
        self.values = self._value_room[:, :, :length]

    def defer(self, write: Callable[[], None]) -> None:
        """Have tokens that were appended written by `write`, called before their content is first used."""
        self._deferred.append(write)

    def settle(self) -> None:
        """Write what was deferred."""
        deferred, self._deferred = self._deferred, []
        for write in deferred:
            write()

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more; moves to a larger buffer of its own when the pooled one is full."""
        needed = self._length + tokens
        if needed <= self._key_room.shape[2]:
            return
        self.settle()
        capacity = needed + needed // 4 + 64
        self.in_place = False
        for name in ("_key_room", "_value_room"):
            room = getattr(self, name)
            larger = room.new_empty(*room.shape[:2], capacity, room.shape[-1])
            larger[:, :, : self._length] = room[:, :, : self._length]
            setattr(self, name, larger)

    def extend(self, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append `tokens` tokens of undefined content.

        Returns:
            Views of the new keys and values, shapes (batch, heads, tokens, head_dim), to be written by the caller.
        """
        self.reserve(tokens)
        start = self._length
        self._set_length(start + tokens)
        return self.keys[:, :, start:], self.values[:, :, start:]

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Append states (batch, heads, tokens, head_dim); returns all keys and values the tokens may attend to."""
        self.settle()
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

    @property
    def free(self) -> int:
        """Tokens that can be appended before anything must move."""
        return int(self._key_room.shape[2]) - self._length

    def compact(self, rows: Sequence[int], tokens: int) -> None:
        """Keep some sequences of the batch and the last `tokens` tokens, in the same room.

        Args:
            rows: Indices into the batch, ascending.
            tokens: No more than there are.
        """
        self.settle()
        first = self._length - tokens
        for name in ("_key_room", "_value_room"):
            room = getattr(self, name)
            for target, row in enumerate(rows):
                if target != row:
                    room[target, :, first : self._length] = room[row, :, first : self._length]
            setattr(self, name, room[: len(rows), :, first:])
        self._set_length(tokens)

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
        self._deferred.clear()
        self._set_length(0)

    def _adopt(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Continue on tensors of another batch size (beam search); leaves the pooled buffer."""
        self.in_place = False
        self._key_room, self._value_room = keys, values
        self._set_length(keys.shape[2])

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the batch for beam search."""
        self.settle()
        self._adopt(self.keys.index_select(0, beam_idx), self.values.index_select(0, beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence of the batch."""
        self.settle()
        self._adopt(self.keys.repeat_interleave(repeats, dim=0), self.values.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these sequences of the batch."""
        self.settle()
        self._adopt(self.keys[indices, ...], self.values[indices, ...])


class GrowingSlidingLayer(DynamicSlidingWindowLayer):  # type: ignore[misc]
    """A sliding-window layer that appends in place and hands out only what the window can see.

    Args:
        keys: Room for the keys, shape (batch, key_heads, capacity, key_dim).
        values: Room for the values, shape (batch, value_heads, capacity, value_dim).
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

    def defer(self, write: Callable[[], None]) -> None:
        """See `GrowingLayer.defer`."""
        self._rows.defer(write)

    def settle(self) -> None:
        """Write what was deferred."""
        self._rows.settle()

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more, dropping first what no window reaches any more."""
        if self._rows.get_seq_length() + tokens > self._rows._key_room.shape[2]:
            self.settle()
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
        self.settle()
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

    @property
    def free(self) -> int:
        """Tokens that can be appended before anything must move."""
        return self._rows.free

    @property
    def in_place(self) -> bool:
        """Whether the room is still the one it began with."""
        return self._rows.in_place

    def compact(self, rows: Sequence[int], tokens: int) -> None:
        """Keep some sequences of the batch, which see `tokens` tokens from now on; see `GrowingLayer.compact`."""
        held = min(self._rows.get_seq_length(), tokens)
        self._rows.compact(rows, held)
        self._skipped = tokens - held
        self._show(held)

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

    kv_layers: tuple[GrowingLayer | GrowingSlidingLayer, ...]
    # Whether a forward goes through these very layers, so that they may be written when it gets there.
    may_defer = True

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
        plans = [
            _LayerPlan(shape, capacity - _unseen(window, skipped))
            for shape, window in zip(layout.layers, structure.windows, strict=True)
        ]
        self._pool = pool
        self._buffer: torch.Tensor | None = pool.acquire(_nbytes(plans, 1, dtype), device)
        self._open(structure, _carved(self._buffer, plans, 1, dtype))

    def _open(self, structure: LayerStructure, rooms: Sequence[_Room]) -> None:
        self.kv_layers = _layers_in(rooms, structure)
        super().__init__(layers=_placed(self.kv_layers, structure))

    @property
    def num_tokens(self) -> int:
        """Tokens seen so far."""
        return int(self.kv_layers[0].get_seq_length())

    @property
    def nbytes(self) -> int:
        """Bytes of the pooled buffer."""
        return 0 if self._buffer is None else self._buffer.numel()

    def release(self, *, key: Hashable | None = None, tokens: int = 0) -> None:
        """Give the buffer back to the pool; the cache must not be used afterwards. Safe to call twice.

        Args:
            key: Keep the first tokens for `reopened` with this key, where every layer still holds them in the buffer.
            tokens: How many.
        """
        buffer, self._buffer = self._buffer, None
        if buffer is None:
            return
        if key is not None and self._rewind(tokens):
            self._pool.release(buffer, key=key, content=self)
        else:
            self._pool.release(buffer)

    @staticmethod
    def reopened(pool: BufferPool, key: Hashable, *, free: int) -> PromptCache | None:
        """The cache that was kept under a key, if it has room for `free` tokens more."""

        def fits(content: object) -> bool:
            return isinstance(content, PromptCache) and all(layer.free >= free for layer in content.kv_layers)

        found = pool.take(key, fits)
        if found is None or not isinstance(found[1], PromptCache):
            return None
        cache = found[1]
        cache._buffer = found[0]
        return cache

    def _rewind(self, tokens: int) -> bool:
        """Forget all but the first tokens, where that is possible; after an error the layers differ in length."""
        for layer in self.kv_layers:
            layer.settle()
        surplus = [int(layer.get_seq_length()) - tokens for layer in self.kv_layers]
        for layer, count in zip(self.kv_layers, surplus, strict=True):
            if not layer.in_place or not 0 <= count <= layer.forgettable:
                return False
        for layer, count in zip(self.kv_layers, surplus, strict=True):
            layer.crop(-count)
        return True


class _Row(PromptCache):
    """A prompt's cache in one row of a batch's buffer, which stays the batch's."""

    may_defer = False

    def __init__(self, structure: LayerStructure, rooms: Sequence[_Room]) -> None:
        self._buffer = None
        self._open(structure, rooms)


@dataclass(frozen=True, slots=True)
class PromptSize:
    """What a prompt needs of a batch's buffer.

    Args:
        tokens: Its tokens.
        skipped: Of these, the leading ones that windowed layers need not hold; see `PromptCache`.
    """

    tokens: int
    skipped: int


class BatchCache(Cache):  # type: ignore[misc]
    """The caches of several prompts in one pooled buffer, a row each, all ending in the same column.

    Fill each row through `row` first; the cache as a whole then holds the longest prompt's number of tokens, and a
    forward appends one column per token to all rows.

    Args:
        layout: Shapes of the layers that keep KV states.
        structure: Which layers those are, and how far each of them sees.
        sizes: The prompts.
        room: Tokens to make room for behind them.
        dtype: The dtype the model computes in.
        device: The model's device.
        pool: Where the buffer comes from and goes back to.
    """

    def __init__(
        self,
        layout: KVLayout,
        structure: LayerStructure,
        sizes: Sequence[PromptSize],
        *,
        room: int,
        dtype: torch.dtype,
        device: torch.device,
        pool: BufferPool,
    ) -> None:
        self._pool, self._structure = pool, structure
        # Tokens of each row, per layer.
        self._held = [[size.tokens - _unseen(window, size.skipped) for size in sizes] for window in structure.windows]
        plans = [_LayerPlan(shape, max(held) + room) for shape, held in zip(layout.layers, self._held, strict=True)]
        self._buffer: torch.Tensor | None = pool.acquire(_nbytes(plans, len(sizes), dtype), device)
        self._rooms = _carved(self._buffer, plans, len(sizes), dtype)
        self.kv_layers = _layers_in(self._rooms, structure)
        longest = max(size.tokens for size in sizes)
        for layer, held in zip(self.kv_layers, self._held, strict=True):
            if isinstance(layer, GrowingSlidingLayer):
                layer.skip(longest - max(held))
            layer.extend(max(held))
        super().__init__(layers=_placed(self.kv_layers, structure))

    @staticmethod
    def nbytes_for(
        layout: KVLayout, structure: LayerStructure, sizes: Sequence[PromptSize], *, room: int, dtype: torch.dtype
    ) -> int:
        """Bytes of the buffer for these prompts."""
        plans = [
            _LayerPlan(shape, room + max(size.tokens - _unseen(window, size.skipped) for size in sizes))
            for shape, window in zip(layout.layers, structure.windows, strict=True)
        ]
        return _nbytes(plans, len(sizes), dtype)

    def row(self, index: int) -> PromptCache:
        """The empty cache of one prompt, to be filled with exactly its tokens."""
        rooms = []
        for (keys, values), held in zip(self._rooms, self._held, strict=True):
            first = max(held) - held[index]
            keys[index, :, :first] = 0
            values[index, :, :first] = 0
            rooms.append((keys[index : index + 1, :, first:], values[index : index + 1, :, first:]))
        return _Row(self._structure, rooms)

    def compact(self, rows: Sequence[int], tokens: int) -> None:
        """Keep these rows, ascending, and the last `tokens` columns; rows made by `row` are no longer valid."""
        for layer in self.kv_layers:
            layer.compact(rows, tokens)

    def release(self) -> None:
        """Give the buffer back to the pool; neither cache nor rows may be used afterwards. Safe to call twice."""
        buffer, self._buffer = self._buffer, None
        if buffer is not None:
            self._pool.release(buffer)


# Room for one layer's keys and values, each (batch, heads, capacity, dim).
_Room = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class _LayerPlan:
    """One layer's part of the buffer: its shape and the tokens it has room for."""

    shape: LayerShape
    capacity: int


def _unseen(window: int | None, skipped: int) -> int:
    """Of `skipped` leading tokens, those that no later token sees: the next one sees window - 1 before it."""
    return 0 if window is None else max(0, skipped - (window - 1))


def _layers_in(rooms: Sequence[_Room], structure: LayerStructure) -> tuple[GrowingLayer | GrowingSlidingLayer, ...]:
    return tuple(
        GrowingLayer(keys, values) if window is None else GrowingSlidingLayer(keys, values, window=window)
        for (keys, values), window in zip(rooms, structure.windows, strict=True)
    )


def _placed(kv_layers: Sequence[Any], structure: LayerStructure) -> list[Any]:
    """The layers at their places among the model's; the others keep nothing."""
    layers: list[Any] = [DummyLayer() for _ in range(structure.num_layers)]
    for index, layer in zip(structure.indices, kv_layers, strict=True):
        layers[index] = layer
    return layers


def _nbytes(plans: Sequence[_LayerPlan], rows: int, dtype: torch.dtype) -> int:
    sizes = (size * rows * plan.capacity for plan in plans for size in (plan.shape.key_size, plan.shape.value_size))
    return sum(_aligned(size * dtype.itemsize) for size in sizes)


def _carved(buffer: torch.Tensor, plans: Sequence[_LayerPlan], rows: int, dtype: torch.dtype) -> list[_Room]:
    """The layers' rooms, one behind the other in the buffer."""
    offset, rooms = 0, []
    for plan in plans:
        views = []
        for heads, dim in (
            (plan.shape.key_heads, plan.shape.key_dim),
            (plan.shape.value_heads, plan.shape.value_dim),
        ):
            nbytes = rows * heads * plan.capacity * dim * dtype.itemsize
            views.append(buffer[offset : offset + nbytes].view(dtype).view(rows, heads, plan.capacity, dim))
            offset += _aligned(nbytes)
        rooms.append((views[0], views[1]))
    return rooms


def _aligned(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT
