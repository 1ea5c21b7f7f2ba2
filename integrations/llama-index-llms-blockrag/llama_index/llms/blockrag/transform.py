"""`BlockKVTransform`: computes KV states while an ingestion pipeline runs.

Pure prefetch: nodes pass unchanged, and what is not computed here is computed by the first question. It follows that
an `IngestionCache` hit, which skips the transform, costs time later and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

from llama_index.core.bridge.pydantic import Field, PrivateAttr
from llama_index.core.schema import BaseNode, TransformComponent
from llama_index.llms.blockrag.model_fields import ModelFields
from llama_index.llms.blockrag.nodes import node_blocks

from blockrag.errors import InputError
from blockrag.ingest import encode_blocks, prebuild_blocks

__all__ = ["BlockKVTransform"]

_log = logging.getLogger(__name__)


class BlockKVTransform(ModelFields, TransformComponent):
    """Stores the KV states of nodes' blocks in the language model's block store, and returns the nodes as they are.

    Put it behind whatever changes nodes' text or metadata. With `num_workers`, or in Ray, it is built again in every
    worker from its fields; `store_url` must then name a store that processes share, such as a directory.

    A node whose KV states cannot be computed or stored (longer than the model can place, say) is logged, counted in
    `failed`, and passes like the others.

    Args:
        model_name: The language model. It and the other fields of the model must be those of the `BlockRAGLLM` that
            answers.
        strict: Whether a node whose KV states cannot be computed or stored is an error.
        fingerprint: Digest of everything that shapes the KV states; filled from the model. As a field it is part of
            LlamaIndex's cache keys, so that nodes that were cached under another model come here again. Given, it must
            be the model's.

    Raises:
        InputError: The model cannot be loaded, or has another fingerprint.
        UnsupportedModelError: The model's KV states cannot be composed exactly.
    """

    model_name: str | None = Field(default="demo", description="Directory or hub id of the language model.")
    strict: bool = Field(default=False, description="Whether a failing node is an error.")
    fingerprint: str = Field(default="", description="Digest of what shapes the KV states; filled from the model.")

    _failed: int = PrivateAttr(default=0)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def __init__(self, **fields: Any) -> None:
        super().__init__(**fields)
        found = self.shared_model().fingerprint.digest
        if self.fingerprint not in ("", found):
            raise InputError(
                f"fingerprint {self.fingerprint!r} is not that of model {self.model_name!r} here, {found!r}: weights, "
                "dtype (device) or precision differ; leave it out to take what there is"
            )
        self.fingerprint = found

    @classmethod
    def class_name(cls) -> str:
        """The name this class is serialized under."""
        return "BlockKVTransform"

    @property
    def failed(self) -> int:
        """Nodes whose KV states could not be computed or stored, since this object was made."""
        return self._failed

    def __call__(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """Compute and store what the block store lacks.

        Returns:
            `nodes`.

        Raises:
            BlockRAGError: Only with `strict`: the first failure. The others are computed all the same.
        """
        model = self.shared_model()
        if multiprocessing.parent_process() is not None and model.store.url.startswith("memory:"):
            _log.warning("KV states in memory end with this worker process; pass a directory as store_url")
        blocks, failures = encode_blocks(nodes, partial(_blocks_of, self))
        places = list(blocks)
        report = prebuild_blocks(model, list(blocks.values()))
        failures.update((places[place], error) for place, error in report.failures.items())
        with self._lock:
            self._failed += len(failures)
        if failures:
            first = min(failures)
            if self.strict:
                raise failures[first]
            _log.warning(
                "%d of %d nodes pass without KV states; the first is %r: %s",
                len(failures),
                len(nodes),
                nodes[first].node_id,
                failures[first],
            )
        return nodes

    async def acall(self, nodes: Sequence[BaseNode], **kwargs: Any) -> Sequence[BaseNode]:
        """The same, on another thread."""
        return await asyncio.to_thread(self, nodes)


def _blocks_of(transform: BlockKVTransform, nodes: Sequence[BaseNode]) -> list[Any]:
    return node_blocks(transform.shared_model(), nodes, transform.prompt_form)
