"""What fine-tuning needs beyond blockrag's own dependencies, asked for by name before it is imported."""

from __future__ import annotations

from importlib.util import find_spec

from blockrag.errors import MissingDependencyError

__all__ = ["require"]


def require(package: str, purpose: str) -> None:
    """Refuse where a package is missing.

    Args:
        package: Its name, as it is imported and installed.
        purpose: What needs it, for the message.

    Raises:
        MissingDependencyError: It is not installed.
    """
    if find_spec(package) is None:
        raise MissingDependencyError(f"{purpose} needs {package}; run: pip install 'blockrag[finetune]'")
