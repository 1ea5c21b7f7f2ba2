"""LlamaIndex's metadata filters as predicates on metadata, and the part of them an index can look up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from llama_index.core.vector_stores.types import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

__all__ = ["equalities", "predicate"]

_Metadata: TypeAlias = Mapping[str, Any]


def predicate(filters: MetadataFilters | MetadataFilter) -> Callable[[_Metadata], bool]:
    """Whether metadata passes; filters may be nested. What an operator means is LlamaIndex's own definition."""
    if not isinstance(filters, MetadataFilters):
        alone = MetadataFilters(filters=[filters])
        return lambda metadata: build_metadata_filter_fn(lambda _: metadata, alone)("")
    parts = [predicate(part) for part in filters.filters]
    if filters.condition is FilterCondition.OR:
        return lambda metadata: not parts or any(part(metadata) for part in parts)
    if filters.condition is FilterCondition.NOT:
        return lambda metadata: not any(part(metadata) for part in parts)
    return lambda metadata: all(part(metadata) for part in parts)


def equalities(filters: MetadataFilters) -> dict[str, str]:
    """Strings that metadata must equal if it is to pass: necessary, not sufficient."""
    if filters.condition not in (None, FilterCondition.AND):
        return {}
    return {
        part.key: part.value
        for part in filters.filters
        if isinstance(part, MetadataFilter) and part.operator is FilterOperator.EQ and isinstance(part.value, str)
    }
