"""What no implementation can be faster than on this machine, and how much work the question leaves.

A bound is counted work at a measured rate: floating-point operations at the matrix rate, or one read of the weights
where that takes longer; composing adds one read of the blocks at rest and one write of the cache at the copy rate, and
on a GPU the blocks' way there. What a medium adds to a read, and everything that is not a large product, is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from blockrag.errors import InputError
from blockrag.evaluation.flops import FirstTokenFlops, ModelShape, flops_to_first_token, reduction_percent

if TYPE_CHECKING:
    from blockrag.evaluation.speed.machine import Rates
    from blockrag.evaluation.speed.shapes import Subject

__all__ = ["Work", "model_shape"]


def model_shape(subject: Subject) -> ModelShape | None:
    """The numbers FLOPs depend on; None for a model they cannot be read off, which then has no bounds."""
    try:
        return ModelShape.from_config(subject.model.model.config)
    except InputError:
        return None


@dataclass(frozen=True, slots=True)
class Work:
    """The work of one prompt.

    Args:
        shape: The model's numbers.
        weight_bytes: Bytes of the weights that a forward reads.
        blocks: Tokens of each passage.
        query: Tokens of the query.
        at_rest_bytes: Bytes of the passages' KV states as they are kept.
        cache_bytes: Bytes of the passages' KV states in the cache.
    """

    shape: ModelShape
    weight_bytes: int
    blocks: tuple[int, ...]
    query: int
    at_rest_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, subject: Subject, blocks: Sequence[int], query: int, at_rest_bytes: int) -> Work | None:
        """The work of a prompt of these lengths; None for a model whose numbers are not known."""
        shape = model_shape(subject)
        if shape is None:
            return None
        weights = shape.num_parameters * subject.model.model.dtype.itemsize
        return cls(shape, weights, tuple(blocks), query, at_rest_bytes, subject.cache_bytes(sum(blocks)))

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return sum(self.blocks) + self.query

    def full_s(self, rates: Rates) -> float:
        """The whole prompt prefilled."""
        return self._compute_s(self._full().with_attention, rates)

    def cold_s(self, rates: Rates) -> float:
        """Every passage computed by itself, then the query."""
        counted = flops_to_first_token(num_tokens=self.query, shape=self.shape, missed_blocks=self.blocks)
        return self._compute_s(counted.with_reuse, rates)

    def query_s(self, rates: Rates) -> float:
        """The query over a cache that is there already."""
        return self._compute_s(self._warm().with_attention, rates)

    def warm_s(self, rates: Rates, *, at_rest_bytes: int | None = None) -> float:
        """The passages' blocks brought into a cache, then the query.

        Args:
            rates: What the machine reaches.
            at_rest_bytes: Bytes read; by default those of the store.
        """
        read = self.at_rest_bytes if at_rest_bytes is None else at_rest_bytes
        return self._transfer_s(rates, read) + self.query_s(rates)

    def growing_s(self, rates: Rates, *, read_bytes: int | None) -> float:
        """The part of a warm request that grows with the prompt, without the floor that reading the weights sets.

        Args:
            rates: What the machine reaches.
            read_bytes: Bytes of KV states read and placed; None where the cache is there already.
        """
        products = (self._warm().with_attention or 0) / rates.matrix_flops_per_s
        return products + (0.0 if read_bytes is None else self._transfer_s(rates, read_bytes))

    def flops(self) -> dict[str, Any]:
        """FLOPs to the first token of the full and the warm prompt, three ways, and the reduction in percent."""
        full, warm = self._full(), self._warm()
        return {
            "full": asdict(full),
            "block": asdict(warm),
            "reduction_percent": {
                "paper": reduction_percent(full.paper, warm.paper),
                "with_attention": reduction_percent(full.with_attention or 0, warm.with_attention or 0),
                "with_reuse": reduction_percent(full.with_reuse or 0, warm.with_reuse or 0),
            },
        }

    def _full(self) -> FirstTokenFlops:
        return flops_to_first_token(num_tokens=self.num_tokens, shape=self.shape)

    def _warm(self) -> FirstTokenFlops:
        return flops_to_first_token(num_tokens=self.query, shape=self.shape, reused_tokens=sum(self.blocks))

    def _transfer_s(self, rates: Rates, read: int) -> float:
        # A copy reads and writes every byte.
        seconds = (read + self.cache_bytes) / (2 * rates.copy_bytes_per_s)
        if rates.upload_bytes_per_s is not None:
            seconds += read / rates.upload_bytes_per_s
        return seconds

    def _compute_s(self, flops: int | None, rates: Rates) -> float:
        read_weights_s = self.weight_bytes / (2 * rates.copy_bytes_per_s)
        return float(max((flops or 0) / rates.matrix_flops_per_s, read_weights_s))
