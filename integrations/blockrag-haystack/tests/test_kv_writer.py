"""The writer: what the generator would have to compute is there before it asks."""

import asyncio
import logging

import pytest
from haystack import Document, Pipeline
from haystack.components.writers import DocumentWriter
from haystack.dataclasses import ChatMessage
from haystack.document_stores.in_memory import InMemoryDocumentStore

from blockrag.model.shared import shared_store
from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator
from haystack_integrations.components.writers.blockrag import BlockKVWriter

QUESTION = [ChatMessage.from_user("What is the capital of Bhutan?")]


def _documents():
    return [Document(id=str(n), content=f"Sentence number {n}.", meta={"title": f"T{n}"}) for n in range(5)]


@pytest.mark.parametrize("prompt_form", ["rag", "chat"])
def test_the_generator_finds_what_the_writer_wrote(model_arguments, prompt_form):
    documents = _documents()
    written = BlockKVWriter(**model_arguments, prompt_form=prompt_form).run(documents)
    assert written["documents"] is documents
    assert (written["written"], written["failed"]) == (5, 0)
    generator = BlockRAGChatGenerator(**model_arguments, prompt_form=prompt_form, generation_kwargs={"max_tokens": 2})
    generator.run(QUESTION, documents=documents)
    # Beside the documents there are only the prompt's opening and, in the chat form, what separates paragraphs.
    assert shared_store(model_arguments["store"]).stats().blocks == (6 if prompt_form == "rag" else 7)
    again = BlockKVWriter(**model_arguments, prompt_form=prompt_form).run(documents)
    assert (again["written"], again["failed"]) == (0, 0)


def test_one_document_never_loses_the_batch(model_arguments, caplog):
    documents = [*_documents(), Document(id="blank"), Document(id="long", content="word " * 5000), *_documents()]
    with caplog.at_level(logging.WARNING):
        result = BlockKVWriter(**model_arguments).run(documents)
    assert (result["written"], result["failed"]) == (5, 2)
    assert result["documents"] == documents
    assert "2 of 12 documents have no stored KV states; the first is 'blank'" in caplog.text
    with pytest.raises(ValueError, match="1 of 6 documents have no stored KV states; the first is 'long'"):
        BlockKVWriter(**model_arguments, strict=True).run([*_documents(), documents[6]])
    assert BlockKVWriter(**model_arguments).run([]) == {"documents": [], "written": 0, "failed": 0}


def test_a_full_store_is_counted_not_raised():
    writer = BlockKVWriter(store="memory://?max_bytes=50KB")
    result = writer.run([Document(content="word " * 200), Document(content="A text.")])
    assert (result["written"], result["failed"]) == (1, 1)


async def test_the_event_loop_goes_on(model_arguments):
    writer = BlockKVWriter(**model_arguments)
    await writer.warm_up_async()
    with writer._model.load()._lock.exclusive:
        task = asyncio.create_task(writer.run_async(_documents()))
        for _ in range(100):
            await asyncio.sleep(0)
        assert not task.done()
    assert (await task)["written"] == 5


def test_in_an_indexing_pipeline_before_any_document_writer(model_arguments):
    store = InMemoryDocumentStore()
    pipeline = Pipeline()
    pipeline.add_component("kv", BlockKVWriter(**model_arguments, strict=True))
    pipeline.add_component("writer", DocumentWriter(store))
    pipeline.connect("kv.documents", "writer.documents")
    again = Pipeline.loads(pipeline.dumps())
    assert again.to_dict() == pipeline.to_dict()
    result = pipeline.run({"kv": {"documents": _documents()}})
    assert result == {"kv": {"written": 5, "failed": 0}, "writer": {"documents_written": 5}}
    with pytest.raises(ValueError, match="prompt_form='auto'"):
        BlockKVWriter(prompt_form="auto")
