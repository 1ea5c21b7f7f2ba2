"""`BlockRAG`: the whole path, from documents to an answer with its sources.

It only connects what the other modules do: ingest fills the index and the block store; a question is searched for in
the index, its passages become blocks, the model composes them and answers. Everything can be replaced through the
constructor; `from_pretrained` puts the usual parts together in one directory.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal

from blockrag.errors import InputError
from blockrag.index import PassageIndex
from blockrag.ingest import delete, ingest
from blockrag.model.answer import Chunk, FinishReason, Generation
from blockrag.model.block_model import Attention, BlockModel
from blockrag.model.running import OnMiss, RunningPrompt
from blockrag.model.sampling import GenerationOptions
from blockrag.model.stream import ResultStream
from blockrag.stores import DiskStore, MemoryStore

if TYPE_CHECKING:
    import torch

    from blockrag.codec import Precision
    from blockrag.encoders import Encoder
    from blockrag.index import Change, IndexStats
    from blockrag.ingest import IngestReport, Progress
    from blockrag.model.usage import Usage
    from blockrag.passage import Hit
    from blockrag.prompt import Block
    from blockrag.stores.protocol import BlockStore, StoreStats

__all__ = ["Answer", "AnswerTimings", "BlockRAG", "Chat", "PassageOrder"]

PassageOrder = Literal["best-first", "best-last"]


@dataclass(frozen=True, slots=True)
class AnswerTimings:
    """Wall-clock seconds of one question, split by step.

    `retrieve_s` is the search, `load_s` reading and verifying stored blocks, `compose_s` placing and rotating them,
    `block_prefill_s` computing missing ones, `query_prefill_s` the forward of the question. `ttft_s`, from the question
    to the first token of the answer, contains all of these; `decode_s` is the rest of the answer.
    """

    retrieve_s: float
    load_s: float
    compose_s: float
    block_prefill_s: float
    query_prefill_s: float
    ttft_s: float
    decode_s: float


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer and what it rests on.

    Args:
        text: The answer, stripped of surrounding white space.
        hits: The passages it was given, best first.
        timings: Seconds by step.
        usage: Blocks and tokens reused and computed, counted.
        finish_reason: "stop" or "length".
    """

    text: str
    hits: tuple[Hit, ...]
    timings: AnswerTimings
    usage: Usage
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class RAGStats:
    """Contents of the index and the block store."""

    index: IndexStats
    store: StoreStats


class BlockRAG:
    """Retrieval-augmented generation over stored blocks.

    Args:
        model: The language model.
        index: The passages.
        store: The blocks; by default the model's own store.
        top_k: Passages per question.
        order: Whether the best passage opens the prompt or stands next to the question.
    """

    def __init__(
        self,
        model: BlockModel,
        index: PassageIndex,
        *,
        store: BlockStore | None = None,
        top_k: int = 5,
        order: PassageOrder = "best-first",
    ) -> None:
        if top_k < 0:
            raise InputError(f"top_k={top_k} is negative; pass the number of passages per question, 0 for none")
        if order not in ("best-first", "best-last"):
            raise InputError(f'order={order!r} is neither "best-first" nor "best-last"')
        self.model = model
        self.index = index
        self.store: BlockStore = model.store if store is None else store
        self.top_k = top_k
        self.order: PassageOrder = order

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "demo",
        *,
        encoder: str | Encoder = "lexical",
        path: str | Path | None = None,
        device: str | torch.device = "auto",
        dtype: str | torch.dtype = "auto",
        attention: Attention = "block",
        precision: Precision | None = None,
        namespace: str = "",
        block_fine_tuned: bool | None = None,
        on_miss: OnMiss = "compute",
        max_bytes: int | None = None,
        top_k: int = 5,
        order: PassageOrder = "best-first",
    ) -> BlockRAG:
        """Put the usual parts together.

        Args:
            model: A directory with a saved model, a hub id, or "demo" for the small model that ships with blockrag.
            encoder: An encoder, or what `open_encoder` takes: "lexical", "contriever", "st:<id or path>".
            path: Directory for the index and the blocks; None keeps both in memory.
            device: See `BlockModel.from_pretrained`.
            dtype: See `BlockModel.from_pretrained`.
            attention: See `BlockModel`.
            precision: See `BlockModel`.
            namespace: See `BlockModel`.
            block_fine_tuned: See `BlockModel.from_pretrained`.
            on_miss: See `BlockModel`.
            max_bytes: Byte budget of the block store; the least recently used blocks go first. None for no limit.
            top_k: Passages per question.
            order: Place of the best passage.

        Raises:
            InputError: The model or encoder does not exist.
            UnsupportedModelError: The model cannot be composed exactly.
            PassageIndexError: The directory holds an index of another encoder.
        """
        from blockrag.encoders import open_encoder

        store: BlockStore = (
            MemoryStore(max_bytes=max_bytes) if path is None else DiskStore(Path(path) / "kv", max_bytes=max_bytes)
        )
        language_model = BlockModel.from_pretrained(
            model,
            device=device,
            dtype=dtype,
            attention=attention,
            store=store,
            precision=precision,
            namespace=namespace,
            block_fine_tuned=block_fine_tuned,
            on_miss=on_miss,
        )
        chosen = open_encoder(encoder) if isinstance(encoder, str) else encoder
        index = PassageIndex(chosen, None if path is None else Path(path) / "index")
        return cls(language_model, index, store=store, top_k=top_k, order=order)

    def ingest(
        self,
        sources: Sequence[object],
        *,
        max_passage_tokens: int = 256,
        prune: bool = False,
        progress: Progress | None = None,
    ) -> IngestReport:
        """Index documents and store their passages' KV states; repeating it does no model work.

        Args:
            sources: Files, folders, `Passage` or `Document` objects, or llama-index documents.
            max_passage_tokens: Longest passage, in the language model's tokens.
            prune: Remove documents that are no longer among the sources.
            progress: Where to report progress.
        """
        model = self.model if self.model.profile is not None else None
        if model is not None and (prefix := model.template.prefix_block(model.tokenizer)) is not None:
            model.materialize([prefix], self.store)
        try:
            return ingest(
                sources,
                index=self.index,
                model=model,
                store=self.store,
                max_passage_tokens=max_passage_tokens,
                prune=prune,
                progress=progress,
                tokenizer=self.model.tokenizer,
            )
        finally:
            # Documents that changed or are gone must not stay in memory either.
            self.model.forget_kept()

    def delete(self, document_id: str) -> Change:
        """Remove a document, its passages, and the blocks no other passage uses; finished prompts are forgotten."""
        try:
            return delete(document_id, index=self.index, store=self.store)
        finally:
            self.model.forget_kept()

    def search(self, question: str, k: int | None = None, *, where: Mapping[str, object] | None = None) -> list[Hit]:
        """The passages that match a question best, best first; `k=0` finds none."""
        count = self.top_k if k is None else k
        return self.index.search(question, count, where=where) if count else []

    def query(
        self,
        question: str,
        options: GenerationOptions | None = None,
        *,
        k: int | None = None,
        where: Mapping[str, object] | None = None,
        attention: Attention | None = None,
        on_miss: OnMiss | None = None,
    ) -> Answer:
        """Answer a question from the indexed passages.

        Args:
            question: The question.
            options: How to generate.
            k: Passages to use; by default `top_k`.
            where: Metadata the passages must have.
            attention: "block" or "full"; by default the model's.
            on_miss: What to do where passages are not stored; by default the model's.

        Raises:
            PromptError: The question is empty.
            PromptTooLongError: The passages and the answer exceed what the model can place.
            MissingBlockError: With on_miss="error", a passage is not stored, or its stored copy is damaged.
            NotFiniteError: The model computed NaN or infinity.
        """
        return self.stream(question, options, k=k, where=where, attention=attention, on_miss=on_miss).finish()

    def stream(
        self,
        question: str,
        options: GenerationOptions | None = None,
        *,
        k: int | None = None,
        where: Mapping[str, object] | None = None,
        attention: Attention | None = None,
        on_miss: OnMiss | None = None,
    ) -> ResultStream[str, Answer]:
        """Answer piece by piece; see `query`. Nothing runs before the first piece is asked for."""
        return ResultStream(self._answer(question, options or GenerationOptions(), k, where, attention, on_miss))

    async def aquery(
        self,
        question: str,
        options: GenerationOptions | None = None,
        *,
        k: int | None = None,
        where: Mapping[str, object] | None = None,
        attention: Attention | None = None,
        on_miss: OnMiss | None = None,
    ) -> Answer:
        """`query`, on the model's worker thread."""
        stream = self.stream(question, options, k=k, where=where, attention=attention, on_miss=on_miss)
        async for _ in self.model.on_worker(stream):
            pass
        return stream.result

    async def astream(
        self,
        question: str,
        options: GenerationOptions | None = None,
        *,
        k: int | None = None,
        where: Mapping[str, object] | None = None,
        attention: Attention | None = None,
        on_miss: OnMiss | None = None,
    ) -> AsyncIterator[str]:
        """`stream`, on the model's worker thread; leaving the loop early frees the worker and the cache."""
        stream = self.stream(question, options, k=k, where=where, attention=attention, on_miss=on_miss)
        async for piece in self.model.on_worker(stream):
            yield piece

    def chat(self, *, attention: Attention | None = None, on_miss: OnMiss | None = None) -> Chat:
        """Start a conversation; close it, or use it in a `with` statement."""
        return Chat(self, attention, on_miss)

    def stats(self) -> RAGStats:
        """Contents of the index and the block store."""
        return RAGStats(self.index.stats(), self.store.stats())

    def close(self) -> None:
        """Write the index and release files."""
        self.index.close()
        self.store.close()

    def __enter__(self) -> BlockRAG:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(
        self,
        question: str,
        options: GenerationOptions,
        k: int | None,
        where: Mapping[str, object] | None,
        attention: Attention | None,
        on_miss: OnMiss | None,
    ) -> Generator[str, None, Answer]:
        started = time.perf_counter()
        hits = self.search(question, k, where=where)
        retrieve_s = time.perf_counter() - started
        prompt = self.model.template.segment(
            self.model.tokenizer, passages=[hit.passage for hit in self.in_prompt_order(hits)], question=question
        )
        stream = self.model.stream(prompt, options, attention=attention, store=self.store, on_miss=on_miss)
        try:
            yield from _texts(stream)
        finally:
            stream.close()
        return _answered(stream.result, hits, started, retrieve_s)

    def in_prompt_order(self, hits: Sequence[Hit]) -> list[Hit]:
        """Hits, best first, in the order their passages take in the prompt."""
        return list(hits) if self.order == "best-first" else list(reversed(hits))


class Chat:
    """A conversation over the indexed passages.

    Passages and turns stay in the model's cache: the next question brings only the passages that are not there yet, as
    stored blocks, and computes only itself.

    Args:
        rag: Where passages and the model come from.
        attention: "block" or "full".
        on_miss: What to do where passages are not stored.
    """

    def __init__(self, rag: BlockRAG, attention: Attention | None, on_miss: OnMiss | None) -> None:
        self._rag = rag
        self._attention: Attention = rag.model.attention if attention is None else attention
        self._running: RunningPrompt | None = rag.model.start(attention=attention, store=rag.store, on_miss=on_miss)
        self._shown: set[str] = set()

    def query(self, question: str, options: GenerationOptions | None = None, *, k: int | None = None) -> Answer:
        """Ask the next question.

        Raises:
            PromptTooLongError: The conversation exceeds what the model can place; start a new one.
            InputError: The conversation was closed.
        """
        return self.stream(question, options, k=k).finish()

    def stream(
        self, question: str, options: GenerationOptions | None = None, *, k: int | None = None
    ) -> ResultStream[str, Answer]:
        """Ask the next question; the answer comes piece by piece and must be read to its end before the next."""
        if self._running is None:
            raise InputError("this conversation is closed; start another with BlockRAG.chat()")
        return ResultStream(self._turn(self._running, question, options or GenerationOptions(), k))

    def close(self) -> None:
        """Free the conversation's cache. Safe to call twice."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def __enter__(self) -> Chat:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _turn(
        self, running: RunningPrompt, question: str, options: GenerationOptions, k: int | None
    ) -> Generator[str, None, Answer]:
        started = time.perf_counter()
        hits = self._rag.search(question, k)
        retrieve_s = time.perf_counter() - started
        new = [hit.passage for hit in self._rag.in_prompt_order(hits) if hit.passage.id not in self._shown]
        template, tokenizer = self._rag.model.template, self._rag.model.tokenizer
        if running.token_ids:
            blocks: Sequence[Block] = template.follow_up(tokenizer, passages=new, question=question)
        else:
            blocks = template.segment(tokenizer, passages=new, question=question).blocks
        if self._attention == "full":
            blocks = [block.as_global() for block in blocks]
        running.extend(blocks, room=options.max_new_tokens)
        self._shown.update(passage.id for passage in new)
        steps = ResultStream(running.answer(options, template.stop))
        yield from _texts(steps)
        return _answered(steps.result, hits, started, retrieve_s)


def _texts(chunks: Iterable[Chunk]) -> Iterator[str]:
    return (chunk.text for chunk in chunks if chunk.text)


def _answered(generation: Generation, hits: Sequence[Hit], started: float, retrieve_s: float) -> Answer:
    spent = generation.timings
    total_s = time.perf_counter() - started
    return Answer(
        text=generation.text.strip(),
        hits=tuple(hits),
        timings=AnswerTimings(
            retrieve_s=retrieve_s,
            load_s=spent.load_s,
            compose_s=spent.compose_s,
            block_prefill_s=spent.block_prefill_s,
            query_prefill_s=spent.query_prefill_s,
            ttft_s=total_s - spent.decode_s,
            decode_s=spent.decode_s,
        ),
        usage=generation.usage,
        finish_reason=generation.finish_reason,
    )
