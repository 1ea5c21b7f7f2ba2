"""`BlockKVWriter`: documents in an indexing pipeline get their KV states before anybody asks."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from haystack import Document, component, default_from_dict, default_to_dict

from blockrag.model.config import DEFAULT_STORE
from haystack_integrations.common.blockrag import (
    ConfiguredModel,
    DocumentForm,
    checked_form,
    document_blocks,
    document_passage,
)

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.model.block_model import Attention
    from blockrag.prompt import Block

__all__ = ["BlockKVWriter"]

_log = logging.getLogger(__name__)


@component
class BlockKVWriter:
    """Computes and stores the KV states of documents, and passes the documents on unchanged.

    Purely a prefetch: what it did not store, the generator computes when the document is first asked about. It
    therefore never loses a batch to one document; `strict=True` raises instead, for pipelines that must know.

    KV states written here stay until the store's byte budget evicts them. To have them deleted with their documents,
    use `BlockRAGDocumentStore(model=..., prebuild=True)` in the place of this writer.

    ```python
    indexing = Pipeline()
    indexing.add_component("kv", BlockKVWriter(model="demo", store="disk:///var/lib/blocks"))
    indexing.add_component("writer", DocumentWriter(document_store))
    indexing.connect("kv.documents", "writer.documents")
    ```

    Args:
        model: A directory with a saved model, a hub id, or "demo": the same as the generator's, like the seven that
            follow.
        store: See `BlockRAGChatGenerator`.
        device: See `BlockRAGChatGenerator`.
        dtype: See `BlockRAGChatGenerator`.
        attention: See `BlockRAGChatGenerator`.
        precision: See `BlockRAGChatGenerator`.
        block_fine_tuned: See `BlockRAGChatGenerator`.
        namespace: See `BlockRAGChatGenerator`.
        prompt_form: How prompts will show the documents: "rag" when they reach the generator through its `documents`
            input, "chat" when a prompt builder writes their content into a message, or the generator's own form is
            "chat".
        strict: Raise when the KV states of a document cannot be computed or stored.

    Raises:
        ValueError: There is no such prompt form.
    """

    def __init__(
        self,
        model: str = "demo",
        *,
        store: str = DEFAULT_STORE,
        device: str = "auto",
        dtype: str = "auto",
        attention: Attention = "block",
        precision: Precision | None = None,
        block_fine_tuned: bool | None = None,
        namespace: str = "",
        prompt_form: DocumentForm = "rag",
        strict: bool = False,
    ) -> None:
        self.prompt_form = checked_form(prompt_form)
        self.strict = strict
        self._model = ConfiguredModel(
            model=model,
            store=store,
            device=device,
            dtype=dtype,
            attention=attention,
            precision=precision,
            block_fine_tuned=block_fine_tuned,
            namespace=namespace,
        )

    def warm_up(self) -> None:
        """Load the model; the first `run` does it otherwise.

        Raises:
            ValueError: It does not exist, or cannot be composed exactly.
        """
        self._model.load()

    async def warm_up_async(self) -> None:
        """`warm_up`, without blocking the event loop."""
        await self._model.load_async()

    def to_dict(self) -> dict[str, Any]:
        """The component as plain values, for YAML."""
        return default_to_dict(self, **self._model.parameters(), prompt_form=self.prompt_form, strict=self.strict)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockKVWriter:
        """The component from `to_dict`'s values."""
        return default_from_dict(cls, data)

    @component.output_types(documents=list[Document], written=int, failed=int)
    def run(self, documents: list[Document]) -> dict[str, Any]:
        """Compute and store what is not stored yet.

        Args:
            documents: Documents with text.

        Returns:
            `documents` as they were given; `written`, the KV states computed and stored now; `failed`, the documents
            that have none (no text, longer than the model can place, no room in the store).

        Raises:
            ValueError: With `strict`: the first of those documents, and why. The others are stored.
        """
        from blockrag.ingest.prebuild import prebuild_blocks

        model = self._model.load()
        failures: dict[str, Exception] = {}
        blocks: list[tuple[str, Block]] = []
        for document in documents:
            try:
                passage = document_passage(document)
                blocks += [(document.id, block) for block in document_blocks(model, [passage], self.prompt_form)]
            except ValueError as error:
                failures[document.id] = error
        blocks = [(document_id, block) for document_id, block in blocks if block.token_ids]
        report = prebuild_blocks(model, [block for _, block in blocks])
        failures.update((blocks[place][0], error) for place, error in report.failures.items())
        if failures:
            first, reason = next(iter(failures.items()))
            share = f"{len(failures)} of {len(documents)} documents"
            message = f"{share} have no stored KV states; the first is {first!r}: {reason}"
            if self.strict:
                raise ValueError(message) from reason
            _log.warning("%s", message)
        return {"documents": documents, "written": report.blocks_new, "failed": len(failures)}

    @component.output_types(documents=list[Document], written=int, failed=int)
    async def run_async(self, documents: list[Document]) -> dict[str, Any]:
        """`run`, on another thread: the event loop goes on."""
        return await asyncio.to_thread(self.run, documents)
