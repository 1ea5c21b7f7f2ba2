"""blockrag's errors as LangChain's users catch them: as ValueErrors, and a prompt too long as ContextOverflowError."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from blockrag.errors import BlockRAGError, MissingDependencyError, PromptTooLongError
from langchain_core.exceptions import ContextOverflowError

__all__ = ["ContextTooLongError", "langchain_errors"]


class ContextTooLongError(ContextOverflowError, PromptTooLongError):
    """The prompt and the room for its answer exceed the positions the model can place exactly."""


@contextmanager
def langchain_errors() -> Iterator[None]:
    """Within this context blockrag's errors leave as LangChain's; what is not blockrag's passes as it is.

    Raises:
        ContextTooLongError: In place of `PromptTooLongError`.
        ValueError: In place of errors of blockrag that are neither a ValueError nor an ImportError.
    """
    try:
        yield
    except ContextTooLongError:
        raise
    except PromptTooLongError as error:
        raise ContextTooLongError(str(error)) from error
    except BlockRAGError as error:
        if isinstance(error, (ValueError, MissingDependencyError)):
            raise
        raise ValueError(str(error)) from error
