"""Which model a component means, as plain values: cheap to import, to copy, to pickle and to compare.

`blockrag.model.shared` turns it into the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.model.block_model import Attention

__all__ = ["DEFAULT_STORE", "ModelConfig"]

DEFAULT_STORE = "memory://?max_bytes=2GiB"
"""The store of a configuration that names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """What makes two models the same for callers in one process: the arguments of `BlockModel.from_pretrained`.

    Args:
        model: A directory, a hub id, or "demo".
        store: URL of the block store, as `open_store` takes it. Equal URLs are one store, also across models.
        device: See `BlockModel.from_pretrained`.
        dtype: See `BlockModel.from_pretrained`.
        attention: See `BlockModel`.
        precision: See `BlockModel`.
        block_fine_tuned: See `BlockModel.from_pretrained`.
        namespace: See `BlockModel`.
    """

    model: str = "demo"
    store: str = DEFAULT_STORE
    device: str = "auto"
    dtype: str = "auto"
    attention: Attention = "block"
    precision: Precision | None = None
    block_fine_tuned: bool | None = None
    namespace: str = ""
