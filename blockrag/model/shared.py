"""One model per configuration and process, for callers that can only carry plain values.

Framework components are copied, pickled and rebuilt in other processes; a loaded model cannot be. They carry a
`ModelConfig` instead and ask here for the model, which is loaded when the first of them does. Components with equal
configurations thereby share one model, one worker thread and one block store, which is what lets an ingestion step
prefill for a language model that was configured elsewhere.
"""

from __future__ import annotations

import itertools
import threading
from typing import TYPE_CHECKING

from blockrag.errors import InputError
from blockrag.model.block_model import BlockModel
from blockrag.model.config import ModelConfig
from blockrag.stores import open_store

if TYPE_CHECKING:
    from blockrag.stores.protocol import BlockStore

__all__ = ["forget_models", "register_model", "shared_model", "shared_store"]

_REGISTERED = "registered:"
_LOCK = threading.RLock()
_MODELS: dict[ModelConfig, BlockModel] = {}
_STORES: dict[str, BlockStore] = {}
# Never used twice: a name that was forgotten must not come to mean another model.
_NUMBERS = itertools.count()


def shared_model(config: ModelConfig) -> BlockModel:
    """The model of a configuration, loaded when it is first asked for.

    Raises:
        InputError: It cannot be loaded, or was registered in another process.
        UnsupportedModelError: It cannot be composed exactly.
        StoreError: The store's directory cannot be used.
    """
    # Whoever has its model already does not wait for another one to be loaded.
    found = _MODELS.get(config)
    if found is not None:
        return found
    with _LOCK:
        found = _MODELS.get(config)
        if found is None:
            if config.model.startswith(_REGISTERED):
                raise InputError(
                    f"model {config.model!r} was made from an object, in another process or before forget_models(), "
                    "and cannot be made again; configure it by its directory or hub id"
                )
            found = _MODELS[config] = BlockModel.from_pretrained(
                config.model,
                store=shared_store(config.store),
                device=config.device,
                dtype=config.dtype,
                attention=config.attention,
                precision=config.precision,
                block_fine_tuned=config.block_fine_tuned,
                namespace=config.namespace,
            )
        return found


def shared_store(url: str) -> BlockStore:
    """The store of a URL, opened when it is first asked for.

    Raises:
        InputError: The URL is none `open_store` takes.
        StoreError: The store's directory cannot be used.
    """
    with _LOCK:
        if url not in _STORES:
            _STORES[url] = open_store(url)
        return _STORES[url]


def register_model(model: BlockModel) -> ModelConfig:
    """Make a model that exists already available under a configuration; valid in this process only."""
    with _LOCK:
        for config, known in _MODELS.items():
            if known is model:
                return config
        config = ModelConfig(
            model=f"{_REGISTERED}{model.name}#{next(_NUMBERS)}", store=model.store.url, attention=model.attention
        )
        _MODELS[config] = model
        return config


def forget_models() -> None:
    """Let go of all models and stores, so that their memory is freed once nobody else holds them.

    Components load theirs again when they next need one, except models that were registered.
    """
    with _LOCK:
        _MODELS.clear()
        _STORES.clear()
