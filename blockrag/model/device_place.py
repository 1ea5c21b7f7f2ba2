"""Placing a run of blocks on a GPU: out of the device's pool, or across the bus while the model already computes.

Blocks that lie in ordinary host memory are copied, whole, through pinned memory as they come. Of blocks that lie in
pinned memory the first half of the layers is copied as they come, and the rest in the order of the layers once all are
known: the bus is busy from the first block on, and the model runs through the first layers while the last ones are on
their way. The cache's layers are then written when they are first used.

It works on a CPU as well, where every copy is over when it was asked for: for tests, as the kernel is only interpreted
there. Nothing here knows where blocks come from.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

import torch

from blockrag.kernels.at_rest import AtRest, PlacedBlock, payload_of
from blockrag.kernels.device import link_to
from blockrag.kernels.place import Rows
from blockrag.kv import BlockKV, KVLayout, LayerShape
from blockrag.rope import RopeSpec

if TYPE_CHECKING:
    from blockrag.kernels.device import Link, Mark
    from blockrag.model.device_pool import DevicePool, Lease
    from blockrag.quantize import StoredKV

__all__ = ["Defer", "DevicePlacement"]

logger = logging.getLogger(__name__)

# Called with what writes a layer; to be run before the layer is first read.
Defer = Callable[[Callable[[], None]], None]

# Below this a copy costs more to ask for than to carry out.
_COPY_BYTES: Final = 1 << 20


@dataclass(frozen=True, slots=True, eq=False)
class _Arrival:
    """A block on its way to the device; one that lies there already has its payload as its memory."""

    at_rest: AtRest
    payload: torch.Tensor
    memory: torch.Tensor
    positions: set[int] = field(default_factory=set)

    def part(self, layers: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Source and target of a range of layers."""
        part = slice(self.at_rest.borders[layers.start], self.at_rest.borders[layers.stop])
        return self.payload[part], self.memory[part]


class _Step:
    """Some layers, to be written behind a mark in the queue of copies; once, whoever asks first."""

    def __init__(self, placement: DevicePlacement, layers: range, mark: Mark) -> None:
        self._placement: DevicePlacement | None = placement
        self.layers, self._mark = layers, mark

    def write(self) -> None:
        """Give it to the current stream, if that has not been done."""
        placement, self._placement = self._placement, None
        if placement is not None:
            self._mark.wait()
            placement._write(self.layers)


class DevicePlacement:
    """A run of blocks on their way into a prompt's cache. `place` and `place_pooled` may be called from any thread.

    Args:
        rows: See `TritonPlacement`.
        end: Absolute position behind the last one that will be placed.
        pool: Hot blocks; what crosses the bus stays there if there is room.
        slots: See `TritonPlacement`.
        link: The device; by default the pool's, or that of the rows.
    """

    def __init__(
        self,
        rows: Sequence[Rows],
        end: int,
        *,
        pool: DevicePool[AtRest] | None = None,
        slots: torch.Tensor | None = None,
        link: Link | None = None,
    ) -> None:
        if link is None:
            link = link_to(rows[0].states.device) if pool is None else pool.link
        self._link, self._pool, self._end = link, pool, end
        self._num_layers = len(rows) // 2
        # Not before it is needed: the library may be absent.
        from blockrag.kernels.triton_place import TritonPlacement

        self._kernel = TritonPlacement(rows, end, link, slots)
        self._early = range(self._num_layers // 2)
        self._blocks: list[PlacedBlock] = []
        # By the block itself, as long as its owner keeps it: it may come in several pieces.
        self._arrivals: WeakKeyDictionary[StoredKV, _Arrival] = WeakKeyDictionary()
        # Those whose late layers are still to be copied.
        self._pinned: list[_Arrival] = []
        self._found: list[Lease[AtRest]] = []
        self._new: list[tuple[Lease[AtRest], AtRest]] = []
        # Memory on the device that is not the pool's; the kernel only has addresses.
        self._private: list[torch.Tensor] = []
        self._unwritten = self._num_layers
        self._lock = threading.Lock()

    @classmethod
    def of(cls, rows: Sequence[Rows], end: int, pool: DevicePool[AtRest] | None) -> DevicePlacement | None:
        """The placement for rows on a CUDA device, or on any device with a pool; None where this is not the way."""
        device = rows[0].states.device
        if pool is not None and pool.link.device != device:
            pool = None
        if (pool is None and device.type != "cuda") or not _works(device):
            return None
        return cls(rows, end, pool=pool)

    def place(
        self, kv: StoredKV, positions: Sequence[int], layers: range | None = None, key: str | None = None
    ) -> None:
        """Place a block; different blocks, and different layers of one, may come from different threads.

        Args:
            kv: The block, in host memory or on the device. Pinned memory is read until the copies are over.
            positions: Absolute positions of its first token; each holds for all layers.
            layers: A contiguous range of layers; all of them by default.
            key: The block's key, under which it stays in the pool.

        Raises:
            ValueError: The block does not lie within the run.
        """
        for position in positions:
            if position < 0 or position + kv.num_tokens > self._end:
                raise ValueError(
                    f"tokens {position} to {position + kv.num_tokens} do not fit a run that ends at {self._end}"
                )
        with self._lock:
            arrival = self._arrivals.get(kv) or self._expect(kv, key)
            self._add(arrival.at_rest, arrival.memory, [one for one in positions if one not in arrival.positions])
            arrival.positions.update(positions)
        chosen = range(self._num_layers) if layers is None else layers
        if arrival.memory is arrival.payload:
            return
        if not self._link.is_pinned(arrival.payload):
            self._link.fetch(*arrival.part(chosen))
        elif early := range(chosen.start, min(chosen.stop, self._early.stop)):
            self._link.fetch_pinned([arrival.part(early)])

    def place_pooled(self, key: str, positions: Sequence[int]) -> bool:
        """Place a block that the pool has; False where it has not."""
        lease = None if self._pool is None else self._pool.find(key)
        if lease is None:
            return False
        with self._lock:
            self._found.append(lease)
            self._add(lease.content, lease.memory, positions)
        return True

    def finish(self, defer: Sequence[Defer] | None = None) -> None:
        """Make the cache ready; once, after the last block.

        Args:
            defer: Per layer, what takes the function that writes it, to be called before the layer is read, with the
                stream current that reads it. Without it everything is written by work given to the current stream now.
        """
        self._kernel.take(self._blocks)
        steps = self._steps()
        for lease, at_rest in self._new:
            # All copies have been asked for: who finds it waits for them.
            lease.publish(at_rest)
        for step in steps:
            if defer is None or len(steps) == 1:
                step.write()
            else:
                for layer in step.layers:
                    defer[layer](step.write)

    def _expect(self, kv: StoredKV, key: str | None) -> _Arrival:
        """Find memory for a block that comes for the first time."""
        at_rest, payload = AtRest.of(kv), payload_of(kv)
        if payload.device == self._link.device and self._link.device.type != "cpu":
            memory = payload
            self._private.append(memory)
        elif self._pool is not None and key is not None and (lease := self._pool.reserve(key, payload.numel())):
            memory = lease.memory
            self._new.append((lease, at_rest))
        else:
            with self._link.copying():
                memory = torch.empty_like(payload, device=self._link.device)
            self._private.append(memory)
        arrival = self._arrivals[kv] = _Arrival(at_rest, payload, memory)
        if memory is not payload and self._link.is_pinned(payload):
            self._pinned.append(arrival)
        return arrival

    def _add(self, at_rest: AtRest, memory: torch.Tensor, positions: Sequence[int]) -> None:
        self._blocks += (PlacedBlock(at_rest, memory.data_ptr(), position) for position in positions)

    def _steps(self) -> list[_Step]:
        """Ask for the copies that are left, layer after layer; what can be written behind which of them."""
        if not self._pinned:
            return [_Step(self, range(self._num_layers), self._copied())]
        steps = [_Step(self, self._early, self._copied())] if self._early else []
        for layers in self._late():
            self._link.fetch_pinned([arrival.part(layers) for arrival in self._pinned])
            steps.append(_Step(self, layers, self._copied()))
        self._pinned.clear()
        return steps

    def _late(self) -> list[range]:
        """The layers behind the early ones, in pieces worth copying."""
        layer_bytes = sum(arrival.payload.numel() for arrival in self._pinned) / (len(self._pinned) * self._num_layers)
        size = max(1, round(_COPY_BYTES / max(layer_bytes, 1)))
        borders = [*range(self._early.stop, self._num_layers, size), self._num_layers]
        return [range(first, last) for first, last in pairwise(borders)]

    def _copied(self) -> Mark:
        """Behind every copy asked for so far, those of other prompts included."""
        with self._link.copying():
            return self._link.mark()

    def _write(self, layers: range) -> None:
        self._kernel.launch(layers)
        self._unwritten -= len(layers)
        if self._pool is not None:
            self._pool.used(self._link.mark())
        if self._unwritten:
            return
        for memory in self._private:
            self._link.used_here(memory)
        for lease in (*self._found, *(lease for lease, _ in self._new)):
            lease.release()
        self._private.clear()


@lru_cache(maxsize=16)
def _works(device: torch.device) -> bool:
    """Whether the kernel can be built and does what it should here; said once where it cannot."""
    if find_spec("triton") is None:
        logger.warning("Triton is not installed: blocks are placed on %s by torch, one tensor at a time", device)
        return False
    kv = BlockKV(KVLayout((LayerShape(1, 1, 1, 1),)), 2, torch.arange(4.0, device=device))
    rows = [Rows(torch.zeros(1, 2, 1, device=device), 0, RopeSpec()) for _ in range(2)]
    try:
        placement = DevicePlacement(rows, 2)
        placement.place(kv, [0])
        placement.finish()
        found = torch.cat([one.states.flatten() for one in rows]).tolist()
    except Exception as error:
        # Triton compiles at run time, with the machine's compiler: what it raises is not known beforehand.
        logger.warning("Triton does not work on %s, blocks are placed by torch: %s", device, error)
        return False
    if found != [0.0, 1.0, 2.0, 3.0]:
        logger.warning("Triton gives wrong results on %s (%s), blocks are placed by torch", device, found)
        return False
    return True
