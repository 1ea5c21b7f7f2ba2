"""`BlockRAGDocumentStore`: documents, their embeddings, and the KV states that live as long as they do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from haystack import Document, default_from_dict, default_to_dict
from haystack.document_stores.errors import DocumentStoreError, DuplicateDocumentError
from haystack.document_stores.types import DuplicatePolicy
from haystack.errors import FilterError
from haystack.utils.filters import document_matches_filter

from blockrag.errors import PassageIndexError, StoreError
from blockrag.model.config import DEFAULT_STORE
from haystack_integrations.common.blockrag import ConfiguredModel, DocumentForm, checked_form, document_blocks
from haystack_integrations.document_stores.blockrag import metadata
from haystack_integrations.document_stores.blockrag.records import from_passage, has_content, is_embedded, to_passage

if TYPE_CHECKING:
    from blockrag.codec import Precision
    from blockrag.ingest import PassageStore
    from blockrag.model.block_model import Attention, BlockModel
    from blockrag.passage import Passage
    from blockrag.prompt import Block

__all__ = ["BlockRAGDocumentStore"]


class BlockRAGDocumentStore:
    """Documents in SQLite, their embeddings in FAISS, and, with a model, their KV states in its block store.

    With a model, writing a document also computes the KV states of its block, and deleting or overwriting it drops
    those that no other document shares. Similarity is the inner product: for embedders meant for cosine similarity,
    let the embedder normalise. Documents without an embedding are stored, filtered and counted like the others, and
    never found by one.

    Args:
        path: The directory; None keeps everything in memory. Several stores, also of several processes, may use one.
        embedding_dim: Numbers in an embedding.
        kind: "flat" searches exactly; "hnsw" and "ivf" approximately, for millions of documents.
        model: The generator's model, to have KV states kept with documents; None keeps none. The seven arguments that
            follow are the generator's as well.
        store: See `BlockRAGChatGenerator`.
        device: See `BlockRAGChatGenerator`.
        dtype: See `BlockRAGChatGenerator`.
        attention: See `BlockRAGChatGenerator`.
        precision: See `BlockRAGChatGenerator`.
        block_fine_tuned: See `BlockRAGChatGenerator`.
        namespace: See `BlockRAGChatGenerator`.
        prompt_form: How prompts will show the documents; see `BlockKVWriter`.
        prebuild: Compute KV states when documents are written, rather than at the first question about them.

    Raises:
        ValueError: `embedding_dim` is less than 1, or there is no such prompt form.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        embedding_dim: int = 768,
        kind: Literal["flat", "hnsw", "ivf"] = "flat",
        model: str | None = None,
        store: str = DEFAULT_STORE,
        device: str = "auto",
        dtype: str = "auto",
        attention: Attention = "block",
        precision: Precision | None = None,
        block_fine_tuned: bool | None = None,
        namespace: str = "",
        prompt_form: DocumentForm = "rag",
        prebuild: bool = True,
    ) -> None:
        if embedding_dim < 1:
            raise ValueError(f"embedding_dim={embedding_dim} is less than 1; pass the length of the embeddings")
        self.path = path
        self.embedding_dim = embedding_dim
        self.kind = kind
        self.model = model
        self.prompt_form = checked_form(prompt_form)
        self.prebuild = prebuild
        self._model = ConfiguredModel(
            model=model or "",
            store=store,
            device=device,
            dtype=dtype,
            attention=attention,
            precision=precision,
            block_fine_tuned=block_fine_tuned,
            namespace=namespace,
        )
        self._opened: PassageStore | None = None
        self._opening = threading.Lock()
        # What a policy decides must still be true when it is carried out.
        self._writing = threading.RLock()

    def to_dict(self) -> dict[str, Any]:
        """The store as plain values, for YAML. A store in memory comes back empty."""
        return default_to_dict(
            self,
            **{
                **self._model.parameters(),
                "path": None if self.path is None else str(self.path),
                "embedding_dim": self.embedding_dim,
                "kind": self.kind,
                "model": self.model,
                "prompt_form": self.prompt_form,
                "prebuild": self.prebuild,
            },
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> BlockRAGDocumentStore:
        """The store from `to_dict`'s values."""
        return default_from_dict(cls, data)

    def close(self) -> None:
        """Save, and release the files; the next call opens them again. A store in memory stays as it is."""
        with self._opening, _haystack_errors():
            if self._opened is not None and self.path is not None:
                self._opened.close()
                self._opened = None

    # -- documents ----------------------------------------------------------------------------------------------------

    def count_documents(self) -> int:
        """How many documents there are."""
        with _haystack_errors():
            return len(self._passages)

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """The documents that match, with their embeddings; all of them without filters.

        Every document is looked at.

        Raises:
            haystack.errors.FilterError: The filters are malformed.
        """
        _check_filters(filters)
        with _haystack_errors():
            passages = [passage for passage in self._passages.passages() if _matches(filters, passage)]
            return self._documents(passages)

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Write documents, all or none.

        Args:
            documents: The documents.
            policy: What to do about an id that is there already: FAIL (also meant by NONE), SKIP or OVERWRITE.

        Returns:
            How many were written.

        Raises:
            haystack.document_stores.errors.DuplicateDocumentError: Under FAIL, an id is there already or occurs twice.
            ValueError: It is not a list of documents, an embedding has another length than `embedding_dim` or is not
                finite, or meta holds what JSON cannot.
        """
        if not isinstance(documents, list) or any(not isinstance(document, Document) for document in documents):
            raise ValueError(f"documents must be a list of Document, got {documents!r:.60}")
        with self._writing, _haystack_errors():
            last = {document.id: document for document in documents}
            known = {passage.id for passage in self._passages.get(list(last))}
            if policy in (DuplicatePolicy.NONE, DuplicatePolicy.FAIL) and (known or len(last) < len(documents)):
                ids = [document.id for document in documents]
                twice = next(id for id in ids if id in known or ids.count(id) > 1)
                raise DuplicateDocumentError(
                    f"document {twice!r} exists already; write it with DuplicatePolicy.OVERWRITE or SKIP"
                )
            if policy == DuplicatePolicy.SKIP:
                new: dict[str, Document] = {}
                for document in documents:
                    if document.id not in known:
                        new.setdefault(document.id, document)
                self._write(new.values())
                return len(new)
            self._write(last.values())
            return len(documents)

    def delete_documents(self, document_ids: list[str]) -> None:
        """Delete documents, and KV states that no other document shares; unknown ids are ignored."""
        with _haystack_errors():
            self._passages.delete(document_ids)

    def delete_all_documents(self) -> None:
        """Delete everything."""
        with _haystack_errors():
            self._passages.clear()

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """Delete the documents that match; returns how many.

        Raises:
            haystack.errors.FilterError: The filters are malformed.
        """
        with self._writing:
            matching = [document.id for document in self.filter_documents(filters)]
            self.delete_documents(matching)
        return len(matching)

    def update_by_filter(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """Merge `meta` into the meta of the documents that match; returns how many.

        Raises:
            haystack.errors.FilterError: The filters are malformed.
            ValueError: `meta` holds what JSON cannot.
        """
        with self._writing, _haystack_errors():
            matching = self.filter_documents(filters)
            self._write(replace(document, meta={**document.meta, **meta}) for document in matching)
        return len(matching)

    def embedding_retrieval(
        self,
        query_embedding: list[float],
        *,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        return_embedding: bool = False,
    ) -> list[Document]:
        """The documents whose embeddings have the greatest inner product with a question's, best first.

        Args:
            query_embedding: The question's embedding.
            filters: Metadata filters.
            top_k: Most documents to return.
            return_embedding: Whether they come with their embeddings.

        Returns:
            Documents with their scores.

        Raises:
            haystack.errors.FilterError: The filters are malformed.
            ValueError: `top_k` is less than 1, or the embedding has another length than `embedding_dim`.
        """
        _check_filters(filters)
        if top_k < 1:
            raise ValueError(f"top_k={top_k} is less than 1; pass how many documents to return")
        if len(query_embedding) != self.embedding_dim:
            raise ValueError(
                f"the query embedding has {len(query_embedding)} numbers, this document store holds "
                f"{self.embedding_dim}; embed questions with the embedder of the documents"
            )
        with _haystack_errors():
            hits = self._passages.search(
                query_embedding,
                top_k,
                keep=lambda passage: is_embedded(passage) and _matches(filters, passage),
            )
            found = self._documents([hit.passage for hit in hits], embeddings=return_embedding)
        return [replace(document, score=hit.score) for document, hit in zip(found, hits, strict=True)]

    # -- metadata -----------------------------------------------------------------------------------------------------

    def count_documents_by_filter(self, filters: dict[str, Any]) -> int:
        """How many documents match."""
        return len(self.filter_documents(filters))

    def count_unique_metadata_by_filter(self, filters: dict[str, Any], metadata_fields: list[str]) -> dict[str, int]:
        """How many different values each field has among the documents that match; "meta." may be left out."""
        documents = self.filter_documents(filters)
        return {metadata.name_of(field): len(metadata.unique_values(documents, field)) for field in metadata_fields}

    def get_metadata_fields_info(self) -> dict[str, dict[str, str]]:
        """The type of each field: "keyword", "int", "float" or "boolean"."""
        return metadata.fields_info(self.filter_documents())

    def get_metadata_field_min_max(self, metadata_field: str) -> dict[str, Any]:
        """The least and the greatest value of a field, None where there is none or they do not compare."""
        return metadata.min_max(self.filter_documents(), metadata_field)

    def get_metadata_field_unique_values(
        self,
        metadata_field: str,
        search_term: str | None = None,
        from_: int = 0,
        size: int = 10,
        filters: dict[str, Any] | None = None,
    ) -> tuple[list[Any], int]:
        """A page of the different values of a field, in the order of their text, and how many there are.

        Args:
            metadata_field: The field; "meta." may be left out.
            search_term: Only values whose text holds this, in any case.
            from_: Place of the first.
            size: Most values on the page.
            filters: Only values of documents that match.
        """
        values = metadata.unique_values(self.filter_documents(filters), metadata_field)
        term = (search_term or "").lower()
        found = [value for value in values if term in str(value).lower()]
        return found[from_ : from_ + size], len(found)

    # -- the same, without blocking the event loop --------------------------------------------------------------------

    async def count_documents_async(self) -> int:
        """See `count_documents`."""
        return await asyncio.to_thread(self.count_documents)

    async def filter_documents_async(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """See `filter_documents`."""
        return await asyncio.to_thread(self.filter_documents, filters)

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        """See `write_documents`."""
        return await asyncio.to_thread(self.write_documents, documents, policy)

    async def delete_documents_async(self, document_ids: list[str]) -> None:
        """See `delete_documents`."""
        await asyncio.to_thread(self.delete_documents, document_ids)

    async def delete_all_documents_async(self) -> None:
        """See `delete_all_documents`."""
        await asyncio.to_thread(self.delete_all_documents)

    async def delete_by_filter_async(self, filters: dict[str, Any]) -> int:
        """See `delete_by_filter`."""
        return await asyncio.to_thread(self.delete_by_filter, filters)

    async def update_by_filter_async(self, filters: dict[str, Any], meta: dict[str, Any]) -> int:
        """See `update_by_filter`."""
        return await asyncio.to_thread(self.update_by_filter, filters, meta)

    async def embedding_retrieval_async(
        self,
        query_embedding: list[float],
        *,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        return_embedding: bool = False,
    ) -> list[Document]:
        """See `embedding_retrieval`."""
        return await asyncio.to_thread(
            self.embedding_retrieval, query_embedding, filters=filters, top_k=top_k, return_embedding=return_embedding
        )

    async def count_documents_by_filter_async(self, filters: dict[str, Any]) -> int:
        """See `count_documents_by_filter`."""
        return await asyncio.to_thread(self.count_documents_by_filter, filters)

    async def count_unique_metadata_by_filter_async(
        self, filters: dict[str, Any], metadata_fields: list[str]
    ) -> dict[str, int]:
        """See `count_unique_metadata_by_filter`."""
        return await asyncio.to_thread(self.count_unique_metadata_by_filter, filters, metadata_fields)

    async def get_metadata_fields_info_async(self) -> dict[str, dict[str, str]]:
        """See `get_metadata_fields_info`."""
        return await asyncio.to_thread(self.get_metadata_fields_info)

    async def get_metadata_field_min_max_async(self, metadata_field: str) -> dict[str, Any]:
        """See `get_metadata_field_min_max`."""
        return await asyncio.to_thread(self.get_metadata_field_min_max, metadata_field)

    async def get_metadata_field_unique_values_async(
        self,
        metadata_field: str,
        search_term: str | None = None,
        from_: int = 0,
        size: int = 10,
        filters: dict[str, Any] | None = None,
    ) -> tuple[list[Any], int]:
        """See `get_metadata_field_unique_values`."""
        return await asyncio.to_thread(
            self.get_metadata_field_unique_values, metadata_field, search_term, from_, size, filters
        )

    # -- passages -----------------------------------------------------------------------------------------------------

    @property
    def _passages(self) -> PassageStore:
        """Where they are, opened when it is first needed."""
        with self._opening:
            if self._opened is None:
                self._opened = self._open()
            return self._opened

    def _open(self) -> PassageStore:
        from blockrag.ingest import PassageStore

        model = None if self.model is None else self._model.load()
        passages = PassageStore(
            self.path,
            name="haystack",
            kind=self.kind,
            model=model,
            blocks_of=None if model is None else lambda some: self._blocks(model, some),
            prebuild=model is not None and self.prebuild,
        )
        dimension = passages.stats().dimension
        if dimension not in (None, self.embedding_dim):
            passages.close()
            raise ValueError(
                f"{str(self.path)!r} holds embeddings of {dimension} numbers, not of {self.embedding_dim}; pass "
                f"embedding_dim={dimension}, or another path"
            )
        return passages

    def _blocks(self, model: BlockModel, passages: Sequence[Passage]) -> list[Block]:
        """The blocks of passages; without tokens for documents that have no text."""
        from blockrag.prompt import Block

        blocks = iter(
            document_blocks(model, [passage for passage in passages if has_content(passage)], self.prompt_form)
        )
        nothing = Block((), "", local=True, kind="passage")
        return [next(blocks) if has_content(passage) else nothing for passage in passages]

    def _write(self, documents: Iterable[Document]) -> None:
        pairs = [to_passage(document, self.embedding_dim) for document in documents]
        if pairs:
            self._passages.add([passage for passage, _ in pairs], [vector for _, vector in pairs])

    def _documents(self, passages: Sequence[Passage], *, embeddings: bool = True) -> list[Document]:
        vectors = self._passages.vectors_of([passage.id for passage in passages]) if embeddings else {}
        return [from_passage(passage, vectors.get(passage.id)) for passage in passages]


def _check_filters(filters: dict[str, Any] | None) -> None:
    if filters and "operator" not in filters:
        raise FilterError(
            f"filters {filters!r:.80} have no operator; see https://docs.haystack.deepset.ai/docs/metadata-filtering"
        )


def _matches(filters: dict[str, Any] | None, passage: Passage) -> bool:
    if not filters:
        return True
    document = from_passage(passage, None)
    if is_embedded(passage):
        # Without its numbers, which are not here: filters may ask whether there is an embedding, not for one.
        document = replace(document, embedding=[])
    return document_matches_filter(filters, document)


@contextmanager
def _haystack_errors() -> Iterator[None]:
    """Blockrag's errors about stored data as Haystack's; those about what was passed are ValueErrors already."""
    try:
        yield
    except (PassageIndexError, StoreError) as error:
        raise DocumentStoreError(str(error)) from error
