"""What surrounds every forward that blockrag runs: one at a time per model, with its linear layers at their fastest."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from blockrag.model.linear import FastLinears

if TYPE_CHECKING:
    from types import TracebackType

    from torch import nn

__all__ = ["ForwardGuard"]


class ForwardGuard:
    """A reentrant lock around the forwards of one model.

    Some models change their frequencies in a forward, and `FastLinears` changes their layers around it.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.exclusive = threading.RLock()
        """The lock alone, for forwards that must be the model's own in every operation."""
        self._linears = FastLinears(model)

    def __enter__(self) -> None:
        self.exclusive.acquire()
        try:
            self._linears.__enter__()
        except BaseException:
            self.exclusive.release()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._linears.__exit__(kind, error, trace)
        finally:
            self.exclusive.release()
