"""Loading from a directory: what is found, what is refused and how it says so; facts files; probing odd models."""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_exactness import QUERY, oracle_greedy, prompt_of
from tiny_models import CASES, ModelCase, tiny_model
from tiny_tokenizers import chatml_tokenizer, llama3_tokenizer, plain_tokenizer

from blockrag.errors import InputError, UnsupportedModelError
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import FACTS_FILE, BlockAttentionFacts, NotBlockFineTunedWarning, load_facts, save_facts
from blockrag.model.loading import load_pretrained, resolve_device, resolve_dtype
from blockrag.model.profile import structure_of
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import template_for

Make = Callable[..., BlockModel]
CPU = torch.device("cpu")
LLAMA = CASES[0]
OPTIONS = GenerationOptions(max_new_tokens=5, ignore_eos=True)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A model in hub layout: config.json, model.safetensors, tokenizer files."""
    return save(tmp_path / "model")


def save(path: Path, case: ModelCase = LLAMA, tokenizer: Any = None, dtype: torch.dtype = torch.float32) -> Path:
    tiny_model(case, dtype).save_pretrained(path)
    (tokenizer or plain_tokenizer()).save_pretrained(path)
    return path


def load(path: str | Path, **arguments: Any) -> BlockModel:
    arguments.setdefault("block_fine_tuned", True)
    arguments.setdefault("device", "cpu")
    return BlockModel.from_pretrained(path, **arguments)


# -- From a directory ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_path", [Path, str])
def test_a_saved_model_answers_as_the_one_in_memory(saved: Path, make_model: Make, as_path: type) -> None:
    prompt = prompt_of((7, 12), QUERY)
    loaded, original = load(as_path(saved)), make_model("llama")
    assert list(loaded.generate(prompt, OPTIONS).token_ids) == oracle_greedy(original, prompt, 5)
    assert loaded.name == "model"
    assert not loaded.model.training
    assert loaded.facts == BlockAttentionFacts(block_fine_tuned=True)


def test_arguments_reach_the_model(saved: Path) -> None:
    template = template_for(llama3_tokenizer())
    model = load(saved, attention="full", namespace="tenant", precision="bfloat16", template=template)
    assert (model.attention, model.namespace, model.precision) == ("full", "tenant", "bfloat16")
    assert model.template == template
    prompt = prompt_of((7, 12), QUERY)
    assert model.generate(prompt, OPTIONS).usage.blocks_computed == 1, "full attention is this model's default"
    assert model.generate(prompt, OPTIONS, attention="block").usage.blocks_computed == 3


def test_several_shards(tmp_path: Path) -> None:
    tiny_model(LLAMA).save_pretrained(tmp_path, max_shard_size="100KB")
    plain_tokenizer().save_pretrained(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert load(tmp_path).generate(prompt_of((7,), 3), OPTIONS).usage.new_tokens == 5


@pytest.mark.parametrize(
    ("dtype", "expected", "precision"),
    [
        ("auto", torch.float32, "float16"),
        ("float32", torch.float32, "float16"),
        ("bfloat16", torch.bfloat16, "bfloat16"),
        ("float16", torch.float16, "float16"),
        (torch.bfloat16, torch.bfloat16, "bfloat16"),
    ],
)
def test_dtypes(tmp_path: Path, dtype: Any, expected: torch.dtype, precision: str) -> None:
    """On a CPU "auto" is float32, whatever the checkpoint holds."""
    model = load(save(tmp_path, dtype=torch.bfloat16), dtype=dtype)
    assert model.model.dtype == expected
    assert model.precision == precision
    assert model.generate(prompt_of((7, 3), 3), OPTIONS).usage.new_tokens == 5


def test_auto_dtype_follows_the_device() -> None:
    assert resolve_dtype("auto", CPU) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) == "auto"


def test_auto_device() -> None:
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert resolve_device("cpu") == resolve_device(CPU) == CPU


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "", "meta", "cpu:x", "auto "])
def test_a_device_there_is_not(device: str, saved: Path) -> None:
    with pytest.raises(InputError, match=rf"device '{device}' cannot be used .*pass \"auto\", \"cpu\" or \"cuda\""):
        load(saved, device=device)


@pytest.mark.parametrize("dtype", ["int8", "fp16", "", "float64"])
def test_a_dtype_there_is_not(dtype: str, saved: Path) -> None:
    with pytest.raises(InputError, match=rf"dtype '{dtype}' is not one of \"auto\", 'float32'"):
        load(saved, dtype=dtype)


def test_a_path_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no-such-model.*Pass a directory with config\.json and weights"):
        load(tmp_path / "no-such-model")


def test_a_hub_id_that_is_not_there_and_no_network() -> None:
    with pytest.raises(InputError, match="'nobody/no-such-model'"):
        load("nobody/no-such-model")


def drop_config(path: Path) -> None:
    (path / "config.json").unlink()


def break_config(path: Path) -> None:
    (path / "config.json").write_text("{not json")


def foreign_config(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "no-such-type"}')


def not_a_language_model(path: Path) -> None:
    (path / "config.json").write_text('{"model_type": "vit"}')


def drop_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


def cut_weights(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def other_shapes(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "hidden_size": 32}))


def drop_tokenizer(path: Path) -> None:
    for file in path.glob("*token*"):
        file.unlink()


def break_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"version": "1.0"}')


@pytest.mark.parametrize(
    "damage",
    [
        drop_config,
        break_config,
        foreign_config,
        not_a_language_model,
        drop_weights,
        cut_weights,
        other_shapes,
        drop_tokenizer,
        break_tokenizer,
    ],
)
def test_a_damaged_directory_is_named(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    expected = rf"cannot load a causal language model from '{re.escape(str(saved))}': .+ Pass a directory"
    with pytest.raises(InputError, match=expected):
        load(saved)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.2.self_attn.k_proj.weight"])
def test_weights_that_are_missing_are_never_made_up(saved: Path, name: str) -> None:
    """transformers would fill them with random numbers and go on."""
    weights = load_file(saved / "model.safetensors")
    del weights[name]
    save_file(weights, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 weights of LlamaForCausalLM \(the first is {name}\)"):
        load(saved)


def test_an_output_layer_that_is_the_embedding_is_not_missing(tmp_path: Path) -> None:
    model = load(save(tmp_path, ModelCase("tied", "llama", {"tie_word_embeddings": True})))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert model.generate(prompt_of((7,), 3), OPTIONS).usage.new_tokens == 5


@pytest.mark.parametrize("known", [True, False], ids=["a known architecture", "its own architecture"])
def test_code_in_a_checkpoint_never_runs(saved: Path, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever is asked says yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for name, classes in (
        ("config.json", {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["hostile.T", "hostile.T"]}),
    ):
        config = json.loads((saved / name).read_text()) | {"auto_map": classes}
        if not known:
            config["model_type"] = "hostile"
        (saved / name).write_text(json.dumps(config))
    (saved / "hostile.py").write_text(f"import pathlib\npathlib.Path({str(saved / 'ran')!r}).touch()\n")
    if known:
        assert load(saved).generate(prompt_of((7,), 3), OPTIONS).usage.new_tokens == 5
    else:
        with pytest.raises(InputError, match="code that comes with it"):
            load(saved)
    assert not (saved / "ran").exists()


class Hostile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("how", ["torch.save", "pickle"])
def test_weights_that_are_a_program_are_never_run(saved: Path, how: str) -> None:
    ran = saved / "ran"
    weights = {**load_file(saved / "model.safetensors"), "hostile": Hostile(ran)}
    (saved / "model.safetensors").unlink()
    if how == "pickle":
        (saved / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    else:
        torch.save(weights, saved / "pytorch_model.bin")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="cannot load"):
            load(saved)
    assert not ran.exists()
    # What would have happened.
    assert pickle.loads(pickle.dumps(Hostile(ran))) is None  # noqa: S301
    assert ran.exists()


# -- Facts -----------------------------------------------------------------------------------------------------------


FACTS = BlockAttentionFacts(
    block_fine_tuned=True, template=template_for(chatml_tokenizer()), max_blocks=12, max_tokens=4096
)


@pytest.mark.parametrize("facts", [FACTS, BlockAttentionFacts(), BlockAttentionFacts(block_fine_tuned=False)])
def test_facts_come_back_as_they_were(tmp_path: Path, facts: BlockAttentionFacts) -> None:
    path = save_facts(facts, tmp_path)
    assert path == tmp_path / FACTS_FILE
    assert load_facts(path) == facts


def test_facts_beside_the_weights_are_used(saved: Path) -> None:
    save_facts(FACTS, saved)
    model = BlockModel.from_pretrained(saved, device="cpu")
    assert model.facts == FACTS
    assert model.template == FACTS.template, "the template it was trained with, not the one its tokenizer implies"
    own = template_for(plain_tokenizer())
    assert BlockModel.from_pretrained(saved, device="cpu", template=own).template == own
    with pytest.warns(NotBlockFineTunedWarning):
        overruled = BlockModel.from_pretrained(saved, device="cpu", block_fine_tuned=False)
    assert overruled.facts == replace(FACTS, block_fine_tuned=False)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "null",
        "[]",
        "{}",
        '"text"',
        "{not json",
        '{"format": 1, "unknown": 3}',
        '{"format": 1, "block_fine_tuned": "no"}',
        '{"format": 1, "block_fine_tuned": 1}',
        '{"format": 1, "max_blocks": "many"}',
        '{"format": 1, "max_tokens": true}',
        '{"format": 1, "template": 3}',
        '{"format": 1, "template": {"name": "x"}}',
        '{"format": 1, "template": {"name": "x", "version": 1, "prefix": "", "query": "no placeholder"}}',
        "[" * 100_000,
        b"\xff\xfe\x00",
    ],
)
def test_damaged_facts_are_an_error_with_the_path(saved: Path, content: str | bytes) -> None:
    (saved / FACTS_FILE).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=FACTS_FILE):
        load(saved)


def test_facts_of_a_later_format(tmp_path: Path) -> None:
    (tmp_path / FACTS_FILE).write_text('{"format": 2}')
    with pytest.raises(InputError, match="another format than 1; update blockrag"):
        load_facts(tmp_path / FACTS_FILE)


def test_plain_transformers_ignores_the_facts(saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    save_facts(FACTS, saved)
    assert AutoModelForCausalLM.from_pretrained(saved).config.model_type == "llama"


# -- Not fine-tuned --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", [None, False])
def test_a_model_not_known_to_be_fine_tuned_warns(make_model: Make, known: bool | None) -> None:
    with pytest.warns(NotBlockFineTunedWarning, match=r"LlamaForCausalLM .*71\.3 to 50\.0.*attention=\"full\"") as seen:
        make_model(facts=BlockAttentionFacts(block_fine_tuned=known))
    assert len(seen) == 1


def test_no_warning_where_it_does_not_matter(make_model: Make, saved: Path) -> None:
    """Warnings are errors here: fine-tuned models and full attention load in silence."""
    make_model(facts=BlockAttentionFacts(block_fine_tuned=True))
    make_model(facts=BlockAttentionFacts(), attention="full")
    load(saved, block_fine_tuned=True)
    load(saved, block_fine_tuned=None, attention="full")
    with pytest.warns(NotBlockFineTunedWarning):
        load(saved, block_fine_tuned=None)


# -- What cannot be probed -------------------------------------------------------------------------------------------


def refused(model: Any, match: str) -> None:
    with pytest.raises(UnsupportedModelError, match=match):
        BlockModel(model, plain_tokenizer())
    assert BlockModel(model, plain_tokenizer(), attention="full").profile is None


def test_a_model_whose_keys_move_otherwise_is_refused() -> None:
    """Learned positions inside attention: no rotation maps one place's keys to another's."""
    model = tiny_model(LLAMA)
    table = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))

    layer = model.base_model.layers[0]
    layer.register_forward_pre_hook(
        lambda module, args, kwargs: ((args[0] + table[kwargs["position_ids"]], *args[1:]), kwargs), with_kwargs=True
    )
    refused(model, r"layer 0 keys depend on position in a way that no rotation explains \(relative error")


def test_a_model_that_keeps_its_state_elsewhere_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(LLAMA)
    attention = model.base_model.layers[2].self_attn
    forward = attention.forward
    monkeypatch.setattr(
        attention, "forward", lambda *args, **kwargs: forward(*args, **{**kwargs, "past_key_values": None})
    )
    refused(model, "layer 2 left its cache empty, so its state is kept elsewhere")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_mamba"])
def test_a_model_without_positions_is_refused(family: str) -> None:
    config = {"num_heads": 8, "head_dim": 16, "state_size": 8} if family == "mamba2" else {}
    refused(tiny_model(ModelCase(family, family, config)), "it takes no position_ids, so a block cannot be placed")


def test_a_cache_without_any_keys_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hypothetical model all of whose layers are stateless."""
    from transformers.cache_utils import DummyLayer

    from blockrag.model import profile

    class Stateless:
        def __init__(self, config: object) -> None:
            self.layers = [DummyLayer(), DummyLayer()]

    monkeypatch.setattr(profile, "DynamicCache", Stateless)
    with pytest.raises(UnsupportedModelError, match="none of its layers keeps keys and values"):
        structure_of(tiny_model(LLAMA))


def test_chunked_attention_is_limited_to_one_chunk() -> None:
    """Llama 4's chunk borders lie at fixed positions: beyond the first one a moved block would see otherwise."""
    case = ModelCase(
        "llama4",
        "llama4_text",
        {"attention_chunk_size": 64, "intermediate_size_mlp": 96, "num_local_experts": 2, "use_qk_norm": False},
    )
    model = BlockModel(tiny_model(case), plain_tokenizer(), facts=BlockAttentionFacts(block_fine_tuned=True))
    assert model.profile is not None
    assert model.profile.max_tokens == 64
    assert set(model.profile.structure.windows) == {None}
    prompt = prompt_of((7, 12), QUERY)
    assert list(model.generate(prompt, OPTIONS).token_ids) == oracle_greedy(model, prompt, 5)


def test_a_frequency_table_wider_than_a_head_is_no_candidate() -> None:
    """Some models carry tables for other parts (vision towers); they must not break the probe."""
    model = tiny_model(LLAMA)
    model.register_buffer("vision_inv_freq", torch.rand(64), persistent=False)
    block = BlockModel(model, plain_tokenizer(), facts=BlockAttentionFacts(block_fine_tuned=True))
    assert block.profile is not None
    assert {ropes.keys.describe() for ropes in block.profile.regimes[0].ropes} == {"half[0:16]"}


def test_the_window_is_as_before_after_probing() -> None:
    case = ModelCase("wide", "mistral", {"sliding_window": 100})
    model = BlockModel(tiny_model(case), plain_tokenizer(), facts=BlockAttentionFacts(block_fine_tuned=True))
    assert model.model.config.sliding_window == 100
    assert model.profile is not None
    assert set(model.profile.structure.windows) == {100}


def test_load_pretrained_returns_all_three(saved: Path) -> None:
    model, tokenizer, facts = load_pretrained(saved, device=CPU, dtype=torch.float32, revision=None)
    assert model.config.model_type == "llama"
    assert tokenizer.eos_token == "<eos>"
    assert facts == BlockAttentionFacts()
