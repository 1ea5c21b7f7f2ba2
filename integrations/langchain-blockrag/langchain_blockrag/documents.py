r"""LangChain documents as passages, and the message that carries them to the model.

A passage travels as a text part of a message. What it says any chat model can read; that it is a passage stands in
the part's `extras`, which other providers ignore:

    {"type": "text", "text": "Bhutan\nThe capital of Bhutan is Thimphu.\n\n",
     "extras": {"blockrag": {"id": "bhutan", "title": "Bhutan"}}}

The text is the title, if there is one, on a line of its own, and the passage. `metadata["title"]` is a document's
title; nothing else of its metadata is shown to the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blockrag.errors import InputError
from blockrag.passage import Passage
from langchain_core.documents import Document
from langchain_core.messages import BaseMessage, HumanMessage, convert_to_messages
from langchain_core.runnables import Runnable, RunnableConfig

__all__ = ["MARK", "DocumentsToBlocks", "document_of", "documents_to_blocks", "passage_of", "passage_parts", "shown"]

MARK = "blockrag"
"""Key of a text part's extras that makes the part a passage."""


def passage_of(document: Document | str, *, id: str) -> Passage:
    """The passage a document is.

    Args:
        document: The document, or its text.
        id: The passage's id, where the document has none.

    Raises:
        InputError: It is neither, or its text cannot be stored as UTF-8.
    """
    if isinstance(document, str):
        return Passage(id=id, text=document)
    if not isinstance(document, Document):
        raise InputError(f"a passage must be a Document or a string, got {type(document).__name__} {document!r:.60}")
    title = document.metadata.get("title")
    return Passage(
        id=document.id or id,
        text=document.page_content,
        title=title if isinstance(title, str) else "",
        metadata=document.metadata,
    )


def document_of(passage: Passage) -> Document:
    """The document a passage was made from."""
    return Document(id=passage.id, page_content=passage.text, metadata=dict(passage.metadata))


def shown(passage: Passage) -> str:
    """What a message says of a passage."""
    title, text = passage.title.strip(), passage.text.strip()
    return f"{title}\n{text}" if title else text


def passage_parts(documents: Sequence[Document | str]) -> list[dict[str, Any]]:
    """The text parts that carry documents, one each and in order.

    Raises:
        InputError: One of them is no document, or is not text.
    """
    if isinstance(documents, (str, Document, Mapping)) or not isinstance(documents, Sequence):
        raise InputError(f"documents must be a list of documents, got {type(documents).__name__}; pass [document]")
    passages = [passage_of(document, id=str(number)) for number, document in enumerate(documents, 1)]
    return [
        {
            "type": "text",
            "text": f"{shown(passage)}\n\n",
            "extras": {MARK: {"id": passage.id, "title": passage.title.strip()}},
        }
        for passage in passages
    ]


class DocumentsToBlocks(Runnable[Mapping[str, Any], list[BaseMessage]]):
    """Makes retrieved documents and a question the message a chat model is asked with.

    `ChatBlockRAG` takes each document as a block, which it prefills once and reuses wherever it comes again; other
    chat models read the documents and the question as text. In a chain it stands in the place of the prompt template
    and of the function that joined the documents to one string:

        chain = {"context": retriever, "question": RunnablePassthrough()} | documents_to_blocks | llm
    """

    def __call__(self, documents: Sequence[Document | str], question: str) -> HumanMessage:
        """The message.

        Args:
            documents: Documents or strings, in the order the model is to see them; none is fine.
            question: What is asked about them.

        Raises:
            InputError: A document is no document, or the question is no string.
        """
        if not isinstance(question, str):
            raise InputError(f"the question must be a string, got {type(question).__name__} {question!r:.60}")
        return HumanMessage(content=[*passage_parts(documents), {"type": "text", "text": question}])

    def invoke(
        self, input: Mapping[str, Any], config: RunnableConfig | None = None, **kwargs: Any
    ) -> list[BaseMessage]:
        """In a chain: the messages that chat models take.

        Args:
            input: The documents as `context`, the question as `question` or `input`, and what was said before, if
                anything, as `chat_history`: messages, which come first.
            config: Callbacks and the like.
            **kwargs: None are known.

        Raises:
            InputError: A key is missing, or see `__call__`.
        """
        return self._call_with_config(self._messages, input, config, run_type="prompt", **kwargs)

    def _messages(self, given: Mapping[str, Any]) -> list[BaseMessage]:
        if not isinstance(given, Mapping) or "context" not in given or not {"question", "input"} & given.keys():
            keys = sorted(map(str, given)) if isinstance(given, Mapping) else type(given).__name__
            raise InputError(f"documents_to_blocks needs a mapping with context and question, got {keys}")
        history = given.get("chat_history") or []
        if isinstance(history, str) or not isinstance(history, Sequence):
            raise InputError(f"chat_history must be a list of messages, got {type(history).__name__} {history!r:.60}")
        asked = self(given["context"], given["question"] if "question" in given else given["input"])
        return [*convert_to_messages(history), asked]


documents_to_blocks = DocumentsToBlocks()
"""The one instance: call it, or put it into a chain."""
