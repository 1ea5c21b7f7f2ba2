r"""Floating-point operations to the first token (FLOPs-TFT), counted three ways.

The paper's way (arXiv 2409.15355, Table 3) is 2 * P * n: P parameters without the input embedding, n tokens computed
at question time. It leaves out the attention products, which at 32 thousand tokens are more than a third of the work,
and counts the output projection for every token. The second way puts both right. The third adds what reusing blocks
costs at question time: rotating their keys to their places, and encoding the blocks the store did not have.

Only multiplications and additions of the large products are counted; norms, softmax, activations and sampling are not.
These are counts, not times: moving KV states from a store costs time and no FLOPs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_DOWN, Decimal
from typing import Any

from blockrag.errors import InputError

__all__ = ["FirstTokenFlops", "ModelShape", "flops_to_first_token", "reduction_percent", "truncate"]


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The numbers of a decoder that its FLOPs depend on.

    Args:
        num_layers: Decoder layers, all with full attention.
        num_heads: Query heads.
        num_kv_heads: Key and value heads.
        head_dim: Elements of a head.
        rotary_dim: Elements of a key head that the position rotates; 0 without rotary positions.
        body_parameters: Parameters that one token passes through, without embedding and output projection.
        output_parameters: Parameters of the output projection.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    body_parameters: int
    output_parameters: int

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or value < (0 if name == "rotary_dim" else 1):
                raise InputError(f"{name} of a model shape must be a positive integer, got {value!r}")

    @property
    def num_parameters(self) -> int:
        """Parameters without the input embedding, the P of the paper's count."""
        return self.body_parameters + self.output_parameters

    @classmethod
    def from_config(cls, config: Any) -> ModelShape:
        """Read the numbers off a Llama-like transformers config: gated MLP, grouped-query attention, or experts of it.

        Biases are left out (below 0.1 % of the parameters). Of a mixture of experts the active experts and the router
        count, in every layer.

        Raises:
            InputError: The config lacks one of the numbers.
        """
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
        hidden, layers = _number(text, "hidden_size"), _number(text, "num_hidden_layers")
        heads = _number(text, "num_attention_heads")
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or hidden // heads
        attention = 2 * hidden * heads * head_dim + 2 * hidden * kv_heads * head_dim
        rope = getattr(text, "rope_parameters", None) or {}
        partial = rope.get("partial_rotary_factor") or getattr(text, "partial_rotary_factor", None) or 1.0
        return cls(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * partial),
            body_parameters=layers * (attention + _mlp_parameters(text, hidden) + 2 * hidden),
            output_parameters=hidden * _number(text, "vocab_size"),
        )


@dataclass(frozen=True, slots=True)
class FirstTokenFlops:
    """FLOPs to the first token; the last two are None where no model shape was given.

    Args:
        paper: 2 * P * n.
        with_attention: Plus the attention products, with one row of the output projection.
        with_reuse: Plus the rotation of reused keys and the encoding of blocks that were missing.
    """

    paper: int
    with_attention: int | None = None
    with_reuse: int | None = None


def flops_to_first_token(
    *,
    num_tokens: int,
    num_parameters: int | None = None,
    shape: ModelShape | None = None,
    reused_tokens: int = 0,
    missed_blocks: Sequence[int] = (),
) -> FirstTokenFlops:
    """Count the work between a question and the first token of its answer.

    Args:
        num_tokens: Tokens computed with everything before them in sight: the query block under block attention, the
            whole prompt under full attention.
        num_parameters: Parameters without the input embedding; by default those of `shape`.
        shape: The model's numbers; needed for all but the paper's count.
        reused_tokens: Tokens before them whose KV states come from a store.
        missed_blocks: Lengths of the blocks before them whose KV states are computed now.

    Raises:
        InputError: A number is negative, there is no token, or neither `num_parameters` nor `shape` is given.
    """
    if num_tokens < 1 or reused_tokens < 0 or any(length < 1 for length in missed_blocks):
        raise InputError(
            f"FLOPs need at least one token and no negative counts, got {num_tokens} tokens, {reused_tokens} reused, "
            f"missed blocks {list(missed_blocks)}"
        )
    if num_parameters is None and shape is None:
        raise InputError("FLOPs need num_parameters or a shape; pass e.g. ModelShape.from_config(model.config)")
    if num_parameters is None and shape is not None:
        num_parameters = shape.num_parameters
    paper = 2 * int(num_parameters or 0) * num_tokens
    if shape is None:
        return FirstTokenFlops(paper=paper)
    context = reused_tokens + sum(missed_blocks)
    query = _prefill_flops(shape, num_tokens, context) + 2 * shape.output_parameters
    # x * cos + rotated(x) * sin: three operations per element of every key that is put in its place.
    rotation = 3 * shape.num_layers * shape.num_kv_heads * shape.rotary_dim * context
    misses = sum(_prefill_flops(shape, length, 0) for length in missed_blocks)
    return FirstTokenFlops(paper=paper, with_attention=query, with_reuse=query + rotation + misses)


def reduction_percent(full: float, block: float) -> float:
    """How much of the work of `full` is saved, in percent.

    Raises:
        InputError: `full` is not positive.
    """
    if full <= 0:
        raise InputError(f"a reduction needs a positive count to compare with, got {full!r}")
    return 100.0 * (1.0 - block / full)


def truncate(value: float, *, digits: int) -> float:
    """Cut a number to its first significant digits, as the paper's table does (2.459e14 to 3 digits is 2.45e14)."""
    number = Decimal(value)
    if not number:
        return 0.0
    step = Decimal(1).scaleb(number.adjusted() - digits + 1)
    return float((number / step).to_integral_value(rounding=ROUND_DOWN) * step)


def _prefill_flops(shape: ModelShape, num_tokens: int, context: int) -> int:
    """Work of the body for tokens that see `context` tokens and, causally, each other."""
    pairs = num_tokens * (num_tokens + 1) // 2 + num_tokens * context
    products = 4 * shape.num_layers * shape.num_heads * shape.head_dim * pairs
    return 2 * shape.body_parameters * num_tokens + products


def _mlp_parameters(config: Any, hidden: int) -> int:
    experts = getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None)
    if not experts:
        return 3 * hidden * _number(config, "intermediate_size")
    size = getattr(config, "moe_intermediate_size", None) or _number(config, "intermediate_size")
    return _number(config, "num_experts_per_tok") * 3 * hidden * int(size) + hidden * int(experts)


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    if not isinstance(value, int) or value < 1:
        raise InputError(
            f"{type(config).__name__}.{name} is {value!r}, not a positive integer; build the ModelShape by hand"
        )
    return value
