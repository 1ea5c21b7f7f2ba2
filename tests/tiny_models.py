"""Tiny random-weight models of real families, built from their configurations: no downloads, milliseconds to run.

Random initialization is too small for attention to matter, so weights are scaled up: a wrong mask or rotation then
changes logits by 0.03 to 3, ten thousand times the tolerance of the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

WINDOW = 8
VOCAB = 512

_SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": VOCAB,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "sliding_window": WINDOW,
}


@dataclass(frozen=True)
class ModelCase:
    """One model to test with."""

    id: str
    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LONGROPE = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": 64,
    **_rope(
        "longrope",
        long_factor=[2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
        short_factor=[1.0, 1.0, 1.1, 1.1, 1.2, 1.2, 1.3, 1.3],
        original_max_position_embeddings=64,
    ),
}

CASES = [
    ModelCase("llama", "llama"),
    ModelCase("llama-linear", "llama", _rope("linear", factor=4.0)),
    ModelCase(
        "llama-llama3",
        "llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=512),
    ),
    ModelCase("llama-yarn", "llama", _rope("yarn", factor=4.0, original_max_position_embeddings=512)),
    ModelCase("mistral", "mistral"),
    ModelCase("qwen2", "qwen2"),
    ModelCase("qwen3", "qwen3"),
    ModelCase("gemma3", "gemma3_text", {"layer_types": ["sliding_attention", "full_attention"] * 2}),
    ModelCase("phi3", "phi3", {"original_max_position_embeddings": 2048}),
    ModelCase("cohere", "cohere", {"logit_scale": 1.0}),
    ModelCase("smollm3", "smollm3"),
    ModelCase("gpt-oss", "gpt_oss"),
    ModelCase("deepseek-v3", "deepseek_v3"),
]

LONG_CASES = [
    ModelCase("llama-dynamic", "llama", _rope("dynamic", factor=4.0)),
    ModelCase("phi3-partial", "phi3", {"original_max_position_embeddings": 2048, "partial_rotary_factor": 0.5}),
    ModelCase("mistral-full", "mistral", {"sliding_window": None}),
    ModelCase("qwen2-sliding", "qwen2", {"use_sliding_window": True, "max_window_layers": 2}),
    *(
        ModelCase(name, name)
        for name in [
            "mixtral",
            "ministral",
            "starcoder2",
            "qwen2_moe",
            "qwen3_moe",
            "gemma",
            "gemma2",
            "vaultgemma",
            "gpt_neox",
            "phi",
            "stablelm",
            "persimmon",
            "nemotron",
            "cohere2",
            "ernie4_5",
            "helium",
            "glm",
            "glm4",
            "olmo",
            "olmo2",
            "olmo3",
            "olmoe",
            "granite",
            "apertus",
            "seed_oss",
            "hunyuan_v1_dense",
            "dots1",
            "exaone4",
            "deepseek_v2",
            "minicpm3",
            "nanochat",
            "bitnet",
        ]
    ),
]

REFUSED_CASES = [
    ModelCase("gpt2", "gpt2"),
    ModelCase("opt", "opt"),
    ModelCase("mamba", "mamba"),
    ModelCase("lfm2", "lfm2", {"layer_types": ["conv", "full_attention"] * 2}),
    ModelCase("qwen3-next", "qwen3_next"),
    ModelCase("recurrent-gemma", "recurrent_gemma"),
    ModelCase("bloom", "bloom"),
]


def tiny_config(case: ModelCase) -> Any:
    """The family's configuration, shrunk."""
    cls = CONFIG_MAPPING[case.model_type]
    base = cls()
    small = {name: value for name, value in _SMALL.items() if hasattr(base, name)}
    if hasattr(base, "kv_lora_rank"):
        small.pop("head_dim", None)
        small["num_key_value_heads"] = 4
    return cls(**{**small, **case.overrides})


def tiny_model(case: ModelCase, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model with seeded weights large enough for attention to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(case), dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (0.6 / math.sqrt(parameter.shape[-1])))
            elif "sink" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval()
