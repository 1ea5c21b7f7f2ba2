"""What the two embedders have in common: an encoder by name, opened when it is first needed."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import TYPE_CHECKING, Any

from haystack import default_from_dict, default_to_dict

if TYPE_CHECKING:
    from typing_extensions import Self

    from blockrag.encoders import Encoder

__all__ = ["EncoderComponent"]


class EncoderComponent:
    """A component around one of blockrag's encoders.

    Args:
        encoder: See `BlockRAGTextEmbedder`.
    """

    def __init__(self, encoder: str = "lexical") -> None:
        self.encoder = encoder

    @cached_property
    def _encoder(self) -> Encoder:
        from blockrag.encoders import open_encoder

        return open_encoder(self.encoder)

    def __getstate__(self) -> dict[str, Any]:
        # A component that was used copies and pickles like a new one.
        return {name: value for name, value in self.__dict__.items() if name != "_encoder"}

    def warm_up(self) -> None:
        """Load the encoder; the first `run` does it otherwise.

        Raises:
            ValueError: There is no such encoder.
        """
        _ = self._encoder

    async def warm_up_async(self) -> None:
        """`warm_up`, without blocking the event loop."""
        await asyncio.to_thread(self.warm_up)

    def to_dict(self) -> dict[str, Any]:
        """The component as plain values, for YAML."""
        return default_to_dict(self, encoder=self.encoder)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The component from `to_dict`'s values."""
        return default_from_dict(cls, data)
