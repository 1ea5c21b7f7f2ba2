"""What is said of a model before its weights are there agrees with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_models import CASES, LONGROPE, REFUSED_CASES, ModelCase, tiny_config, tiny_model
from tiny_tokenizers import plain_tokenizer

from blockrag.errors import InputError, UnsupportedModelError
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.outline import ModelOutline
from blockrag.model.profile import probe_regimes, structure_of

LENGTH_DEPENDENT = [
    ModelCase("phi3-longrope", "phi3", LONGROPE),
    ModelCase(
        "llama-dynamic", "llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}}
    ),
]
LATENT = [ModelCase("minicpm3", "minicpm3"), ModelCase("mixtral", "mixtral")]


def without_weights(case: ModelCase, directory: Path) -> Path:
    tiny_config(case).save_pretrained(directory)
    plain_tokenizer().save_pretrained(directory)
    return directory


@pytest.mark.parametrize("case", [*CASES, *LENGTH_DEPENDENT, *LATENT], ids=lambda case: case.id)
def test_shapes_and_limits_are_those_of_the_model(case: ModelCase, tmp_path: Path) -> None:
    outline = ModelOutline.load(without_weights(case, tmp_path), device="cpu")
    model = tiny_model(case)
    real = probe_regimes(model, structure_of(model))
    for name in ("layout", "structure", "max_tokens", "regime_limit"):
        assert getattr(outline.profile, name) == getattr(real, name)


def test_a_loaded_model_has_the_same_outline() -> None:
    loaded = ModelOutline.of(BlockModel.from_pretrained("demo", device="cpu"))
    outline = ModelOutline.load("demo", device="cpu")
    assert outline.profile.layout == loaded.profile.layout
    assert outline.template.digest() == loaded.template.digest()
    assert (outline.dtype, outline.precision) == (loaded.dtype, loaded.precision) == ("float32", "float16")


def test_precision_follows_what_is_computed_in_unless_it_is_given() -> None:
    assert ModelOutline.load("demo", dtype="bfloat16").precision == "bfloat16"
    assert ModelOutline.load("demo", precision="int4").precision == "int4"
    assert ModelOutline.load("demo", dtype=torch.float16).dtype == "float16"


@pytest.mark.parametrize("case", REFUSED_CASES, ids=lambda case: case.id)
def test_a_model_that_the_probes_refuse_is_refused_or_left_to_them(case: ModelCase, tmp_path: Path) -> None:
    saved = without_weights(case, tmp_path)
    if case.id == "opt":
        # Nothing in its shapes says that it has absolute positions.
        assert ModelOutline.load(saved, device="cpu").profile.layout.elements_per_token == 4 * 2 * 64
        return
    refusal = InputError if case.id == "gpt2" else UnsupportedModelError
    with pytest.raises(refusal, match="cannot"):
        ModelOutline.load(saved, device="cpu")


def test_a_model_that_is_loaded_but_keeps_no_blocks_has_no_outline() -> None:
    model = BlockModel(
        tiny_model(ModelCase("gpt2", "gpt2")), plain_tokenizer(), attention="full", facts=BlockAttentionFacts()
    )
    with pytest.raises(InputError, match="keeps no blocks"):
        ModelOutline.of(model)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        ModelOutline.load(tmp_path)
    plain_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "no such family"}')
    with pytest.raises(InputError, match=r"config\.json"):
        ModelOutline.load(tmp_path)
