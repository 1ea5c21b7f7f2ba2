"""Every exception blockrag raises on purpose.

Each message carries the offending value and the next step, so that one printed line is enough. The
command line turns a `BlockRAGError` into that line and an exit code; anything else is a defect.

    BlockRAGError
    +-- InputError (ValueError)          what the caller passed cannot be used
    |   +-- PromptError                  a prompt, template or chat message is malformed
    |   +-- DocumentError                a document cannot be read, or is not text
    |   +-- DataError                    a line of a training or evaluation file cannot be used
    |   +-- PromptTooLongError           prompt plus answer exceed what the model can place
    |   `-- NotFiniteError               the model computed NaN or infinity
    +-- UnsupportedModelError            this model's KV states cannot be composed exactly
    +-- StoreError                       a block store cannot do what was asked
    |   +-- DamagedBlockError            stored bytes are not the block they claim to be (a miss)
    |   +-- StoreFullError               the block does not fit the store's byte budget or the disk
    |   +-- UnsafeStoreError             the directory holds rows that blockrag never writes
    |   `-- MissingBlockError            passages are not stored, and must not be computed now
    +-- PassageIndexError                the passage index is damaged, foreign or misused
    `-- MissingDependencyError           an optional package is needed for what was asked
"""

from __future__ import annotations

__all__ = [
    "BlockRAGError",
    "DamagedBlockError",
    "DataError",
    "DocumentError",
    "InputError",
    "MissingBlockError",
    "MissingDependencyError",
    "NotFiniteError",
    "PassageIndexError",
    "PromptError",
    "PromptTooLongError",
    "StoreError",
    "StoreFullError",
    "UnsafeStoreError",
    "UnsupportedModelError",
]


class BlockRAGError(Exception):
    """Base class of every error blockrag raises on purpose."""


class InputError(BlockRAGError, ValueError):
    """What the caller passed cannot be used; the message says which value and what to pass instead."""


class PromptError(InputError):
    """A prompt, a prompt template or a chat message is malformed."""


class DocumentError(InputError):
    """A document cannot be read, or is not text."""


class DataError(InputError):
    """A file or line of training or evaluation data cannot be used; the message names the file and the line."""


class PromptTooLongError(InputError):
    """The prompt and the room for its answer exceed the positions the model can place exactly."""


class NotFiniteError(InputError):
    """The model computed NaN or infinity for a text: nothing of it is stored, and no answer is made from it."""


class UnsupportedModelError(BlockRAGError):
    """The model's KV states cannot be composed exactly; the message says which layer and by how much."""


class StoreError(BlockRAGError):
    """A block store cannot do what was asked."""


class DamagedBlockError(StoreError):
    """Stored bytes are not the block they claim to be.

    Readers treat it as a miss: the block is recomputed and the bad copy replaced.

    Attributes:
        reason: One of "length", "magic", "version", "checksum", "key", "fingerprint", "shape", "precision",
            "scale", "channel".
    """

    def __init__(self, message: str, *, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class StoreFullError(StoreError):
    """The block does not fit the store's byte budget, or the disk is full."""


class UnsafeStoreError(StoreError):
    """A store directory holds rows blockrag never writes (pickled values, raw keys, foreign paths)."""


class MissingBlockError(StoreError):
    """Passages' blocks are not stored, or damaged, and were not to be computed now (`on_miss="error"`).

    Attributes:
        sources: The passages' ids, or the beginning of their text where they have none.
    """

    def __init__(self, sources: tuple[str, ...]) -> None:
        named = ", ".join(f"{source!r:.60}" for source in sources[:5])
        more = f" and {len(sources) - 5} more" if len(sources) > 5 else ""
        super().__init__(
            f"{len(sources)} passages of this prompt are not stored or damaged: {named}{more}; ingest their documents "
            'again, or pass on_miss="compute"'
        )
        self.sources = sources


class PassageIndexError(BlockRAGError):
    """The passage index is damaged, was built by another encoder, or is used wrongly."""


class MissingDependencyError(BlockRAGError, ImportError):
    """An optional package is needed for what was asked; the message carries the pip line."""
