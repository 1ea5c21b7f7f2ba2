"""What every store checks of what it is given."""

from __future__ import annotations

from collections.abc import Sequence

from blockrag.errors import InputError

__all__ = ["byte_view", "check_distinct"]


def byte_view(data: bytes | bytearray | memoryview) -> memoryview:
    """A flat view of the bytes of `data`, for `put`.

    Raises:
        InputError: `data` is no contiguous byte buffer.
    """
    try:
        return memoryview(data).cast("B")
    except TypeError as error:
        raise InputError(f"a store keeps bytes, got {type(data).__name__} ({error}); encode the block first") from None


def check_distinct(keys: Sequence[str]) -> None:
    """Let the keys of a `get_many` pass.

    Raises:
        InputError: A key comes twice.
    """
    if len(set(keys)) != len(keys):
        raise InputError(f"get_many got {len(keys)} keys, {len(set(keys))} distinct; pass each key once")
