"""`BlockSynthesizer`: a response synthesizer that gives every retrieved passage to the model as a block of its own.

The text of its prompt is that of the stock compact synthesizer: the passages, joined by a blank line, in the
`text_qa_template`. What differs is what happens when they do not fit: whole passages are left out, those with the
lowest score first, where the stock one splits the text and asks again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from bisect import bisect_left
from collections.abc import AsyncGenerator, Generator, Sequence
from typing import Any

from llama_index.core.base.llms.types import ChatMessage, TextBlock
from llama_index.core.base.response.schema import RESPONSE_TYPE
from llama_index.core.callbacks import CallbackManager
from llama_index.core.llms import LLM
from llama_index.core.prompts import BasePromptTemplate
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.prompts.mixin import PromptDictType
from llama_index.core.response_synthesizers import BaseSynthesizer
from llama_index.core.schema import NodeWithScore, QueryType
from llama_index.core.types import RESPONSE_TEXT_TYPE
from llama_index.llms.blockrag.base import BlockRAGLLM
from llama_index.llms.blockrag.blocks import PassageBlock
from llama_index.llms.blockrag.tracking import asking

from blockrag.errors import PromptError, PromptTooLongError

__all__ = ["BlockSynthesizer"]

logger = logging.getLogger(__name__)

_SEPARATOR = "\n\n"
# What stock synthesizers say where the model says nothing.
_EMPTY_RESPONSE = "Empty Response"


class BlockSynthesizer(BaseSynthesizer):
    """Answers from passages that stay whole; one call to the model.

    Args:
        llm: A `BlockRAGLLM`; by default `Settings.llm`, which then has to be one.
        text_qa_template: Shows the passages (`context_str`) and the question (`query_str`). Text that stands right
            against `{context_str}`, without white space, gets a line break there.
        streaming: Whether answers are streamed.
        callback_manager: As for every synthesizer.

    Attributes:
        passages_dropped: Passages left out so far because the context window was too small.

    Raises:
        ValueError: The language model is another one.
    """

    def __init__(
        self,
        llm: LLM | None = None,
        *,
        text_qa_template: BasePromptTemplate | None = None,
        streaming: bool = False,
        callback_manager: CallbackManager | None = None,
    ) -> None:
        super().__init__(llm=llm, callback_manager=callback_manager, streaming=streaming)
        if not isinstance(self._llm, BlockRAGLLM):
            raise ValueError(
                f"BlockSynthesizer counts with the tokenizer of a BlockRAGLLM and got {type(self._llm).__name__}; pass "
                "llm=BlockRAGLLM(...), or use a stock response mode"
            )
        self._text_qa_template = text_qa_template or DEFAULT_TEXT_QA_PROMPT_SEL
        self.passages_dropped = 0

    @property
    def llm(self) -> BlockRAGLLM:
        """The language model."""
        if not isinstance(self._llm, BlockRAGLLM):
            raise AssertionError("checked by the constructor")
        return self._llm

    def synthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from retrieved nodes; see `BaseSynthesizer.synthesize`."""
        return super().synthesize(query, nodes, additional_source_nodes, hits=nodes, **response_kwargs)

    async def asynthesize(
        self,
        query: QueryType,
        nodes: list[NodeWithScore],
        additional_source_nodes: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TYPE:
        """Answer from retrieved nodes; see `BaseSynthesizer.asynthesize`."""
        return await super().asynthesize(query, nodes, additional_source_nodes, hits=nodes, **response_kwargs)

    def get_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        *,
        hits: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """Answer from passages.

        Args:
            query_str: The question.
            text_chunks: The passages as they are to be shown; used where `hits` are not given.
            hits: The retrieved nodes.
            **response_kwargs: Further variables of the template.

        Raises:
            ValueError: A passage alone exceeds the context window.
        """
        with asking(query_str):
            messages = self._fitting(query_str, _passages(text_chunks, hits), response_kwargs)
            if self._streaming:
                return _deltas(self.llm.stream_chat(messages))
            return self.llm._parse_output(self.llm.chat(messages).message.content or "") or _EMPTY_RESPONSE

    async def aget_response(
        self,
        query_str: str,
        text_chunks: Sequence[str],
        *,
        hits: Sequence[NodeWithScore] | None = None,
        **response_kwargs: Any,
    ) -> RESPONSE_TEXT_TYPE:
        """`get_response` on the model's worker thread."""
        with asking(query_str):
            # Tokenizing, and loading the model the first time, must not hold up the event loop.
            messages = await asyncio.to_thread(self._fitting, query_str, _passages(text_chunks, hits), response_kwargs)
            if self._streaming:
                return _adeltas(await self.llm.astream_chat(messages))
            response = await self.llm.achat(messages)
            return self.llm._parse_output(response.message.content or "") or _EMPTY_RESPONSE

    def messages(self, query_str: str, passages: Sequence[PassageBlock], **variables: Any) -> list[ChatMessage]:
        """The messages that show passages and a question, without regard to the context window.

        Args:
            query_str: The question.
            passages: The passages, in prompt order.
            **variables: Further variables of the template.

        Raises:
            ValueError: The template does not show `context_str`.
        """
        mark = f"passages-{secrets.token_hex(8)}"
        messages = self.llm._get_messages(self._text_qa_template, query_str=query_str, context_str=mark, **variables)
        if not any(isinstance(block, TextBlock) and mark in block.text for m in messages for block in m.blocks):
            raise PromptError(
                "the text_qa_template does not show {context_str} as it is; put it where the passages belong, and map "
                "no function to it"
            )
        return [_filled(message, mark, passages) for message in messages]

    def _fitting(
        self, query_str: str, passages: Sequence[PassageBlock], variables: dict[str, Any]
    ) -> list[ChatMessage]:
        """The messages with as many of the passages as the context window has room for."""
        metadata = self.llm.metadata
        budget = metadata.context_window - metadata.num_output

        def size(kept: Sequence[PassageBlock]) -> int:
            return self.llm.count_prompt_tokens(self.messages(query_str, kept, **variables))

        weakest_first = sorted(range(len(passages)), key=lambda place: (_score(passages[place]), -place))

        def without(count: int) -> list[PassageBlock]:
            dropped = set(weakest_first[:count])
            return [passage for place, passage in enumerate(passages) if place not in dropped]

        tokens = size(passages)
        # Fewer passages make a shorter prompt: the first count that fits is found by bisection.
        counts = range(len(passages))
        count = 0 if tokens <= budget else bisect_left(counts, True, key=lambda n: size(without(n)) <= budget)
        for passage in (passages[place] for place in weakest_first[:count]):
            alone = size([passage])
            if alone > budget:
                raise PromptTooLongError(
                    f"passage {passage.node_id!r} makes a prompt of {alone} tokens by itself, and the context window "
                    f"of {metadata.context_window} minus {metadata.num_output} for the answer has room for {budget}; "
                    "split documents into shorter passages, or set a smaller max_new_tokens"
                )
            logger.warning(
                "left out passage %r (score %s): %d passages make a prompt of %d tokens, and there is room for %d",
                passage.node_id,
                passage.score,
                len(passages),
                tokens,
                budget,
            )
        self.passages_dropped += count
        return self.messages(query_str, without(count), **variables)

    def _get_prompts(self) -> PromptDictType:
        return {"text_qa_template": self._text_qa_template}

    def _update_prompts(self, prompts: PromptDictType) -> None:
        self._text_qa_template = prompts.get("text_qa_template", self._text_qa_template)


def _passages(text_chunks: Sequence[str], hits: Sequence[NodeWithScore] | None) -> list[PassageBlock]:
    """The passages that say something."""
    if hits is None:
        found = [PassageBlock(text=text.strip()) for text in text_chunks]
    else:
        found = [PassageBlock.from_node(hit) for hit in hits]
    return [passage for passage in found if passage.text]


def _score(passage: PassageBlock) -> float:
    return float("-inf") if passage.score is None else passage.score


def _filled(message: ChatMessage, mark: str, passages: Sequence[PassageBlock]) -> ChatMessage:
    """The message with the passages where the mark stands."""
    shown = [block for passage in passages for block in (TextBlock(text=_SEPARATOR), passage)][1:]
    blocks: list[Any] = []
    for block in message.blocks:
        if isinstance(block, TextBlock) and mark in block.text:
            before, *rest = block.text.split(mark)
            blocks.append(TextBlock(text=before))
            for text in rest:
                blocks += [*shown, TextBlock(text=text)]
        else:
            blocks.append(block)
    return ChatMessage(role=message.role, blocks=blocks, additional_kwargs=message.additional_kwargs)


def _deltas(responses: Generator[Any, None, None]) -> Generator[str, None, None]:
    for response in responses:
        yield response.delta or ""


async def _adeltas(responses: AsyncGenerator[Any, None]) -> AsyncGenerator[str, None]:
    async for response in responses:
        yield response.delta or ""
