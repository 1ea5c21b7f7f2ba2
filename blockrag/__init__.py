"""Retrieval-augmented generation that does not prefill the same passages twice.

    from blockrag import BlockRAG

    rag = BlockRAG.from_pretrained("demo", path="my-index")
    rag.ingest(["docs/"])
    answer = rag.query("What is the capital of Bhutan?")
    print(answer.text, answer.usage.tokens_reused)

Names are imported when they are used, so that `import blockrag` loads no heavy library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOMES = {
    "Answer": "blockrag.rag",
    "BeyondTrainingWarning": "blockrag.model.trained",
    "Block": "blockrag.prompt",
    "BlockAttentionFacts": "blockrag.model.facts",
    "BlockKV": "blockrag.kv",
    "BlockModel": "blockrag.model.block_model",
    "BlockRAG": "blockrag.rag",
    "BlockRAGError": "blockrag.errors",
    "Document": "blockrag.ingest",
    "GenerationOptions": "blockrag.model.sampling",
    "Hit": "blockrag.passage",
    "IngestReport": "blockrag.ingest",
    "NotBlockFineTunedWarning": "blockrag.model.facts",
    "Passage": "blockrag.passage",
    "PassageIndex": "blockrag.index",
    "PromptTemplate": "blockrag.prompt",
    "SegmentedPrompt": "blockrag.prompt",
    "open_encoder": "blockrag.encoders",
    "open_store": "blockrag.stores",
    "template_for": "blockrag.prompt",
}

if TYPE_CHECKING:
    from blockrag.encoders import open_encoder
    from blockrag.errors import BlockRAGError
    from blockrag.index import PassageIndex
    from blockrag.ingest import Document, IngestReport
    from blockrag.kv import BlockKV
    from blockrag.model.block_model import BlockModel
    from blockrag.model.facts import BlockAttentionFacts, NotBlockFineTunedWarning
    from blockrag.model.sampling import GenerationOptions
    from blockrag.model.trained import BeyondTrainingWarning
    from blockrag.passage import Hit, Passage
    from blockrag.prompt import Block, PromptTemplate, SegmentedPrompt, template_for
    from blockrag.rag import Answer, BlockRAG
    from blockrag.stores import open_store

__all__ = [
    "Answer",
    "BeyondTrainingWarning",
    "Block",
    "BlockAttentionFacts",
    "BlockKV",
    "BlockModel",
    "BlockRAG",
    "BlockRAGError",
    "Document",
    "GenerationOptions",
    "Hit",
    "IngestReport",
    "NotBlockFineTunedWarning",
    "Passage",
    "PassageIndex",
    "PromptTemplate",
    "SegmentedPrompt",
    "open_encoder",
    "open_store",
    "template_for",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'blockrag' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
