"""Components that are their fields: copies and pickles carry these alone, and open what they need themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from llama_index.core.bridge.pydantic import BaseModel
from llama_index.core.schema import BaseComponent

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["PlainFields"]


class PlainFields(BaseComponent):
    """A component whose private attributes (models, indexes, locks) stay in its process."""

    def __getstate__(self) -> dict[str, Any]:
        # Not LlamaIndex's own, which tries to pickle each private attribute and logs those that fail.
        return {**BaseModel.__getstate__(self), "__pydantic_private__": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state["__dict__"])  # type: ignore[misc]

    def __deepcopy__(self, memo: dict[int, Any] | None = None) -> Self:
        copy = type(self).__new__(type(self))
        copy.__setstate__(self.__getstate__())
        return copy
