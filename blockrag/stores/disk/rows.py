"""What a row of the index may hold, and the names a value file may have: all else is refused before it is used."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from diskcache.core import MODE_BINARY, MODE_RAW

from blockrag.errors import InputError, UnsafeStoreError
from blockrag.fingerprint import check_key

__all__ = ["COLUMNS", "Row", "is_key", "is_value_name"]

_FILENAME: Final = re.compile(r"[0-9a-f]{2}/[0-9a-f]{30}\.val")

COLUMNS: Final = (
    "key, raw, mode, size, filename, CASE typeof(value) WHEN 'blob' THEN x'' WHEN 'null' THEN NULL ELSE 0 END"
)
"""The columns of a `Row` without the bytes of its value."""


class Row(NamedTuple):
    """One row of the index, as found; `checked` before it is used."""

    key: str
    raw: int
    mode: int
    size: int
    filename: str | None
    value: bytes | None

    @property
    def sound(self) -> bool:
        """Whether it is a row that `DiskStore` writes."""
        if self.mode == MODE_RAW:
            placed = self.filename is None and isinstance(self.value, bytes)
        else:
            placed = self.mode == MODE_BINARY and self.value is None and is_value_name(self.filename)
        return placed and self.raw == 1 and is_key(self.key) and type(self.size) is int and self.size >= 0

    def __str__(self) -> str:
        return (
            f"key {self.key!r:.80}, raw={self.raw!r:.20}, mode={self.mode!r:.20}, size={self.size!r:.20}, "
            f"file {self.filename!r:.80}"
        )

    def checked(self) -> Row:
        """This row, if it is sound; raises UnsafeStoreError otherwise."""
        if not self.sound:
            raise UnsafeStoreError(
                f"the store holds a row blockrag never writes ({self}); do not trust this directory, delete it"
            )
        return self


def is_key(key: object) -> bool:
    """Whether it is a block key."""
    try:
        check_key(key)  # type: ignore[arg-type]
    except InputError:
        return False
    return True


def is_value_name(name: object) -> bool:
    """Whether it is a name that this package gives to value files."""
    return isinstance(name, str) and _FILENAME.fullmatch(name) is not None
