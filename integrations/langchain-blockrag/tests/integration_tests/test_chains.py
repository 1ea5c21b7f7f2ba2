"""The ways LangChain's own documentation asks questions about documents, with blocks in them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.agents.middleware import ModelRequest, wrap_model_call
from langchain_core.caches import InMemoryCache
from langchain_core.documents import Document
from langchain_core.globals import set_llm_cache
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, MessagesPlaceholder
from langchain_core.runnables import Runnable, RunnablePassthrough

from langchain_blockrag import BlockRAGEmbeddings, BlockRAGVectorStore, ChatBlockRAG, documents_to_blocks
from tests.conftest import QUESTION


@pytest.fixture
def store(llm: ChatBlockRAG, documents: list[Document]) -> BlockRAGVectorStore:
    return BlockRAGVectorStore.from_documents(documents, BlockRAGEmbeddings(), llm=llm)


@pytest.fixture
def chain(llm: ChatBlockRAG, store: BlockRAGVectorStore) -> Runnable[str, str]:
    retriever = store.as_retriever(search_kwargs={"k": 2})
    return {"context": retriever, "question": RunnablePassthrough()} | documents_to_blocks | llm | StrOutputParser()


async def test_a_chain_answers_streams_and_reports(chain: Runnable[str, str]) -> None:
    assert chain.invoke(QUESTION) == "Thimphu"
    assert await chain.ainvoke(QUESTION) == "Thimphu"
    assert len(pieces := list(chain.stream(QUESTION))) > 1
    assert "".join(pieces) == "Thimphu"
    assert "".join([piece async for piece in chain.astream(QUESTION)]) == "Thimphu"
    assert chain.batch([QUESTION, "What is the capital of Kenya?"]) == ["Thimphu", "Nairobi"]
    events = [event async for event in chain.astream_events(QUESTION, version="v2")]
    said = [event["data"]["chunk"].text for event in events if event["event"] == "on_chat_model_stream"]
    assert "".join(said) == "Thimphu"
    (ended,) = [event for event in events if event["event"] == "on_chat_model_end"]
    # All but the question was there: the passages since they were added, the prefix since the first question.
    usage = ended["data"]["output"].usage_metadata
    assert 0 < usage["input_tokens"] - usage["input_token_details"]["cache_read"] < 30
    assert any(event["event"] == "on_retriever_end" for event in events)


def test_sources_beside_the_answer(llm: ChatBlockRAG, store: BlockRAGVectorStore) -> None:
    retriever = store.as_retriever(search_kwargs={"k": 1})
    chain = RunnablePassthrough.assign(context=lambda given: retriever.invoke(given["question"])) | (
        RunnablePassthrough.assign(answer=documents_to_blocks | llm | StrOutputParser())
    )
    result = chain.invoke({"question": QUESTION})
    assert result["answer"] == "Thimphu"
    assert [document.id for document in result["context"]] == ["Bhutan"]


def test_a_prompt_template_keeps_its_place(llm: ChatBlockRAG, store: BlockRAGVectorStore) -> None:
    template = ChatPromptTemplate([("system", "Answer."), MessagesPlaceholder("asked")])
    chain = {"context": store.as_retriever(), "question": RunnablePassthrough()} | documents_to_blocks
    answer = (chain | (lambda asked: {"asked": asked}) | template | llm).invoke(QUESTION)
    assert answer.usage_metadata["input_token_details"]["cache_read"] > 0


def test_an_agent_whose_middleware_brings_the_documents(llm: ChatBlockRAG, store: BlockRAGVectorStore) -> None:
    @wrap_model_call
    def with_documents(request: ModelRequest, handler: Callable[[ModelRequest], Any]) -> Any:
        found = store.similarity_search(request.messages[-1].text, k=2)
        return handler(request.override(model_settings={"documents": found}))

    agent = create_agent(llm, tools=[], middleware=[with_documents])
    result = agent.invoke({"messages": [{"role": "user", "content": QUESTION}]})
    assert result["messages"][-1].text == "Thimphu"
    followed = agent.invoke({"messages": [*result["messages"], ("user", "What is the capital of Kenya?")]})
    assert followed["messages"][-1].text == "Nairobi"
    streamed = agent.stream({"messages": [("user", QUESTION)]}, stream_mode="messages")
    assert "".join(chunk.text for chunk, _ in streamed) == "Thimphu"


@pytest.fixture
def cached() -> Iterator[None]:
    set_llm_cache(InMemoryCache())
    yield
    set_llm_cache(None)


@pytest.mark.usefixtures("cached")
def test_langchains_cache_tells_documents_apart(llm: ChatBlockRAG) -> None:
    told = [Document("Title: Bhutan\nThe capital of Bhutan is Thimphu.")]
    lied = [Document("Title: Bhutan\nThe capital of Bhutan is Lima.")]
    for documents, expected in ((told, "Thimphu"), (lied, "Lima"), (told, "Thimphu")):
        assert llm.bind(documents=documents).invoke(QUESTION).text == expected
        assert llm.invoke([documents_to_blocks(documents, QUESTION)]).text == expected
