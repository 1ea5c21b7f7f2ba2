"""Where documents stand in a prompt: the same token ids, however they reach the generator."""

import pytest
from haystack import Document
from haystack.dataclasses import ByteStream, ChatMessage, ImageContent, TextContent, ToolCall
from haystack.dataclasses.chat_message import ReasoningContent

from blockrag import BlockModel
from blockrag.passage import Passage
from blockrag.prompt.chat import excerpt_blocks, segment_chat, segment_rag
from blockrag.prompt.message import Message
from haystack_integrations.common.blockrag import document_blocks, document_excerpt, document_passage
from haystack_integrations.components.generators.blockrag.conversation import (
    chosen_form,
    to_messages,
    with_documents,
)

QUESTION = "What is the capital of Bhutan?"


@pytest.fixture(scope="module")
def model():
    return BlockModel.from_pretrained("demo")


@pytest.fixture
def documents(corpus):
    return [one for one in corpus if one.id in ("bt", "ke", "af")]


def _excerpts(documents):
    return [document_excerpt(document) for document in documents]


@pytest.mark.parametrize("whole", [False, True])
def test_documents_on_the_port_in_parts_and_in_text_are_the_same_prompt(model, documents, whole):
    texts = [document.content for document in documents]
    conversations = {
        "port": [ChatMessage.from_user(QUESTION)],
        "parts": [ChatMessage.from_user(content_parts=[*texts, QUESTION])],
        "text": [ChatMessage.from_user("\n\n".join([*texts, QUESTION]))],
        "first by text, others on the port": [ChatMessage.from_user("\n\n".join([texts[-1], QUESTION]))],
    }
    prompts = {}
    for name, conversation in conversations.items():
        messages = with_documents(to_messages(conversation), _excerpts(documents), "chat")
        prompts[name] = segment_chat(model.template, model.tokenizer, messages, whole=whole)
    assert len({prompt.token_ids for prompt in prompts.values()}) == 1
    assert len({prompt.lengths for prompt in prompts.values()}) == 1
    plain = segment_chat(model.template, model.tokenizer, to_messages(conversations["text"]), whole=True)
    opened = "" if whole else model.template.block_attention_prefix  # only a prompt in blocks says that blocks follow
    assert prompts["port"].text.replace(opened, "", 1) == plain.text == prompts["port"].as_full().text
    assert len(prompts["port"].local_blocks) == (0 if whole else 6)  # opening, three documents, two separators


def test_the_rag_form_is_the_templates_own(model, documents):
    messages = with_documents(to_messages([ChatMessage.from_user(QUESTION)]), _excerpts(documents), "rag")
    passages = [Passage(one.id, one.content, title=one.meta["title"]) for one in documents]
    expected = model.template.segment(model.tokenizer, passages=passages, question=QUESTION)
    assert segment_rag(model.template, model.tokenizer, messages).token_ids == expected.token_ids


@pytest.mark.parametrize("form", ["rag", "chat"])
def test_blocks_computed_beforehand_are_those_of_the_prompt(model, documents, form):
    messages = with_documents(to_messages([ChatMessage.from_user(QUESTION)]), _excerpts(documents), form)
    segment = segment_rag if form == "rag" else segment_chat
    prompt = segment(model.template, model.tokenizer, messages)
    beforehand = document_blocks(model, [document_passage(document) for document in documents], form)
    assert [block.token_ids for block in prompt.blocks if block.kind == "passage"] == [
        block.token_ids for block in beforehand
    ]
    if form == "chat":
        assert beforehand[0].token_ids == excerpt_blocks(model.tokenizer, [documents[0].content])[0].token_ids


def test_the_form_chosen_by_auto(documents):
    question = to_messages([ChatMessage.from_user(QUESTION)])
    pasted = to_messages([ChatMessage.from_user("\n".join([one.content for one in documents] + [QUESTION]))])
    excerpts = _excerpts(documents)
    assert chosen_form("auto", question, None, with_tools=False) == "chat"
    assert chosen_form("auto", question, excerpts, with_tools=False) == "rag"
    assert chosen_form("auto", question, [], with_tools=False) == "rag"
    assert chosen_form("auto", pasted, excerpts, with_tools=False) == "chat"
    assert (
        chosen_form("auto", pasted, [*excerpts, document_excerpt(Document(content="new"))], with_tools=False) == "rag"
    )
    assert chosen_form("auto", question, excerpts, with_tools=True) == "chat"
    greeting = to_messages([ChatMessage.from_system("Be brief."), ChatMessage.from_assistant("Hello!")])
    assert chosen_form("auto", [*greeting, *question], excerpts, with_tools=False) == "chat"
    assert chosen_form("auto", [*question, *greeting[1:], *question], excerpts, with_tools=False) == "rag"
    assert chosen_form("rag", pasted, excerpts, with_tools=False) == "rag"
    assert chosen_form("chat", question, excerpts, with_tools=False) == "chat"


def test_documents_join_the_last_user_message_and_what_was_said_is_left_alone(documents):
    said = documents[0].content
    conversation = to_messages(
        [
            ChatMessage.from_system("Be brief."),
            ChatMessage.from_user("First question"),
            ChatMessage.from_assistant(said, reasoning="thinking"),
            ChatMessage.from_user("Second question"),
        ]
    )
    assert [message.text for message in conversation] == ["Be brief.", "First question", said, "Second question"]
    for form in ("rag", "chat"):
        placed = with_documents(conversation, _excerpts(documents), form)
        assert [len(message.passages) for message in placed] == [0, 0, 0, 3]
    with pytest.raises(ValueError, match="3 documents have no user message"):
        with_documents(conversation[:1], _excerpts(documents), "rag")


def test_tool_messages():
    call = ToolCall("search", {"query": "x"}, id="1")
    messages = to_messages(
        [
            ChatMessage.from_assistant(tool_calls=[call]),
            ChatMessage.from_tool("found it", origin=call),
            ChatMessage.from_tool([TextContent("one"), TextContent("two")], origin=call),
        ]
    )
    assert messages[0].parts == ()
    assert messages[0].tool_calls[0].arguments == {"query": "x"}
    assert messages[1] == Message("tool", ("found it",), tool_call_id="1", name="search")
    assert messages[2].text == "one\n\ntwo"
    assert chosen_form("auto", messages, [], with_tools=False) == "chat"


def test_what_is_no_text_is_refused():
    image = ImageContent(base64_image="iVBORw0KGgo=", mime_type="image/png", validation=False)
    with pytest.raises(ValueError, match=r"user message holds a ImageContent.*remove it or describe it"):
        to_messages([ChatMessage.from_user(content_parts=["look", image])])
    for odd in ([QUESTION], [Document(content="x")]):
        with pytest.raises(ValueError, match="must be a list of ChatMessage, or a string; one is"):
            to_messages(odd)
    with pytest.raises(ValueError, match="tool message holds a ImageContent"):
        to_messages([ChatMessage.from_tool([image], origin=ToolCall("camera", {}))])
    with pytest.raises(ValueError, match=r"'1' has no text content \(it holds image/png\)"):
        document_passage(Document(id="1", blob=ByteStream(b"", mime_type="image/png")))
    with pytest.raises(ValueError, match=r"'2' has no text content \(it holds nothing\)"):
        document_passage(Document(id="2"))
    assert to_messages([ChatMessage.from_assistant("a", reasoning=ReasoningContent("r"))])[0].parts == ("a",)
