"""What the blockrag components have in common; not an interface of its own.

configured_model.py   the model that equal configurations share
documents.py          Haystack's documents as passages, and the blocks they become
"""

from haystack_integrations.common.blockrag.configured_model import ConfiguredModel
from haystack_integrations.common.blockrag.documents import (
    DocumentForm,
    checked_form,
    document_blocks,
    document_excerpt,
    document_passage,
)

__all__ = [
    "ConfiguredModel",
    "DocumentForm",
    "checked_form",
    "document_blocks",
    "document_excerpt",
    "document_passage",
]
