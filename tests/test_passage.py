"""Passages: what they default to, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest

from blockrag import Document, Hit, Passage
from blockrag.errors import DocumentError, InputError


def test_a_passage_is_its_own_document_unless_it_says_otherwise() -> None:
    passage = Passage(id="a#1", text="x")
    assert (passage.document_id, passage.title, dict(passage.metadata)) == ("a#1", "", {})
    assert Passage(id="a#1", text="x", document_id="a").document_id == "a"
    with pytest.raises(dataclasses.FrozenInstanceError):
        passage.text = "y"  # type: ignore[misc]
    assert Hit(passage, 1.5).passage is passage


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(InputError, match="non-empty id"):
        Passage(id="", text="x")


@pytest.mark.parametrize("name", ["id", "text", "title", "document_id"])
def test_lone_surrogates_are_refused_with_their_place(name: str) -> None:
    fields = {"id": "a", "text": "x", name: "ab\ud800c"}
    with pytest.raises(InputError, match=f"{name} holds a lone surrogate at character 2 .*errors='replace'"):
        Passage(**fields)
    if name != "document_id":
        with pytest.raises(DocumentError, match=f"{name} holds a lone surrogate at character 2"):
            Document(**fields)
