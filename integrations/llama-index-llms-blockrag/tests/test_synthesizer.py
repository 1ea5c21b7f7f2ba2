"""The block synthesizer: the stock text, whole passages, and the budget of the model's own tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
from conftest import QUESTION, Ear, Shelf, nodes_of
from llama_index.core import PromptTemplate, Settings
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.instrumentation.events.synthesis import SynthesizeEndEvent, SynthesizeStartEvent
from llama_index.core.llms import ChatMessage, MockLLM
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.response_synthesizers import CompactAndRefine
from llama_index.core.schema import NodeWithScore
from llama_index.llms.blockrag import (
    BlockCacheEvent,
    BlockContextChatEngine,
    BlockRAGLLM,
    BlockSynthesizer,
    PassageBlock,
)
from llama_index.llms.blockrag.messages import core_messages

MakeLLM = Callable[..., BlockRAGLLM]

WINDOW = 1400
"""Smaller than what the demo model was block-fine-tuned on, so that a prompt that fills it is nothing to warn of."""


def shown(event: LLMChatStartEvent) -> list[tuple[str, str]]:
    """Role and text of each message, as our model reads them."""
    return [
        (message.role, "".join(part if isinstance(part, str) else part.text for part in message.parts))
        for message in core_messages(event.messages)
    ]


def long_nodes(scores: list[float | None]) -> list[NodeWithScore]:
    text = " ".join(f"Item {number} runs from the lake to the sea." for number in range(26))
    hits = nodes_of({str(number): "X" for number in range(len(scores))})
    for hit, score in zip(hits, scores, strict=True):
        hit.score = score
        hit.node.text = f"{hit.node_id} begins. {text}"
    return hits


@pytest.mark.parametrize(
    "template",
    [None, PromptTemplate("{context_str}\n\n{query_str}"), PromptTemplate("Q: {query_str} C: {context_str} {note}")],
)
def test_the_text_is_that_of_the_stock_synthesizer(llm: BlockRAGLLM, ear: Ear, template: PromptTemplate | None) -> None:
    hits = nodes_of()
    hits[1].node.text = f"  {hits[1].node.text}\n\n"
    for synthesizer in (
        CompactAndRefine(llm, text_qa_template=template),
        BlockSynthesizer(llm, text_qa_template=template),
    ):
        synthesizer.synthesize(QUESTION, hits, **({"note": "N"} if template and "note" in template.template else {}))
    stock, ours = map(shown, ear.of(LLMChatStartEvent))
    assert ours == stock
    assert [(e.passages_found, e.passages_missed) for e in ear.of(BlockCacheEvent)] == [(3, 0), (3, 0)]
    assert len(ear.of(SynthesizeStartEvent)) == len(ear.of(SynthesizeEndEvent)) == 2


def test_the_chat_engine_says_what_the_stock_one_says(llm: BlockRAGLLM, shelf: Shelf, ear: Ear) -> None:
    history = [ChatMessage(role="user", content="Hello {you}"), ChatMessage(role="assistant", content="Hi")]
    for kind in (ContextChatEngine, BlockContextChatEngine):
        engine = kind.from_defaults(shelf, llm=llm, system_prompt="Be brief.", chat_history=list(history))
        assert engine.chat(QUESTION).source_nodes == shelf._hits
    stock, ours = map(shown, ear.of(LLMChatStartEvent))
    assert ours == stock
    assert [role for role, _ in ours] == ["system", "user", "assistant", "user"]


def test_text_right_against_the_passages_gets_a_line_break(llm: BlockRAGLLM) -> None:
    synthesizer = BlockSynthesizer(llm, text_qa_template=PromptTemplate("({context_str}){query_str}"))
    (message,) = core_messages(synthesizer.messages("q", [PassageBlock(text="p"), PassageBlock(text="r")]))
    assert "".join(part if isinstance(part, str) else part.text for part in message.parts) == "(\np\n\nr\n)q"


def test_whole_passages_are_left_out_from_the_lowest_score(
    make_llm: MakeLLM, ear: Ear, caplog: pytest.LogCaptureFixture
) -> None:
    llm = make_llm(context_window=WINDOW)
    synthesizer = BlockSynthesizer(llm)
    hits = long_nodes([0.5, 0.9, None, 0.1, 0.9])
    with caplog.at_level(logging.WARNING):
        response = synthesizer.synthesize(QUESTION, hits)
    (start,) = ear.of(LLMChatStartEvent)
    passages = [block for block in start.messages[-1].blocks if isinstance(block, PassageBlock)]
    # Without a score first, then the lowest; the order of the others stays, and each is whole.
    kept = [block.node_id for block in passages]
    assert kept == [name for name in ("0", "1", "4") if name in kept]
    assert 0 < len(kept) < 5
    assert [block.text for block in passages] == [PassageBlock.from_node(hits[int(name)]).text for name in kept]
    assert synthesizer.passages_dropped == 5 - len(kept) == len(caplog.records)
    assert "left out passage '2'" in caplog.text
    # The sources are what was retrieved, as with every synthesizer.
    assert len(response.source_nodes) == 5
    window, room = llm.metadata.context_window, llm.metadata.num_output
    (cache,) = ear.of(BlockCacheEvent)
    used = cache.tokens_computed + cache.tokens_reused
    assert used <= window - room
    # One more would not have fitted.
    dropped = max((hit for hit in hits if hit.node_id not in kept), key=lambda hit: hit.score or 0)
    assert used + len(llm.tokenizer.encode(PassageBlock.from_node(dropped).text)) > window - room


def test_many_passages_are_not_counted_over_and_over(make_llm: MakeLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = make_llm(context_window=WINDOW)
    counted: list[int] = []
    count = BlockRAGLLM.count_prompt_tokens

    def counting(self: BlockRAGLLM, messages: list[ChatMessage], **kwargs: Any) -> int:
        counted.append(sum(isinstance(block, PassageBlock) for message in messages for block in message.blocks))
        return count(self, messages, **kwargs)

    monkeypatch.setattr(BlockRAGLLM, "count_prompt_tokens", counting)
    synthesizer = BlockSynthesizer(llm)
    synthesizer.synthesize(QUESTION, long_nodes([1 / (place + 1) for place in range(40)]))
    assert 0 < synthesizer.passages_dropped < 40
    # All of them, a bisection, and each that is left out by itself.
    assert len([passages for passages in counted if passages != 1]) <= 7


async def test_a_question_that_never_fits_drops_nothing(llm: BlockRAGLLM) -> None:
    synthesizer = BlockSynthesizer(llm)
    with pytest.raises(ValueError, match="2048"):
        synthesizer.get_response("river " * 3000, [])
    assert synthesizer.passages_dropped == 0


async def test_a_passage_that_never_fits_is_an_error(make_llm: MakeLLM) -> None:
    llm = make_llm(context_window=600)
    synthesizer = BlockSynthesizer(llm)
    with pytest.raises(ValueError, match=r"passage '0' makes a prompt of \d+ tokens by itself"):
        synthesizer.synthesize(QUESTION, long_nodes([0.5]))
    with pytest.raises(ValueError, match="shorter passages"):
        await synthesizer.asynthesize(QUESTION, long_nodes([0.5, 0.1]))
    assert synthesizer.passages_dropped == 0


async def test_it_answers_in_the_rag_form_also_without_tracking(make_llm: MakeLLM, shelf: Shelf) -> None:
    llm = make_llm(prompt_form="rag", track_passages=False)
    engine = RetrieverQueryEngine(shelf, response_synthesizer=BlockSynthesizer(llm))
    assert str(engine.query(QUESTION)) == "Thimphu"
    assert str(await engine.aquery("What is the capital of Kenya?")) == "Nairobi"


def test_text_chunks_alone_will_do(make_llm: MakeLLM) -> None:
    synthesizer = BlockSynthesizer(make_llm(prompt_form="rag"))
    assert synthesizer.get_response(QUESTION, ["The capital of Bhutan is Thimphu.", "  "]) == "Thimphu"


def test_no_nodes(llm: BlockRAGLLM) -> None:
    assert str(BlockSynthesizer(llm).synthesize(QUESTION, [])) == "Empty Response"


def test_prompts_can_be_read_and_replaced(llm: BlockRAGLLM) -> None:
    synthesizer = BlockSynthesizer(llm)
    assert list(synthesizer.get_prompts()) == ["text_qa_template"]
    synthesizer.update_prompts({"text_qa_template": PromptTemplate("{context_str} Now: {query_str}")})
    assert synthesizer.messages("q", [])[0].blocks[-1].text.endswith("Now: q")


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda llm: BlockSynthesizer(MockLLM()), "got MockLLM; pass llm=BlockRAGLLM"),
        (lambda llm: BlockSynthesizer(), "got MockLLM"),
        (
            lambda llm: BlockSynthesizer(llm, text_qa_template=PromptTemplate("{query_str}")).synthesize(
                QUESTION, nodes_of()
            ),
            "does not show {context_str}",
        ),
    ],
)
def test_what_cannot_work_is_refused(
    make: Callable[[BlockRAGLLM], Any], complaint: str, llm: BlockRAGLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Settings, "_llm", MockLLM())
    with pytest.raises(ValueError, match=complaint):
        make(llm)
