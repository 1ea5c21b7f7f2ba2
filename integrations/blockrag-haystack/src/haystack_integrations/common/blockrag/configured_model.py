"""The language model a component was configured with: plain values until it is needed.

Components with equal configurations share one model and one block store per process (`blockrag.model.shared`), which
is what lets a writer in an indexing pipeline compute KV states for a generator in another pipeline.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from blockrag.errors import UnsupportedModelError

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.model.block_model import Attention, BlockModel

__all__ = ["DEFAULT_STORE", "ConfiguredModel"]

# The value of `blockrag.model.shared.DEFAULT_STORE`, which cannot be imported without torch.
DEFAULT_STORE = "memory://?max_bytes=2GiB"


@dataclass(frozen=True, kw_only=True)
class ConfiguredModel:
    """The arguments of `blockrag.model.shared.ModelConfig`, and the model once it is loaded."""

    model: str
    store: str
    device: str
    dtype: str
    attention: Attention
    precision: Precision | None
    block_fine_tuned: bool | None
    namespace: str
    _loaded: list[BlockModel] = field(default_factory=list, compare=False, repr=False)

    def load(self) -> BlockModel:
        """The model, loaded by whoever asks first.

        Raises:
            ValueError: It does not exist, or cannot be composed exactly.
            blockrag.errors.StoreError: The store's directory cannot be used.
        """
        if not self._loaded:
            from blockrag.model.shared import ModelConfig, shared_model

            try:
                self._loaded.append(shared_model(ModelConfig(**self.parameters())))
            except UnsupportedModelError as error:
                raise ValueError(f"model {self.model!r} cannot be used: {error}") from error
        return self._loaded[0]

    async def load_async(self) -> BlockModel:
        """`load`, on another thread: reading weights takes seconds."""
        return self._loaded[0] if self._loaded else await asyncio.to_thread(self.load)

    def parameters(self) -> dict[str, Any]:
        """The plain values, by the names of the components' arguments."""
        # asdict would copy the model.
        return {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.startswith("_")}
