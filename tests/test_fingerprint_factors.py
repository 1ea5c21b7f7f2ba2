"""Every factor that shapes KV states makes every block a miss under its own name; what shapes none keeps them all."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from test_exactness import QUERY, composed_logits, oracle, prompt_of
from tiny_models import CASES, ModelCase, tiny_model
from tiny_tokenizers import LLAMA3_CHAT, llama3_tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PreTrainedModel

from blockrag.fingerprint import hash_tokenizer
from blockrag.model import identity
from blockrag.model.block_model import BlockModel
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.identity import adapter_factor, weights_factor
from blockrag.model.sampling import GenerationOptions
from blockrag.stores import MemoryStore
from blockrag.stores.protocol import BlockStore

# peft still asks transformers for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

LENGTHS = (7, 12, 9, 1)
PROMPT = prompt_of(LENGTHS, QUERY)
OPTIONS = GenerationOptions(max_new_tokens=2, ignore_eos=True)
FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)
WINDOWED = next(case for case in CASES if case.id == "mistral")


def wrapped(model: PreTrainedModel | None = None, **arguments: Any) -> BlockModel:
    """A BlockModel whose template and precision at rest stay what they are, whatever else changes."""
    tokenizer = arguments.pop("tokenizer", None) or llama3_tokenizer()
    arguments.setdefault("precision", "float32")
    arguments.setdefault("template", BASE_TEMPLATE)
    arguments.setdefault("kept_bytes", 0)
    return BlockModel(model or llama(), tokenizer, facts=FINE_TUNED, **arguments)


def llama(**overrides: Any) -> PreTrainedModel:
    return tiny_model(ModelCase("llama", "llama", overrides))


def rope(kind: str = "default", theta: float = 10000.0, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **parameters}}


def adapted(model: PreTrainedModel, *, alpha: float = 16, seed: int = 0, rank: int = 4) -> Any:
    """The model with a real low-rank adapter in it that changes what it computes."""
    torch.manual_seed(seed)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=["q_proj", "v_proj", "down_proj"])
    wrapper = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in wrapper.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return wrapper


def inside(wrapper: Any) -> PreTrainedModel:
    """The causal language model that a peft wrapper changed in place."""
    model: PreTrainedModel = wrapper.get_base_model()
    return model.eval()


def with_weight_changed() -> PreTrainedModel:
    model = llama()
    with torch.no_grad():
        model.base_model.layers[3].mlp.down_proj.weight[0, 0] += 1e-6
    return model


def with_adapter_off() -> PreTrainedModel:
    wrapper = adapted(llama())
    wrapper.base_model.disable_adapter_layers()
    return inside(wrapper)


def with_two_adapters(active: str) -> PreTrainedModel:
    wrapper = adapted(llama())
    torch.manual_seed(7)
    wrapper.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    wrapper.set_adapter(active)
    return inside(wrapper)


def extended_tokenizer() -> Any:
    tokenizer = llama3_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    return tokenizer


def other_bos() -> Any:
    tokenizer = llama3_tokenizer()
    tokenizer.bos_token = "<|end_of_text|>"
    return tokenizer


def other_chat() -> Any:
    tokenizer = llama3_tokenizer()
    tokenizer.chat_template = LLAMA3_CHAT.replace("\n\n", "\n")
    return tokenizer


BASE_TEMPLATE = BlockModel(llama(), llama3_tokenizer(), facts=FINE_TUNED).template


# What was stored under, what is asked with, the factor that must be named.
CHANGES: dict[str, tuple[Callable[[], BlockModel], Callable[[], BlockModel], str]] = {
    "a weight": (wrapped, lambda: wrapped(with_weight_changed()), "weights"),
    "merged adapter": (wrapped, lambda: wrapped(adapted(llama()).merge_and_unload().eval()), "weights"),
    "config": (wrapped, lambda: wrapped(llama(rms_norm_eps=1e-4)), "config"),
    "rope theta": (lambda: wrapped(llama(**rope())), lambda: wrapped(llama(**rope(theta=5e5))), "rope"),
    "rope type": (lambda: wrapped(llama(**rope())), lambda: wrapped(llama(**rope("linear", factor=4.0))), "rope"),
    "rope scaling": (
        lambda: wrapped(llama(**rope("linear", factor=2.0))),
        lambda: wrapped(llama(**rope("linear", factor=4.0))),
        "rope",
    ),
    # The frequencies are the same: only the parameters say that keys are scaled.
    "rope attention factor": (
        lambda: wrapped(llama(**rope("yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=1.0))),
        lambda: wrapped(llama(**rope("yarn", factor=4.0, original_max_position_embeddings=512, attention_factor=1.2))),
        "rope",
    ),
    "sliding window": (
        lambda: wrapped(tiny_model(WINDOWED)),
        lambda: wrapped(tiny_model(replace(WINDOWED, overrides={"sliding_window": 16}))),
        "attention",
    ),
    "no sliding window": (
        lambda: wrapped(tiny_model(WINDOWED)),
        lambda: wrapped(tiny_model(replace(WINDOWED, overrides={"sliding_window": None}))),
        "attention",
    ),
    "kinds of layers": (
        lambda: wrapped(tiny_model(ModelCase("q", "qwen2", {"use_sliding_window": True, "max_window_layers": 2}))),
        lambda: wrapped(tiny_model(ModelCase("q", "qwen2", {"use_sliding_window": True, "max_window_layers": 3}))),
        "attention",
    ),
    "adapter": (wrapped, lambda: wrapped(inside(adapted(llama()))), "adapter"),
    "adapter's tensors": (
        lambda: wrapped(inside(adapted(llama()))),
        lambda: wrapped(inside(adapted(llama(), seed=1))),
        "adapter",
    ),
    # The same tensors to the byte.
    "adapter's scale": (
        lambda: wrapped(inside(adapted(llama()))),
        lambda: wrapped(inside(adapted(llama(), alpha=8))),
        "adapter",
    ),
    "adapter off": (lambda: wrapped(inside(adapted(llama()))), lambda: wrapped(with_adapter_off()), "adapter"),
    "another adapter active": (
        lambda: wrapped(with_two_adapters("default")),
        lambda: wrapped(with_two_adapters("second")),
        "adapter",
    ),
    "added token": (wrapped, lambda: wrapped(tokenizer=extended_tokenizer()), "tokenizer"),
    "BOS policy": (wrapped, lambda: wrapped(tokenizer=other_bos()), "tokenizer"),
    "chat template": (wrapped, lambda: wrapped(tokenizer=other_chat()), "template"),
    "passage form": (
        wrapped,
        lambda: wrapped(template=replace(BASE_TEMPLATE, passage="{title}: {text}\n")),
        "template",
    ),
    "prefix form": (wrapped, lambda: wrapped(template=replace(BASE_TEMPLATE, prefix="{bos}Documents:\n")), "template"),
    "template version": (wrapped, lambda: wrapped(template=replace(BASE_TEMPLATE, version=99)), "template"),
    "compute dtype": (wrapped, lambda: wrapped(llama().to(torch.bfloat16)), "compute_dtype"),
    "precision": (wrapped, lambda: wrapped(precision="float16"), "precision"),
    "quantisation scheme": (lambda: wrapped(precision="int8"), lambda: wrapped(precision="int4"), "precision"),
}


def blocks_found(model: BlockModel, store: BlockStore) -> int:
    return model.generate(PROMPT, OPTIONS, store=store).usage.blocks_reused


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_factor_misses_every_block_and_is_named(what: str) -> None:
    before, after, factor = CHANGES[what]
    store, model, other = MemoryStore(), before(), after()
    blocks_found(model, store)
    assert blocks_found(model, store) == len(LENGTHS), "the control: nothing has changed yet"
    assert [change.name for change in other.fingerprint.changes_since(model.fingerprint)] == [factor]
    assert blocks_found(other, store) == 0
    # Neither is in the other's way.
    assert blocks_found(model, store) == blocks_found(other, store) == len(LENGTHS)


@pytest.mark.parametrize(
    ("constant", "value", "factor"),
    [
        ("SPLIT_POLICY", "recognized", "splitting"),
        ("POSITIONS_AT_REST", "rotated", "positions"),
        ("FORMAT_VERSION", 2, "format"),
    ],
)
def test_a_release_that_does_it_another_way_misses_every_block(
    monkeypatch: pytest.MonkeyPatch, constant: str, value: object, factor: str
) -> None:
    store, model = MemoryStore(), wrapped()
    blocks_found(model, store)
    monkeypatch.setattr(identity, constant, value)
    other = wrapped()
    assert [change.name for change in other.fingerprint.changes_since(model.fingerprint)] == [factor]
    assert blocks_found(other, store) == 0


def test_transformers_is_compatible_within_a_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = wrapped().fingerprint
    monkeypatch.setattr(identity.transformers, "__version__", "5.99.1")
    assert wrapped().fingerprint == expected
    monkeypatch.setattr(identity.transformers, "__version__", "6.0.0")
    (change,) = wrapped().fingerprint.changes_since(expected)
    assert str(change) == "stored for library transformers 5, asked with transformers 6"


def test_a_new_revision_at_the_same_path_is_its_content(tmp_path: Path) -> None:
    store = MemoryStore()
    prints = []
    for model in (llama(), llama(), with_weight_changed(), llama(rms_norm_eps=1e-4)):
        model.save_pretrained(tmp_path)
        llama3_tokenizer().save_pretrained(tmp_path)
        loaded = BlockModel.from_pretrained(tmp_path, block_fine_tuned=True, device="cpu", kept_bytes=0)
        prints.append((loaded.fingerprint, blocks_found(loaded, store)))
    assert [found for _, found in prints] == [0, len(LENGTHS), 0, 0]
    names = [[change.name for change in later.changes_since(prints[0][0])] for later, _ in prints[1:]]
    assert names == [[], ["weights"], ["config"]]


def test_an_adapter_that_does_nothing_any_more_leaves_the_base_models_weights() -> None:
    plain, wrapper = llama(), adapted(llama())
    assert weights_factor(inside(wrapper)) == weights_factor(plain)
    assert adapter_factor(plain) == "none" != adapter_factor(inside(wrapper))
    unloaded = wrapper.unload().eval()
    assert wrapped(unloaded).fingerprint == wrapped(plain).fingerprint


def test_a_composed_prompt_of_an_adapted_model_is_the_adapted_models() -> None:
    model, plain = wrapped(inside(adapted(llama()))), wrapped()
    assert (composed_logits(model, PROMPT) - oracle(model, PROMPT)).abs().max() < 1e-4
    assert (composed_logits(plain, PROMPT) - composed_logits(model, PROMPT)).abs().max() > 1e-2


def test_a_tokenizer_that_opens_texts_with_bos_is_another() -> None:
    tokenizer = llama3_tokenizer()
    before = hash_tokenizer(tokenizer)
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    assert tokenizer("a").input_ids[0] == bos[1]
    assert hash_tokenizer(tokenizer) != before


# -- what must change nothing ------------------------------------------------------------------------------------------

OTHER_PROCESS = """
import sys
from blockrag.model.block_model import BlockModel
from blockrag.model.sampling import GenerationOptions
from blockrag.prompt import Block, SegmentedPrompt
from blockrag.stores import open_store

model = BlockModel.from_pretrained(sys.argv[1], block_fine_tuned=True, device="cpu", store=open_store(sys.argv[2]))
*local, query = [[int(token) for token in block.split()] for block in sys.argv[3:]]
blocks = [Block(tuple(ids), "", local=True, kind="passage") for ids in local]
prompt = SegmentedPrompt((*blocks, Block(tuple(query), "", local=False, kind="query")))
print(model.fingerprint.digest, model.generate(prompt, GenerationOptions(max_new_tokens=1)).usage.blocks_reused)
"""


def test_place_time_and_process_change_nothing(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "one")
    llama3_tokenizer().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for file in (tmp_path / "two").iterdir():
        os.utime(file, (1_000_000_000, 1_000_000_000))
    (tmp_path / "three").symlink_to(tmp_path / "one")
    url = f"disk://{tmp_path / 'kv'}"

    def load(name: str, **arguments: Any) -> BlockModel:
        return BlockModel.from_pretrained(
            tmp_path / name, block_fine_tuned=True, device="cpu", kept_bytes=0, **arguments
        )

    from blockrag.stores import open_store

    store = open_store(url)
    try:
        first = load("one", store=store)
        assert blocks_found(first, store) == 0
        for other in (load("one"), load("two"), load("three")):
            assert other.fingerprint.changes_since(first.fingerprint) == ()
            assert blocks_found(other, store) == len(LENGTHS)
    finally:
        store.close()
    blocks = [" ".join(map(str, block.token_ids)) for block in PROMPT.blocks]
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    said = subprocess.run(
        [sys.executable, "-c", OTHER_PROCESS, str(tmp_path / "two"), url, *blocks],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    ).stdout.split()
    assert said == [first.fingerprint.digest, str(len(LENGTHS))]


def test_batch_size_and_attention_function_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = MemoryStore(), wrapped()
    blocks_found(model, store)
    monkeypatch.setattr("blockrag.model.block_model._BATCH_TOKENS", {"cpu": 16})
    eager = AutoModelForCausalLM.from_config(llama().config, attn_implementation="eager")
    eager.load_state_dict(llama().state_dict())
    for other in (wrapped(), wrapped(eager), wrapped(copy.deepcopy(model.model), namespace="")):
        assert other.fingerprint == model.fingerprint
        assert blocks_found(other, store) == len(LENGTHS)


def test_prompts_asked_together_find_what_one_stored_and_the_other_way_round() -> None:
    model = wrapped()
    alone, together = MemoryStore(), MemoryStore()
    blocks_found(model, alone)
    model.generate([PROMPT, PROMPT], OPTIONS, store=together)
    assert set(alone.keys()) == set(together.keys())
    assert [one.usage.blocks_reused for one in model.generate([PROMPT, PROMPT], OPTIONS, store=alone)] == [4, 4]


def test_fingerprints_do_not_tell_namespaces_apart() -> None:
    assert wrapped(namespace="a secret").fingerprint == wrapped().fingerprint
    assert "secret" not in wrapped(namespace="a secret").fingerprint.to_json()
