"""Encoders: text to vectors whose inner product is similarity.

`open_encoder` turns the spec a user writes ("lexical", "contriever", "st:MODEL") into one. What an encoder is stands
in `protocol`; each other module is one way to be one. Nothing here knows indexes, stores or language models, and the
trained encoders import their libraries only when they are opened.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockrag.encoders.given import GivenVectors
from blockrag.encoders.lexical import CorpusCounts, LexicalEncoder
from blockrag.encoders.protocol import CorpusStatistics, Encoder, RescoringEncoder, StatisticalEncoder, Vectors
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.encoders.contriever import ContrieverEncoder
    from blockrag.encoders.sentence_transformer import SentenceTransformerEncoder

__all__ = [
    "ContrieverEncoder",
    "CorpusCounts",
    "CorpusStatistics",
    "Encoder",
    "GivenVectors",
    "LexicalEncoder",
    "RescoringEncoder",
    "SentenceTransformerEncoder",
    "StatisticalEncoder",
    "Vectors",
    "open_encoder",
]


def __getattr__(name: str) -> Any:
    if name == "ContrieverEncoder":
        from blockrag.encoders.contriever import ContrieverEncoder

        return ContrieverEncoder
    if name == "SentenceTransformerEncoder":
        from blockrag.encoders.sentence_transformer import SentenceTransformerEncoder

        return SentenceTransformerEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def open_encoder(spec: str) -> Encoder:
    """The encoder a spec names.

    Args:
        spec: One of
            "lexical" or "lexical:DIMENSION" (no weights, no network);
            "contriever", "contriever:ID_OR_PATH", a hub id whose name holds "contriever", or a directory whose
            config says it is a Contriever;
            "st:ID_OR_PATH" for any sentence-transformers model.

    Raises:
        InputError: The spec has none of these forms, or the model cannot be loaded.
    """
    kind, _, rest = spec.partition(":")
    if kind == "lexical":
        return _open_lexical(spec, rest)
    if kind == "st" and rest:
        from blockrag.encoders.sentence_transformer import SentenceTransformerEncoder

        return SentenceTransformerEncoder(rest)
    if spec == "contriever" or (kind == "contriever" and rest) or _is_contriever(spec):
        from blockrag.encoders.contriever import DEFAULT_CONTRIEVER, ContrieverEncoder

        source = rest if kind == "contriever" else spec
        return ContrieverEncoder(source or DEFAULT_CONTRIEVER)
    raise InputError(
        f"unknown encoder {spec!r}; pass 'lexical', 'lexical:2048', 'contriever', 'contriever:ID_OR_PATH', "
        "or 'st:ID_OR_PATH' for a sentence-transformers model"
    )


def _open_lexical(spec: str, dimension: str) -> LexicalEncoder:
    if spec == "lexical":
        return LexicalEncoder()
    if not (dimension.isascii() and dimension.isdigit() and len(dimension) < 9):
        raise InputError(f"encoder {spec!r}: {dimension!r} is not a dimension; write e.g. 'lexical:2048'")
    return LexicalEncoder(int(dimension))


def _is_contriever(spec: str) -> bool:
    """Whether a bare spec is a Contriever: by its config when it is a directory, else by its name."""
    try:
        directory = Path(spec).expanduser()
        if directory.is_dir():
            config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
            architectures = config.get("architectures") if isinstance(config, dict) else None
            return any("contriever" in str(name).lower() for name in architectures or ())
    except (OSError, ValueError, RuntimeError):
        # Unreadable, not JSON, a NUL in the path, or an unknown home directory: not a Contriever.
        return False
    return "contriever" in spec.rpartition("/")[2].lower()
