"""Run by test_ingestion.py in a process of its own: an ingestion that is killed while it transforms.

Usage: ingest_and_die.py STATE, which holds the index, the block store and docstore.json.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llama_index.core import Document
from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore

state = Path(sys.argv[1])


class Dies(TransformComponent):
    """Ends like a power cut, when the old version was deleted already."""

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        os.kill(os.getpid(), signal.SIGKILL)
        return nodes


IngestionPipeline(
    transformations=[Dies()],
    docstore=SimpleDocumentStore.from_persist_path(str(state / "docstore.json")),
    vector_store=BlockRAGVectorStore(persist_path=str(state / "index")),
    docstore_strategy=DocstoreStrategy.UPSERTS,
).run(documents=[Document(id_="a", text="The new text."), Document(id_="b", text="Another text.")])
