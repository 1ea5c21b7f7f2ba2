"""The figures of the sizing guide: those that follow from configurations are computed here and must stand there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from blockrag.codec import Precision, encoded_nbytes
from blockrag.kv import KVLayout, LayerShape
from blockrag.model.outline import ModelOutline
from blockrag.model.profile import unprobed_profile
from blockrag.planning.hit_rate import lru_hit_rate

PAGE = (Path(__file__).parent.parent / "docs" / "guide" / "storage-and-sizing.md").read_text("utf-8")
TEXT = " ".join(PAGE.split())
TOKENS = 130


def grouped(layers: int, heads: int, size: int) -> KVLayout:
    return KVLayout((LayerShape(heads, size, heads, size),) * layers)


# Layers, KV heads and head size as the published config.json of each says.
MODELS = {
    "demo": grouped(4, 2, 32),
    "Llama 3.2 1B": grouped(16, 8, 64),
    "Llama 3.1 8B": grouped(32, 8, 128),
    "Llama 3.3 70B": grouped(80, 8, 128),
    "Qwen2.5 7B": grouped(28, 4, 128),
    "Qwen3 0.6B": grouped(28, 8, 128),
    "Qwen3 8B": grouped(36, 8, 128),
    "Qwen3 30B-A3B": grouped(48, 4, 128),
    "Mistral 7B v0.3": grouped(32, 8, 128),
    "Gemma 3 4B": grouped(34, 4, 256),
    "gpt-oss 20B": grouped(24, 8, 64),
    "DeepSeek V3": KVLayout((LayerShape(1, 512, 1, 64),) * 61),
}


def row(name: str, layout: KVLayout) -> str:
    first = layout.layers[0]
    shape = f"{first.key_heads} x {first.key_dim}"
    if first.key_dim != first.value_dim:
        shape = f"{first.key_dim} + {first.value_dim} latent"

    def block(precision: Precision) -> str:
        return f"{encoded_nbytes(layout, TOKENS, precision) / 2**20:.2f}"

    per_token = f"{layout.nbytes(1, 2) / 1024:.1f}".removesuffix(".0")
    corpus = f"{100_000 * encoded_nbytes(layout, TOKENS, 'float16') / 1e9:,.0f} GB"
    sizes = " | ".join(block(precision) for precision in ("float32", "float16", "int8", "int4"))
    return f"| {name} | {layout.num_layers} | {shape} | {per_token} | {sizes} | {corpus} |"


@pytest.mark.parametrize("name", MODELS)
def test_the_table_is_what_the_codec_makes_of_the_configurations(name: str) -> None:
    assert row(name, MODELS[name]) in PAGE.splitlines()


def test_the_shapes_are_what_the_models_keep() -> None:
    assert MODELS["demo"] == ModelOutline.load("demo").profile.layout
    for family, name, shape in [
        ("deepseek_v3", "DeepSeek V3", {"first_k_dense_replace": 1}),
        ("gpt_oss", "gpt-oss 20B", {}),
        ("qwen3", "Qwen3 8B", {"num_key_value_heads": 8, "num_attention_heads": 32, "hidden_size": 4096}),
    ]:
        with torch.device("meta"):
            config = CONFIG_MAPPING[family](num_hidden_layers=2, **shape)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        assert unprobed_profile(model.eval()).layout.layers == MODELS[name].layers[:2]


def test_the_worked_example() -> None:
    layout = MODELS["Llama 3.1 8B"]
    total = 10_000 * encoded_nbytes(layout, TOKENS, "bfloat16")
    assert layout.elements_per_token == 65_536
    assert f"{encoded_nbytes(layout, TOKENS, 'bfloat16'):,} bytes" in TEXT
    assert f"{total / 1e9:.0f} GB" in TEXT
    rate = 28_000
    assert f"{layout.nbytes(1, 2) * rate / 1e9:.1f} GB/s" in TEXT
    int8 = encoded_nbytes(layout, TOKENS, "int8") / TOKENS * rate
    int4 = encoded_nbytes(layout, TOKENS, "int4") / TOKENS * rate
    assert f"{int8 / 1e9:.1f} at int8, {int4 / 1e9:.1f} at int4" in TEXT
    stored = encoded_nbytes(layout, TOKENS, "bfloat16") / 1e9 * 0.023
    computed = TOKENS / rate * 2.5 / 3600
    assert f"asked for {round(stored / computed)} times a month" in TEXT


def test_the_hit_rates() -> None:
    for exponent, cells in re.findall(r"^\| (\d\.\d) \| (.*) \|$", PAGE, re.MULTILINE):
        shares = (0.01, 0.05, 0.1, 0.25, 0.5)
        rates = [lru_hit_rate(100_000, share * 100_000, exponent=float(exponent)) for share in shares]
        assert cells == " | ".join(f"{rate:.0%}".replace("%", " %") for rate in rates)
    assert PAGE.count("| 1.0 | ") == 1
