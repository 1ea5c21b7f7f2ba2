"""Messages to prompts: the same prompt in every form it can be given, and what cannot be shown."""

from __future__ import annotations

import warnings

import pytest
from conftest import QUESTION, nodes_of
from llama_index.core import PromptTemplate
from llama_index.core.base.llms.types import (
    CacheControl,
    CachePoint,
    ChatMessage,
    CitableBlock,
    DocumentBlock,
    ImageBlock,
    ThinkingBlock,
    ToolCallBlock,
)
from llama_index.core.instrumentation.events.llm import LLMChatStartEvent
from llama_index.core.llms import TextBlock
from llama_index.core.prompts.default_prompt_selectors import DEFAULT_TEXT_QA_PROMPT_SEL
from llama_index.core.schema import MetadataMode, TextNode
from llama_index.core.tools import FunctionTool
from llama_index.llms.blockrag import BlockRAGLLM, PassageBlock
from llama_index.llms.blockrag.blocks import excerpt_of
from llama_index.llms.blockrag.messages import core_messages, prepare
from llama_index.llms.blockrag.tracking import Tracked
from llama_index.llms.openai.utils import to_openai_message_dicts

from blockrag import BlockModel, Passage
from blockrag.errors import PromptError
from blockrag.prompt.chat import segment_chat
from blockrag.prompt.message import Excerpt, Message

HITS = nodes_of()
SHOWN = [hit.node.get_content(metadata_mode=MetadataMode.LLM) for hit in HITS]
TRACKED = Tracked(QUESTION, tuple(excerpt_of(hit.node) for hit in HITS))
CUT = CachePoint(cache_control=CacheControl(type="ephemeral"))
TEMPLATE = PromptTemplate("Context:\n{context_str}\n---\nQuery: {query_str}\nAnswer: ")


@pytest.fixture(scope="module")
def model() -> BlockModel:
    return BlockRAGLLM().block_model


def user(*blocks: object) -> list[ChatMessage]:
    return [ChatMessage(role="user", blocks=list(blocks))]


def flat() -> list[ChatMessage]:
    return TEMPLATE.format_messages(context_str="\n\n".join(SHOWN), query_str=QUESTION)


def test_every_way_to_give_a_prompt_gives_the_same_blocks(model: BlockModel) -> None:
    before, after = "Context:\n", f"\n---\nQuery: {QUESTION}\nAnswer: "
    passages = [PassageBlock.from_node(hit) for hit in HITS]
    ways = {
        "passage blocks": prepare(
            model,
            user(
                TextBlock(text=before),
                passages[0],
                TextBlock(text="\n\n"),
                passages[1],
                TextBlock(text="\n\n"),
                passages[2],
                TextBlock(text=after),
            ),
        ),
        "citable blocks": prepare(
            model,
            user(
                TextBlock(text=before),
                *[
                    block
                    for hit, text in zip(HITS, SHOWN, strict=True)
                    for block in (CitableBlock(title="t", source=hit.node_id, content=text), TextBlock(text="\n\n"))
                ][:-1],
                TextBlock(text=after),
            ),
        ),
        "tracked text": prepare(model, flat(), tracked=TRACKED),
        "tracked text of a completion": prepare(model, user(TextBlock(text=flat()[0].content or "")), tracked=TRACKED),
    }
    parts = [before]
    for hit, text in zip(HITS, SHOWN, strict=True):
        parts += [Excerpt(text, Passage(id=hit.node_id, text=text)), "\n\n"]
    explicit = segment_chat(model.template, model.tokenizer, [Message("user", (*parts[:-1], after))])
    for way, prepared in ways.items():
        assert prepared.prompt.text == explicit.text, way
        assert prepared.prompt.token_ids == explicit.token_ids, way
        assert prepared.prompt.lengths == explicit.lengths, way
        assert prepared.found == 3, way
    # Untracked, the text is the same, without the marker that blocks follow if the model has one; it is one block.
    plain = prepare(model, flat()).prompt
    assert (plain.text, len(plain.blocks)) == (explicit.as_full().text, 1)
    # In full attention the tokens are those of the untracked prompt as well.
    assert prepare(model, flat(), tracked=TRACKED, whole=True).prompt == plain


def test_text_before_a_cache_point_is_a_block(model: BlockModel) -> None:
    explicit = prepare(model, user(*[PassageBlock(text=text) for text in SHOWN], TextBlock(text="Why?"))).prompt
    cut = prepare(
        model, user(*[block for text in SHOWN for block in (TextBlock(text=text), CUT)], TextBlock(text="Why?"))
    )
    assert cut.prompt.token_ids == explicit.token_ids
    assert [block.local for block in cut.prompt.blocks] == [True] * 6 + [False]
    # Several texts before one are one block; none is no block.
    (together,) = core_messages(user(TextBlock(text="a"), TextBlock(text="b"), CUT, CUT, TextBlock(text="c")))
    assert [part if isinstance(part, str) else (part.text,) for part in together.parts] == [("a\nb",), "\nc"]


@pytest.mark.parametrize(
    ("blocks", "text"),
    [
        ([TextBlock(text="Use:"), PassageBlock(text="p"), TextBlock(text="why?")], "Use:\np\nwhy?"),
        ([TextBlock(text="Use: "), PassageBlock(text="p"), TextBlock(text=" why?")], "Use: p why?"),
        ([PassageBlock(text="p"), PassageBlock(text="q")], "p\nq"),
        ([PassageBlock(text="p\n"), PassageBlock(text="q")], "p\nq"),
        ([TextBlock(text="a "), TextBlock(text=" b")], "a \n b"),
        ([TextBlock(text="a"), ThinkingBlock(content="hm"), TextBlock(text="b")], "a\nb"),
        ([TextBlock(text=""), PassageBlock(text="p")], "p"),
        ([], ""),
    ],
)
def test_blocks_are_joined_like_message_content(blocks: list[object], text: str) -> None:
    (message,) = core_messages(user(*blocks))
    assert "".join(part if isinstance(part, str) else part.text for part in message.parts) == text


def test_the_stock_template_shows_the_same_text_with_and_without_tracking(model: BlockModel) -> None:
    messages = DEFAULT_TEXT_QA_PROMPT_SEL.format_messages(
        llm=BlockRAGLLM(), context_str="\n\n".join(SHOWN), query_str=QUESTION
    )
    tracked = prepare(model, messages, tracked=TRACKED)
    assert tracked.prompt.as_full().text == prepare(model, messages).prompt.text
    assert [block.source for block in tracked.prompt.blocks if block.kind == "passage"] == ["Bhutan", "Peru", "Kenya"]


# -- the RAG form ---------------------------------------------------------------------------------------------------


def test_the_rag_form_is_the_one_of_training(model: BlockModel) -> None:
    passages = [Passage(id=h.node_id, title=h.node_id, text=h.node.get_content()) for h in HITS]
    trained = model.template.segment(model.tokenizer, passages=passages, question=QUESTION)
    system = ChatMessage(role="system", content="You are an expert Q&A system.")
    tracked = prepare(model, [system, *flat()], tracked=TRACKED, form="rag")
    blocks = [PassageBlock.from_node(hit) for hit in HITS]
    explicit = prepare(model, user(*blocks, TextBlock(text=QUESTION)), form="rag")
    assert tracked.prompt == explicit.prompt == trained


def test_instructions_of_the_user_stay_where_nothing_is_tracked(model: BlockModel) -> None:
    messages = [ChatMessage(role="system", content="Be brief."), *user(PassageBlock(text="p"), TextBlock(text="q?"))]
    assert "Be brief." in prepare(model, messages, form="rag").prompt.blocks[0].text


def test_what_the_rag_form_cannot_say_keeps_the_chat_form(model: BlockModel) -> None:
    plain = user(TextBlock(text=QUESTION))
    assert prepare(model, plain, form="rag").prompt == prepare(model, plain).prompt
    refining = Tracked(TRACKED.query, TRACKED.excerpts, refines=True)
    assert prepare(model, flat(), tracked=refining, form="rag").prompt == prepare(model, flat(), tracked=TRACKED).prompt


def test_a_part_of_a_passage_is_not_lost_in_the_rag_form(model: BlockModel) -> None:
    split = TextNode(id_="split", text="Thimphu lies in a valley, and a river runs through it to the south.")
    tracked = Tracked(QUESTION, (TRACKED.excerpts[0], excerpt_of(split)))
    text = f"{SHOWN[0]}\n\n{split.text[:-12]}"
    messages = TEMPLATE.format_messages(context_str=text, query_str=QUESTION)
    prepared = prepare(model, messages, tracked=tracked, form="rag")
    assert (prepared.found, prepared.missing) == (1, 1)
    assert text in prepared.prompt.text


def test_passages_that_begin_alike_are_not_missed_where_another_is_shown(model: BlockModel) -> None:
    alike = [TextNode(id_=name, text=f"From the records of the river authority, page {name}.") for name in "ab"]
    tracked = Tracked(QUESTION, tuple(map(excerpt_of, alike)))
    messages = TEMPLATE.format_messages(context_str=alike[0].text, query_str=QUESTION)
    prepared = prepare(model, messages, tracked=tracked, form="rag")
    assert (prepared.found, prepared.missing) == (1, 0)
    assert prepared.prompt.blocks[-1].text.startswith("Question:")


def test_conversations_the_assistant_opens_keep_the_chat_form(model: BlockModel) -> None:
    hello, asked = ChatMessage(role="assistant", content="Hello!"), user(PassageBlock(text="p"), TextBlock(text="q?"))
    for messages in ([hello, *asked], [*asked, hello, hello, *user(TextBlock(text="r?"))], [*asked, hello]):
        assert prepare(model, messages, form="rag").prompt == prepare(model, messages).prompt
    assert prepare(model, [*asked, hello, *asked], form="rag").prompt != prepare(model, [*asked, hello, *asked]).prompt


@pytest.mark.parametrize("empty", [PassageBlock(text=" \n"), CitableBlock(title="t", source="s", content=" ")])
def test_white_space_is_no_passage(model: BlockModel, empty: object) -> None:
    blocks = [PassageBlock(text="p"), empty, TextBlock(text="q?")]
    assert prepare(model, user(*blocks)).found == 1
    rag = prepare(model, user(*blocks), form="rag").prompt
    assert rag == prepare(model, user(blocks[0], blocks[-1]), form="rag").prompt


# -- what became of the passages --------------------------------------------------------------------------------------


def test_passages_that_do_not_stand_whole_are_counted_with_the_reason(model: BlockModel) -> None:
    long = TextNode(id_="long", text="A long passage that a splitter has cut in two. " * 4)
    node = TextNode(id_="n", text="Thimphu lies in a valley.")
    away = TextNode(id_="away", text="This one is not shown at all.")
    text = f"Context:\n{long.text[:100]}\n\n{node.text}\nQuery: is it true? {HITS[0].node.get_content()}"
    tracked = Tracked(
        f"is it true? {HITS[0].node.get_content()}",
        (*(excerpt_of(n) for n in (long, node, away)), Excerpt(HITS[0].node.get_content(), Passage(id="h", text="x"))),
    )
    prepared = prepare(model, user(TextBlock(text=text)), tracked=tracked)
    assert (prepared.found, prepared.missing, prepared.in_question) == (1, 1, 1)
    assert [block.source for block in prepared.prompt.local_blocks] == ["", "n"]


def test_passages_are_looked_for_where_they_were_pasted(model: BlockModel) -> None:
    label = excerpt_of(TextNode(id_="label", text="Answer:"))
    context = f"{SHOWN[0]}\n\nAnswer:"
    messages = TEMPLATE.format_messages(context_str=context, query_str=QUESTION)
    everywhere = Tracked(QUESTION, (label, *TRACKED.excerpts))
    there = Tracked(QUESTION, everywhere.excerpts, pasted=(context,))
    for tracked, labels in ((everywhere, 2), (there, 1), (Tracked(QUESTION, there.excerpts, pasted=("no",)), 2)):
        prepared = prepare(model, messages, tracked=tracked)
        assert prepared.prompt.as_full().text == prepare(model, messages).prompt.text
        assert sum(block.source == "label" for block in prepared.prompt.blocks) == labels
        # Wherever the passages are, the question sees them.
        assert all(not block.local for block in prepared.prompt.blocks if QUESTION in block.text)
    assert QUESTION in prepare(model, messages, tracked=there).prompt.blocks[-1].text


def test_what_assistants_and_tools_said_is_not_cut(model: BlockModel) -> None:
    messages = [*flat(), ChatMessage(role="assistant", content=SHOWN[0]), *user(TextBlock(text="Sure?"))]
    prepared = prepare(model, messages, tracked=TRACKED)
    assert sum(block.kind == "passage" for block in prepared.prompt.blocks) == 3


def test_explicit_passages_win_over_tracked_ones(model: BlockModel) -> None:
    prepared = prepare(model, user(PassageBlock(text="p"), TextBlock(text=f"\n{SHOWN[1]}\nWhy?")), tracked=TRACKED)
    assert [block.text for block in prepared.prompt.blocks if block.kind == "passage"] == ["p"]


# -- passage blocks elsewhere -------------------------------------------------------------------------------------


def test_a_passage_block_survives_where_messages_do() -> None:
    block = PassageBlock.from_node(HITS[0])
    message = ChatMessage(role="user", blocks=[block, TextBlock(text="q")])
    assert message.blocks[0] is block
    assert (block.node_id, block.title, block.score, block.content) == ("Bhutan", "Bhutan", 1.0, HITS[0].node.text)
    event = LLMChatStartEvent(model_dict={}, messages=[message], additional_kwargs={})
    assert event.messages[0].blocks[0] is block
    output = FunctionTool.from_defaults(lambda: [block, block], name="search")()
    assert output.blocks == [block, block]


def test_to_others_a_passage_block_is_text() -> None:
    block = PassageBlock.from_node(HITS[0])
    message = ChatMessage(role="user", blocks=[block, TextBlock(text="q")])
    assert message.content == f"{SHOWN[0]}\nq"
    (sent,) = to_openai_message_dicts([message])
    assert sent["content"] == f"{SHOWN[0]}q"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = ChatMessage.model_validate(message.model_dump())
    assert type(again.blocks[0]) is TextBlock
    assert again.content == message.content


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "complaint"),
    [
        ([ImageBlock(image=b"x")], "message 0 holds a block of type 'image'"),
        ([DocumentBlock(data=b"x")], "message 0 holds a block of type 'document'"),
        ([CitableBlock(title="t", source="s", content=[ImageBlock(image=b"x")])], "message 0 cites 's'"),
        ([ToolCallBlock(tool_name="f", tool_kwargs="{broken")], "no JSON"),
        ([ToolCallBlock(tool_name="f", tool_kwargs="[1]")], r"arguments \[1\]"),
        ([TextBlock(text="\ud800")], "lone surrogate"),
    ],
)
def test_what_cannot_be_shown_is_refused(model: BlockModel, blocks: list[object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        prepare(model, user(*blocks))


def test_no_messages_are_refused(model: BlockModel) -> None:
    with pytest.raises(PromptError, match="at least one message"):
        prepare(model, [])


def test_tools_need_a_template_that_shows_them(model: BlockModel) -> None:
    tool = FunctionTool.from_defaults(lambda x: x, name="f", description="d").metadata.to_openai_tool()
    with pytest.raises(PromptError, match="shows no tools"):
        prepare(model, user(TextBlock(text="q")), tools=[tool])
