"""What documents' meta holds: fields, their types, and their values. Pure functions over documents."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from haystack import Document

__all__ = ["fields_info", "min_max", "name_of", "unique_values"]


def name_of(field: str) -> str:
    """A field's name without "meta."."""
    return field.removeprefix("meta.")


def unique_values(documents: Sequence[Document], field: str) -> list[Any]:
    """The different values of a field, in the order of their text; 1, 1.0, "1" and True are four."""
    values = _values(documents, field)
    # Meta is JSON, and values that differ differ there: 1, 1.0, "1" and true.
    by_text = {json.dumps(value, sort_keys=True, ensure_ascii=False): value for value in values}
    return sorted(by_text.values(), key=lambda value: (str(value), type(value).__name__))


def fields_info(documents: Sequence[Document]) -> dict[str, dict[str, str]]:
    """The type of each field, by its last value: "keyword", "int", "float" or "boolean"."""
    names = {bool: "boolean", int: "int", float: "float"}
    return {
        field: {"type": names.get(type(value), "keyword")}
        for document in documents
        for field, value in document.meta.items()
        if value is not None
    }


def min_max(documents: Sequence[Document], field: str) -> dict[str, Any]:
    """The least and the greatest value of a field; None when there is none, or when they do not compare."""
    values = [value for value in _values(documents, field) if isinstance(value, (int, float, str))]
    try:
        return {"min": min(values, default=None), "max": max(values, default=None)}
    except TypeError:
        return {"min": None, "max": None}


def _values(documents: Sequence[Document], field: str) -> list[Any]:
    found = [document.meta.get(name_of(field)) for document in documents]
    return [value for value in found if value is not None]
