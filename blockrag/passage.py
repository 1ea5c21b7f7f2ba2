"""What is retrieved: a `Passage` is the unit of text, a `Hit` is a passage with its score.

Passages are the data of record. Embeddings and KV states are derived from them and can always be rebuilt,
so nothing here knows about vectors, tokens or models. The names are those of DPR and Contriever.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from blockrag.errors import InputError

__all__ = ["Hit", "Passage", "refuse_lone_surrogates"]

_EMPTY: Mapping[str, object] = MappingProxyType({})


def refuse_lone_surrogates(owner: str, fields: Mapping[str, str], error: type[InputError]) -> None:
    """Check that strings can be stored as UTF-8.

    Args:
        owner: What they belong to, for the message.
        fields: Strings by name.
        error: The exception to raise.

    Raises:
        InputError: Of the type `error`: one of the strings holds a lone surrogate.
    """
    for name, value in fields.items():
        try:
            value.encode()
        except UnicodeEncodeError as problem:
            raise error(
                f"{owner}: {name} holds a lone surrogate at character {problem.start} "
                f"({value[problem.start]!r}); decode the source with errors='replace'"
            ) from None


@dataclass(frozen=True, slots=True)
class Passage:
    """One passage: what the encoder embeds and the model prefills as one block.

    Args:
        id: Unique within an index; any non-empty string.
        text: The passage text, without its title.
        title: Shown to the model and the encoder before the text; may be empty.
        document_id: The document the passage was cut from; defaults to `id`.
        metadata: JSON-serialisable facts to filter by; never shown to the model.

    Raises:
        InputError: The id is empty, or one of the strings holds a lone surrogate (it cannot be stored as UTF-8).
    """

    id: str
    text: str
    title: str = ""
    document_id: str = ""
    metadata: Mapping[str, object] = field(default_factory=lambda: _EMPTY)

    def __post_init__(self) -> None:
        if not self.id:
            raise InputError("a passage needs a non-empty id; pass e.g. its document id and its number")
        if not self.document_id:
            object.__setattr__(self, "document_id", self.id)
        names = ("id", "text", "title", "document_id")
        refuse_lone_surrogates(f"passage {self.id!r}", {name: getattr(self, name) for name in names}, InputError)


@dataclass(frozen=True, slots=True)
class Hit:
    """A passage found by a search.

    Args:
        passage: The passage.
        score: Higher is better; the scale is the encoder's own (an inner product, or BM25 for the lexical encoder).
    """

    passage: Passage
    score: float
