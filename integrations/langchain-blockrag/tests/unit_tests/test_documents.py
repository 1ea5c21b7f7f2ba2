"""Documents and messages as blockrag reads them, and as everybody else does."""

from __future__ import annotations

from typing import Any

import pytest
from blockrag.errors import InputError
from blockrag.prompt import Excerpt, Message, ToolCall
from langchain_core.documents import Document
from langchain_core.messages import (
    AIMessage,
    AIMessageChunk,
    BaseMessage,
    ChatMessage,
    FunctionMessage,
    HumanMessage,
    RemoveMessage,
    SystemMessage,
    ToolMessage,
    convert_to_openai_messages,
    messages_from_dict,
    messages_to_dict,
)
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import RunnablePassthrough

from langchain_blockrag import documents_to_blocks
from langchain_blockrag.messages import core_messages, with_documents

QUESTION = "What is the capital of Bhutan?"
BHUTAN = Document(id="b", page_content=" The capital is Thimphu.\n", metadata={"title": "Bhutan", "source": "x.md"})
PLAIN = Document(page_content="The capital of Peru is Lima.")


def excerpts(message: BaseMessage) -> list[Excerpt]:
    return [part for part in core_messages([message])[0].parts if isinstance(part, Excerpt)]


def test_documents_become_passages_with_their_titles_and_nothing_else_of_their_metadata() -> None:
    message = documents_to_blocks([BHUTAN, PLAIN, "Just text."], QUESTION)
    (read,) = core_messages([message])
    assert read.role == "user"
    assert read.text == QUESTION
    assert [(p.id, p.title, p.text) for p in read.passages] == [
        ("b", "Bhutan", "The capital is Thimphu."),
        ("2", "", "The capital of Peru is Lima."),
        ("3", "", "Just text."),
    ]
    assert "x.md" not in str(message.content)


def test_other_chat_models_read_documents_and_question_as_text() -> None:
    message = documents_to_blocks([BHUTAN, PLAIN], QUESTION)
    text = f"Bhutan\nThe capital is Thimphu.\n\nThe capital of Peru is Lima.\n\n{QUESTION}"
    assert message.text == text
    (openai,) = convert_to_openai_messages([message], text_format="block")
    assert openai["role"] == "user"
    assert {frozenset(part) for part in openai["content"]} == {frozenset({"type", "text"})}
    assert "".join(part["text"] for part in openai["content"]) == text
    assert convert_to_openai_messages(message)["content"].split() == text.split()
    assert [block["type"] for block in message.content_blocks] == ["text"] * 3


@pytest.mark.parametrize(
    "document",
    [
        BHUTAN,
        PLAIN,
        Document(page_content="Bhutan\nis a country.", metadata={"title": "Bhutan"}),
        Document(page_content="text", metadata={"title": "  two\nlines "}),
        Document(page_content="text", metadata={"title": 7}),
        Document(page_content="", metadata={"title": "Empty"}),
        Document(page_content="<|endoftext|> {question}"),
    ],
)
def test_a_passage_survives_its_way_through_a_message(document: Document) -> None:
    (read,) = excerpts(documents_to_blocks([document], QUESTION))
    title = document.metadata.get("title")
    assert read.passage.title == (title.strip() if isinstance(title, str) else "")
    assert read.passage.text == document.page_content.strip()


def test_passages_survive_checkpoints_and_serialization() -> None:
    message = documents_to_blocks([BHUTAN, PLAIN], QUESTION)
    (restored,) = messages_from_dict(messages_to_dict([message]))
    assert excerpts(restored) == excerpts(message)
    assert excerpts(HumanMessage.model_validate_json(message.model_dump_json())) == excerpts(message)


def test_it_stands_in_a_chain_where_the_prompt_did() -> None:
    chain = {"context": lambda _: [BHUTAN], "question": RunnablePassthrough()} | documents_to_blocks
    assert chain.invoke(QUESTION) == [documents_to_blocks([BHUTAN], QUESTION)]
    assert documents_to_blocks.invoke({"context": [], "input": QUESTION}) == [documents_to_blocks([], QUESTION)]


def test_a_chat_history_comes_first() -> None:
    given = {"context": [BHUTAN], "input": QUESTION, "chat_history": [("human", "Hi"), AIMessage("Hello")]}
    assert documents_to_blocks.invoke(given) == [
        HumanMessage("Hi"),
        AIMessage("Hello"),
        documents_to_blocks([BHUTAN], QUESTION),
    ]
    assert documents_to_blocks.invoke({**given, "chat_history": []}) == [documents_to_blocks([BHUTAN], QUESTION)]


def test_it_fits_into_a_prompt_template() -> None:
    template = ChatPromptTemplate([("system", "Be brief."), MessagesPlaceholder("asked")])
    messages = template.invoke({"asked": documents_to_blocks.invoke({"context": [BHUTAN], "question": QUESTION})})
    system, asked = core_messages(messages.to_messages())
    assert (system.role, system.text) == ("system", "Be brief.")
    assert len(asked.passages) == 1


def test_plain_text_blocks_are_passages() -> None:
    block = {"type": "text-plain", "text": "The capital is Thimphu.", "title": "Bhutan", "mime_type": "text/plain"}
    (read,) = excerpts(HumanMessage(content=[block, {"type": "text", "text": QUESTION}]))
    assert (read.passage.title, read.passage.text) == ("Bhutan", "The capital is Thimphu.")
    assert read.text == "Bhutan\nThe capital is Thimphu.\n\n"


def test_extras_of_others_are_left_alone() -> None:
    for extras in ({"signature": "x"}, ["x"], "x", None):
        (read,) = core_messages([HumanMessage([{"type": "text", "text": QUESTION, "extras": extras}])])
        assert read.parts == (QUESTION,)


def test_all_kinds_of_messages_are_read() -> None:
    call = {"name": "search", "args": {"query": "Bhutan"}, "id": "call_1"}
    thinking = {"type": "reasoning", "reasoning": "hm"}
    messages = [
        SystemMessage("Be brief."),
        ChatMessage(role="user", content="Hi"),
        AIMessageChunk(content=[thinking, {"type": "text", "text": "Let me look."}], tool_calls=[call]),
        ToolMessage("Thimphu", tool_call_id="call_1", name="search"),
        AIMessage("Thimphu."),
        HumanMessage(["Are you ", "sure?"], name="somebody"),
    ]
    assert core_messages(messages) == [
        Message("system", ("Be brief.",)),
        Message("user", ("Hi",)),
        Message("assistant", ("Let me look.",), tool_calls=(ToolCall("search", {"query": "Bhutan"}, id="call_1"),)),
        Message("tool", ("Thimphu",), tool_call_id="call_1", name="search"),
        Message("assistant", ("Thimphu.",)),
        Message("user", ("Are you ", "sure?")),
    ]


def test_documents_go_with_the_last_human_message() -> None:
    history = [HumanMessage("Hi"), AIMessage("Hello"), HumanMessage(QUESTION), AIMessage("?")]
    given = with_documents(history, [BHUTAN])
    assert given[2].content == documents_to_blocks([BHUTAN], QUESTION).content
    assert [given[place] for place in (0, 1, 3)] == [history[place] for place in (0, 1, 3)]
    assert history[2].content == QUESTION


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: documents_to_blocks(BHUTAN, QUESTION), r"got Document; pass \[document\]"),
        (lambda: documents_to_blocks("text", QUESTION), "must be a list"),
        (lambda: documents_to_blocks([7], QUESTION), "got int 7"),
        (lambda: documents_to_blocks([], None), "question must be a string, got NoneType"),
        (lambda: documents_to_blocks.invoke({"context": []}), r"got \['context'\]"),
        (lambda: documents_to_blocks.invoke(QUESTION), "got str"),
        (lambda: documents_to_blocks.invoke({"context": [], "input": "", "chat_history": "Human: Hi"}), "got str 'Hum"),
        (lambda: documents_to_blocks(["\ud800"], QUESTION), "lone surrogate"),
        (lambda: with_documents([SystemMessage("x")], [BHUTAN]), r"got \['system'\]"),
    ],
)
def test_what_is_no_document_is_refused(make: Any, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (HumanMessage([{"type": "image", "url": "https://example.org/x.png"}]), "'image'"),
        (HumanMessage([{"type": "reasoning", "reasoning": "hm"}]), "'reasoning'"),
        (HumanMessage([{"type": "text-plain", "url": "https://example.org/x.txt"}]), "the text None"),
        (HumanMessage([{"type": "text", "text": "x", "extras": {"blockrag": True}}]), "pass a mapping"),
        (ChatMessage(role="wizard", content="x"), "'wizard'"),
        (FunctionMessage(name="f", content="x"), "'function'"),
        (RemoveMessage(id="1"), "'remove'"),
    ],
)
def test_what_a_text_model_cannot_be_shown_is_refused(message: BaseMessage, says: str) -> None:
    with pytest.raises(InputError, match=says):
        core_messages([message])
