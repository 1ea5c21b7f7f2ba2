"""Configurations that can be carried anywhere, and the models and stores behind them; options under every name."""

from __future__ import annotations

import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import pytest
from tiny_models import REFUSED_CASES

from blockrag.errors import InputError
from blockrag.model.block_model import BlockModel
from blockrag.model.config import ModelConfig
from blockrag.model.sampling import GenerationOptions
from blockrag.model.shared import forget_models, register_model, shared_model, shared_store
from blockrag.model.usage import Usage


def test_equal_configurations_are_one_model_and_equal_urls_one_store() -> None:
    config = ModelConfig(store="memory://?max_bytes=11MB")
    copy = pickle.loads(pickle.dumps(config))  # noqa: S301 (our own bytes)
    with ThreadPoolExecutor(4) as threads:
        models = list(threads.map(shared_model, [config, copy, ModelConfig(store="memory://?max_bytes=11MB"), config]))
    assert len({id(model) for model in models}) == 1
    assert models[0].store is shared_store("memory://?max_bytes=11MB")
    other = shared_model(ModelConfig(store="memory://?max_bytes=11MB", attention="full"))
    assert other is not models[0]
    assert other.store is models[0].store


def test_a_loaded_model_does_not_wait_for_one_that_is_being_loaded(monkeypatch) -> None:
    loaded = shared_model(ModelConfig())
    begun, go_on = Event(), Event()
    load = BlockModel.from_pretrained

    def slowly(*args, **kwargs) -> BlockModel:
        begun.set()
        assert go_on.wait(60)
        return load(*args, **kwargs)

    monkeypatch.setattr(BlockModel, "from_pretrained", slowly)
    with ThreadPoolExecutor(2) as threads:
        loading = threads.submit(shared_model, ModelConfig(namespace="slow"))
        assert begun.wait(60)
        try:
            assert threads.submit(shared_model, ModelConfig()).result(timeout=60) is loaded
        finally:
            go_on.set()
        assert loading.result() is not loaded


def test_a_model_that_exists_can_be_configured_in_this_process(make_model) -> None:
    model: BlockModel = make_model("llama")
    config = register_model(model)
    assert shared_model(config) is model
    assert register_model(model) == config
    foreign = ModelConfig(model="registered:other#99")
    with pytest.raises(InputError, match="another process"):
        shared_model(foreign)


def test_models_can_be_let_go(make_model) -> None:
    config = ModelConfig(store="memory://?max_bytes=13MB")
    before, store = weakref.ref(shared_model(config)), shared_store(config.store)
    registered = register_model(make_model("llama"))
    forget_models()
    gc.collect()
    assert before() is None
    assert shared_model(config).store is not store
    with pytest.raises(InputError, match="forget_models"):
        shared_model(registered)


def test_what_cannot_be_loaded_says_so() -> None:
    with pytest.raises(InputError, match="no-such-directory"):
        shared_model(ModelConfig(model="no-such-directory/x", store="memory://?max_bytes=12MB"))
    with pytest.raises(InputError, match="cannot open store"):
        shared_store("ftp://x")


def test_the_context_window_is_the_models(make_model) -> None:
    model: BlockModel = make_model("llama")
    assert model.context_window == model.model.config.max_position_embeddings
    mamba = next(case for case in REFUSED_CASES if case.id == "mamba")
    full: BlockModel = make_model(mamba, attention="full")
    assert full.profile is None
    assert full.context_window is None


def test_options_by_the_names_of_frameworks() -> None:
    base = GenerationOptions(max_new_tokens=5, temperature=0.5, stop=("a",))
    assert base.updated({}) == base
    assert base.updated({"max_tokens": 7, "temperature": None}).max_new_tokens == 7
    assert base.updated({"max_completion_tokens": 8}).max_new_tokens == 8
    assert base.updated({"stop": "b"}).stop == ("b",)
    assert base.updated({"stop_sequences": ["b", "c"]}).stop == ("b", "c")
    for changes, reason in (
        ({"beam_count": 1}, "no option 'beam_count'"),
        ({"temperature": "hot"}, "wrong type"),
        ({"max_tokens": 1.5}, "out of range"),
        ({"top_k": 1.5}, "out of range"),
        ({"seed": "x"}, "out of range"),
        ({"max_tokens": 0}, "out of range"),
        ({"temperature": 5e-324}, "out of range"),
        ({"temperature": float("inf")}, "out of range"),
        ({"repetition_penalty": 1e-5}, "out of range"),
        ({"stop": 5}, "wrong type"),
    ):
        with pytest.raises(InputError, match=reason):
            base.updated(changes)


def test_usage_by_the_names_of_the_openai_api() -> None:
    usage = Usage(tokens_reused=30, tokens_computed=12, new_tokens=3)
    assert usage.as_openai() == {
        "prompt_tokens": 42,
        "completion_tokens": 3,
        "total_tokens": 45,
        "prompt_tokens_details": {"cached_tokens": 30},
    }
