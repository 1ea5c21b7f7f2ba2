"""FLOPs to the first token: the paper's row, and the two honest counts."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, Qwen3Config

from blockrag.errors import InputError
from blockrag.evaluation.flops import (
    ModelShape,
    flops_to_first_token,
    reduction_percent,
    truncate,
)

LENGTHS = (50, 512, 1024, 2048, 4096, 8192, 16384, 32768)
LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def test_the_papers_row_is_reproduced():
    shape = ModelShape.from_config(LLAMA_8B)
    counts = [flops_to_first_token(num_parameters=shape.num_parameters, num_tokens=n).paper for n in LENGTHS]
    digits = (2, 2, 2, 2, 2, 2, 3, 2)
    row = [truncate(count, digits=digit) for count, digit in zip(counts, digits, strict=True)]
    assert row == [7.5e11, 7.6e12, 1.5e13, 3.0e13, 6.1e13, 1.2e14, 2.45e14, 4.9e14]
    reductions = [truncate(reduction_percent(full, row[0]), digits=3) for full in row[1:]]
    assert reductions == [90.1, 95.0, 97.5, 98.7, 99.3, 99.6, 99.8]


def test_attention_and_misses_are_counted():
    shape = ModelShape.from_config(LLAMA_8B)
    full = flops_to_first_token(shape=shape, num_tokens=32768)
    block = flops_to_first_token(shape=shape, num_tokens=50, reused_tokens=32768)
    assert full.with_attention == pytest.approx(7.39e14, rel=1e-3)
    assert block.with_attention == pytest.approx(1.56e12, rel=1e-3)
    assert truncate(reduction_percent(full.with_attention, block.with_attention), digits=4) == 99.78
    assert full.with_reuse == full.with_attention
    # Three operations per key element of 32 layers x 8 heads x 128 dimensions.
    assert block.with_reuse - block.with_attention == 3 * 32 * 8 * 128 * 32768
    missed = flops_to_first_token(shape=shape, num_tokens=50, reused_tokens=32668, missed_blocks=[60, 40])
    alone = [flops_to_first_token(shape=shape, num_tokens=n).with_attention for n in (60, 40)]
    encoding = sum(alone) - 2 * 2 * shape.output_parameters
    assert missed.with_reuse == block.with_reuse + encoding
    assert missed.with_attention == block.with_attention


def test_everything_missed_as_one_block_costs_full_attention_plus_rotation():
    shape = ModelShape.from_config(LlamaConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4))
    full = flops_to_first_token(shape=shape, num_tokens=30)
    split = flops_to_first_token(shape=shape, num_tokens=10, missed_blocks=[20])
    rotation = 3 * shape.num_layers * shape.num_kv_heads * shape.rotary_dim * 20
    assert split.with_reuse == full.with_attention + rotation


def test_without_a_shape_only_the_papers_count_is_known():
    counts = flops_to_first_token(num_parameters=7, num_tokens=3)
    assert (counts.paper, counts.with_attention, counts.with_reuse) == (42, None, None)


def test_parameters_are_those_of_the_model():
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    counted = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    final_norm = 32
    assert ModelShape.from_config(config).num_parameters == counted - final_norm


def test_only_active_experts_count():
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=4,
    )
    model = MixtralForCausalLM(config)
    counted = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel() - 32
    assert ModelShape.from_config(config).num_parameters == counted
    config.num_experts_per_tok = 1
    assert ModelShape.from_config(config).body_parameters < counted


def test_partial_rotation_and_wide_heads_are_read():
    config = Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
    assert ModelShape.from_config(config).rotary_dim == 32
    plain = SimpleNamespace(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=8,
        vocab_size=9,
        partial_rotary_factor=0.25,
    )
    shape = ModelShape.from_config(plain)
    assert (shape.head_dim, shape.num_kv_heads, shape.rotary_dim) == (16, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tokens": 0, "num_parameters": 1}, "at least one token"),
        ({"num_tokens": 1, "num_parameters": 1, "reused_tokens": -1}, "-1 reused"),
        ({"num_tokens": 1, "num_parameters": 1, "missed_blocks": [0]}, r"\[0\]"),
        ({"num_tokens": 1}, "num_parameters or a shape"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        flops_to_first_token(**arguments)


def test_a_config_without_the_numbers_is_refused():
    with pytest.raises(InputError, match="hidden_size is None"):
        ModelShape.from_config(SimpleNamespace())
    with pytest.raises(InputError, match="num_heads"):
        ModelShape(1, 0, 1, 1, 0, 1, 1)


def test_reduction_and_truncation_of_edge_values():
    assert truncate(0, digits=2) == 0.0
    assert truncate(99.99, digits=1) == 90.0
    assert reduction_percent(2, 1) == 50.0
    with pytest.raises(InputError, match="positive"):
        reduction_percent(0, 1)
