"""The vectors that go into an index or search it: made by its encoder or brought by the caller, and always checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np

from blockrag.encoders.given import as_vectors
from blockrag.encoders.protocol import Encoder, Vectors
from blockrag.errors import InputError, PassageIndexError
from blockrag.passage import Passage

__all__ = ["VectorsById", "checked_vectors", "embed_missing", "given_vectors"]

VectorsById: TypeAlias = Mapping[str, Vectors]
"""One vector `[dimension]` float32 for each passage id."""


def checked_vectors(encoder: Encoder, vectors: Vectors, *, what: str) -> Vectors:
    """Vectors from outside as `[n, dimension]` float32.

    Args:
        encoder: The index's encoder, which says how long they must be.
        vectors: They.
        what: What they are, for messages.

    Raises:
        InputError: They have another shape, or one is not finite.
    """
    array = as_vectors(vectors, what=what)
    if array.shape[:1] == (0,):
        return np.zeros((0, encoder.dimension), dtype=np.float32)
    if array.ndim != 2 or array.shape[1] != encoder.dimension:
        raise InputError(
            f"{what} have shape {array.shape}, but the index of {encoder.name!r} holds {encoder.dimension} "
            "dimensions: use the embedding model that built it, or a new index"
        )
    if not np.isfinite(array).all():
        row = int(np.argmin(np.isfinite(array).all(axis=1)))
        raise InputError(f"{what}: row {row} is not finite; check the embedding model's precision and weights")
    return array


def given_vectors(encoder: Encoder, passages: Sequence[Passage], vectors: Vectors) -> VectorsById:
    """The caller's vectors of these passages, by passage id.

    Raises:
        InputError: As `checked_vectors`; also when there is not one for each passage.
    """
    checked = checked_vectors(encoder, vectors, what="vectors")
    if len(checked) != len(passages):
        raise InputError(f"{len(checked)} vectors are given for {len(passages)} passages; pass one for each")
    return {passage.id: vector for passage, vector in zip(passages, checked, strict=True)}


def embed_missing(encoder: Encoder, passages: Sequence[Passage], vectors: dict[str, Vectors]) -> None:
    """Add the vectors that `vectors` lacks, by passage id; equal texts are embedded once.

    Raises:
        PassageIndexError: The encoder gave vectors of another shape, or one that is not finite.
    """
    missing = [passage for passage in passages if passage.id not in vectors]
    first = {(passage.title, passage.text): passage for passage in reversed(missing)}
    distinct = list(first.values())[::-1]
    if not distinct:
        return
    embedded = encoder.encode_passages(distinct)
    if embedded.shape != (len(distinct), encoder.dimension):
        raise PassageIndexError(
            f"encoder {encoder.name!r} gave vectors of shape {embedded.shape} for {len(distinct)} passages, not "
            f"({len(distinct)}, {encoder.dimension}); fix the encoder"
        )
    finite = np.isfinite(embedded).all(axis=1)
    if not finite.all():
        culprit = distinct[int(np.argmin(finite))]
        raise PassageIndexError(
            f"encoder {encoder.name!r} gave a vector that is not finite for passage {culprit.id!r}; check the "
            "encoder's precision and weights"
        )
    by_text = {
        (passage.title, passage.text): vector
        for passage, vector in zip(distinct, embedded.astype(np.float32, copy=False), strict=True)
    }
    vectors.update((passage.id, by_text[passage.title, passage.text]) for passage in missing)
