"""Tiny models that several test files use: one per case and process, for building them takes long."""

from __future__ import annotations

from functools import cache
from typing import Any

from tiny_models import CASES, tiny_model

from blockrag.model.facts import BlockAttentionFacts

__all__ = ["FINE_TUNED", "shared_model"]

FINE_TUNED = BlockAttentionFacts(block_fine_tuned=True)


@cache
def shared_model(case_id: str) -> Any:
    """The weights of a case of `tiny_models.CASES`; nobody may change them."""
    return tiny_model(next(case for case in CASES if case.id == case_id))
