"""Ingestion that dies half-way leaves the old version of its documents answering.

`IngestionPipeline` deletes a changed document from the vector store before it transforms the new version. A span
handler, installed when a `BlockRAGVectorStore` is made, turns these deletions into announcements for as long as
`IngestionPipeline.run` or `arun` of that store lasts: what was announced is replaced when the new nodes are added, and
deleted when the run ends well. Indexes have no such span; around `update_ref_doc` and `refresh_ref_docs` write
`with vector_store.replacing():`.
"""

from __future__ import annotations

import logging
import threading
from contextlib import AbstractContextManager
from inspect import BoundArguments
from typing import TYPE_CHECKING, Any

from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
from llama_index.core.instrumentation.span import BaseSpan
from llama_index.core.instrumentation.span_handlers import BaseSpanHandler
from llama_index_instrumentation import get_dispatcher

from blockrag.errors import BlockRAGError

if TYPE_CHECKING:
    from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore

__all__ = ["install"]

_log = logging.getLogger(__name__)
_LOCK = threading.Lock()
_METHODS = frozenset({"run", "arun"})


def install() -> None:
    """Put the handler at LlamaIndex's root dispatcher, once per process."""
    root = get_dispatcher()
    with _LOCK:
        if not any(isinstance(handler, ReplacingSpanHandler) for handler in root.span_handlers):
            root.add_span_handler(ReplacingSpanHandler())


class _ReplacingSpan(BaseSpan):
    """A run whose store is replacing."""

    replacing: Any


class ReplacingSpanHandler(BaseSpanHandler[_ReplacingSpan]):
    """Puts the store of a running ingestion pipeline into `replacing`."""

    @classmethod
    def class_name(cls) -> str:
        """The handler's name."""
        return "ReplacingSpanHandler"

    def new_span(
        self,
        id_: str,
        bound_args: BoundArguments,
        instance: Any | None = None,
        parent_span_id: str | None = None,
        tags: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> _ReplacingSpan | None:
        """Begin, where a pipeline with one of our stores begins to run."""
        if not isinstance(instance, IngestionPipeline) or not _METHODS & {id_.partition("-")[0].rpartition(".")[2]}:
            return None
        store = _ours(instance.vector_store)
        if store is None:
            return None
        # Only this strategy has the whole corpus in one run, and says what is no longer in it.
        sweep = instance.docstore is not None and instance.docstore_strategy is DocstoreStrategy.UPSERTS_AND_DELETE
        replacing = store.replacing(sweep=sweep)
        replacing.__enter__()
        return _ReplacingSpan(id_=id_, parent_id=parent_span_id, replacing=replacing)

    def prepare_to_exit_span(
        self,
        id_: str,
        bound_args: BoundArguments,
        instance: Any | None = None,
        result: Any | None = None,
        **kwargs: Any,
    ) -> _ReplacingSpan | None:
        """The run ended well: what was announced and not added goes."""
        return self._end(id_, None)

    def prepare_to_drop_span(
        self,
        id_: str,
        bound_args: BoundArguments,
        instance: Any | None = None,
        err: BaseException | None = None,
        **kwargs: Any,
    ) -> _ReplacingSpan | None:
        """The run failed: what was announced stays."""
        return self._end(id_, err or RuntimeError("the run was dropped"))

    def _end(self, id_: str, error: BaseException | None) -> _ReplacingSpan | None:
        span = self.open_spans.get(id_)
        if span is None:
            return None
        replacing: AbstractContextManager[None] = span.replacing
        try:
            replacing.__exit__(None if error is None else type(error), error, None)
        except BlockRAGError as problem:
            # The dispatcher would drop it without a word.
            _log.error("documents that an ingestion deleted answer still: %s; run it again, or delete them", problem)
        return span


def _ours(vector_store: object) -> BlockRAGVectorStore | None:
    from llama_index.llms.blockrag.vector_store import BlockRAGVectorStore

    return vector_store if isinstance(vector_store, BlockRAGVectorStore) else None
