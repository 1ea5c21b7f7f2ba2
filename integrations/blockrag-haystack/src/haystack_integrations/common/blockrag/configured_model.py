"""The language model a component was configured with: plain values until it is needed.

Components with equal configurations share one model and one block store per process (`blockrag.model.shared`), which
is what lets a writer in an indexing pipeline compute KV states for a generator in another pipeline.
"""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from blockrag.errors import StoreError, UnsupportedModelError
from blockrag.model.config import ModelConfig

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel

__all__ = ["ConfiguredModel"]


class ConfiguredModel:
    """A configuration, and the model once it is loaded.

    Args:
        **values: Those of `ModelConfig`.
    """

    def __init__(self, **values: Any) -> None:
        self._config = ModelConfig(**values)
        self._loaded: BlockModel | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A component that was used copies and pickles like a new one: the copy asks for the shared model again.
        return {"_config": self._config, "_loaded": None}

    @property
    def name(self) -> str:
        """The directory, hub id, or "demo"."""
        return self._config.model

    def load(self) -> BlockModel:
        """The model, loaded by whoever asks first.

        Raises:
            ValueError: It does not exist or cannot be composed exactly, or its block store cannot be opened.
        """
        if self._loaded is None:
            from blockrag.model.shared import shared_model

            try:
                self._loaded = shared_model(self._config)
            except (UnsupportedModelError, StoreError) as error:
                raise ValueError(f"model {self._config.model!r} cannot be used: {error}") from error
        return self._loaded

    async def load_async(self) -> BlockModel:
        """`load`, on another thread: reading weights takes seconds."""
        return await asyncio.to_thread(self.load) if self._loaded is None else self._loaded

    def parameters(self) -> dict[str, Any]:
        """The plain values, by the names of the components' arguments."""
        return asdict(self._config)
