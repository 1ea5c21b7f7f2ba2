"""Whole pipelines: index, ask, delete; in YAML, asynchronously, and after a restart."""

import asyncio
import copy
import subprocess
import sys

import haystack
import pytest
from haystack import Document, Pipeline
from haystack.components.writers import DocumentWriter
from haystack.core.errors import PipelineRuntimeError
from haystack.dataclasses import ChatMessage
from haystack.document_stores.in_memory import InMemoryDocumentStore
from haystack.document_stores.types import DuplicatePolicy, FilterPolicy

from blockrag.demo import load_questions
from haystack_integrations.components.embedders.blockrag import BlockRAGDocumentEmbedder, BlockRAGTextEmbedder
from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator
from haystack_integrations.components.retrievers.blockrag import BlockRAGEmbeddingRetriever
from haystack_integrations.document_stores.blockrag import BlockRAGDocumentStore

# Haystack 2 runs asynchronously in a class of its own.
AsyncPipeline = getattr(haystack, "AsyncPipeline", Pipeline)


def _indexing(store):
    pipeline = Pipeline()
    pipeline.add_component("embedder", BlockRAGDocumentEmbedder())
    pipeline.add_component("writer", DocumentWriter(store, policy=DuplicatePolicy.OVERWRITE))
    pipeline.connect("embedder.documents", "writer.documents")
    return pipeline


def _answering(store, model_arguments, cls=Pipeline, **arguments):
    pipeline = cls()
    pipeline.add_component("embedder", BlockRAGTextEmbedder())
    pipeline.add_component("retriever", BlockRAGEmbeddingRetriever(store, top_k=3))
    generator = BlockRAGChatGenerator(**model_arguments, generation_kwargs={"max_tokens": 24}, **arguments)
    pipeline.add_component("llm", generator)
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "llm.documents")
    return pipeline


def _inputs(question):
    return {"embedder": {"text": question}, "llm": {"messages": [ChatMessage.from_user(question)]}}


def _ask(pipeline, question):
    return pipeline.run(_inputs(question), include_outputs_from={"retriever"})


@pytest.fixture
def store(model_arguments, tmp_path, corpus):
    store = BlockRAGDocumentStore(tmp_path, embedding_dim=1024, **model_arguments)
    _indexing(store).run({"embedder": {"documents": corpus[:40]}})
    yield store
    store.close()


def test_every_question_is_computed_from_blocks_the_index_made(store, model_arguments):
    pipeline = _answering(store, model_arguments)
    asked = [one for one in load_questions() if one.kind == "capital"][:8]
    right = 0
    for number, one in enumerate(asked):
        result = _ask(pipeline, one.question)
        (reply,) = result["llm"]["replies"]
        assert reply.meta["document_ids"] == [document.id for document in result["retriever"]["documents"]]
        usage = reply.meta["usage"]
        # All but the question, and the first time the prompt's opening.
        assert usage["prompt_tokens_details"]["cached_tokens"] > usage["prompt_tokens"] * (0.5 if number else 0.3)
        right += reply.text == one.answer
    assert right >= 6


def test_yaml_of_whole_pipelines(store, model_arguments):
    question = "What is the capital of Andorra?"
    for pipeline in (_indexing(store), _answering(store, model_arguments)):
        again = Pipeline.loads(pipeline.dumps())
        assert again.to_dict() == pipeline.to_dict()
    result = _ask(again, question)
    assert result["llm"]["replies"][0].text == _ask(pipeline, question)["llm"]["replies"][0].text
    assert result["retriever"]["documents"][0].meta["title"] == "Andorra"
    again.get_component("retriever").document_store.close()


async def test_asynchronously(store, model_arguments):
    pipeline = _answering(store, model_arguments, cls=AsyncPipeline)
    questions = [one.question for one in load_questions() if one.kind == "capital"][:6]
    results = await asyncio.gather(*(pipeline.run_async(_inputs(question)) for question in questions))
    expected = [_ask(_answering(store, model_arguments), question)["llm"]["replies"][0].text for question in questions]
    assert [result["llm"]["replies"][0].text for result in results] == expected


def test_what_is_deleted_answers_no_more(store, model_arguments):
    pipeline = _answering(store, model_arguments)
    question = "What is the capital of Andorra?"
    (found,) = [d for d in _ask(pipeline, question)["retriever"]["documents"] if d.meta["title"] == "Andorra"]
    store.delete_documents([found.id])
    assert all(d.id != found.id for d in _ask(pipeline, question)["retriever"]["documents"])


def test_errors_inside_a_pipeline_keep_their_sentence(store, model_arguments):
    pipeline = _answering(store, model_arguments)
    inputs = _inputs("What is the capital of Andorra?")
    inputs["llm"]["generation_kwargs"] = {"max_tokns": 1}
    with pytest.raises((PipelineRuntimeError, ValueError), match="no option 'max_tokns'"):
        pipeline.run(inputs)


# -- retriever and embedders ------------------------------------------------------------------------------------------


def test_filters_of_the_retriever(store):
    embedding = BlockRAGTextEmbedder().run("What is the capital of Andorra?")["embedding"]
    andorra = {"field": "meta.title", "operator": "==", "value": "Andorra"}
    albania = {"field": "meta.title", "operator": "==", "value": "Albania"}
    replacing = BlockRAGEmbeddingRetriever(store, filters=andorra)
    assert [d.meta["title"] for d in replacing.run(embedding)["documents"]] == ["Andorra"]
    assert [d.meta["title"] for d in replacing.run(embedding, filters=albania)["documents"]] == ["Albania"]
    merging = BlockRAGEmbeddingRetriever(store, filters=andorra, filter_policy="merge")
    assert merging.filter_policy is FilterPolicy.MERGE
    assert merging.run(embedding, filters={"field": "id", "operator": "==", "value": "al"})["documents"] == []
    assert len(merging.run(embedding, filters={"field": "id", "operator": "==", "value": "an"})["documents"]) == 1
    assert len(BlockRAGEmbeddingRetriever(store, top_k=5).run(embedding)["documents"]) == 5
    assert len(BlockRAGEmbeddingRetriever(store, top_k=5).run(embedding, top_k=2)["documents"]) == 2


async def test_the_retriever_asynchronously_and_in_yaml(store):
    embedding = (await BlockRAGTextEmbedder().run_async("What is the capital of Andorra?"))["embedding"]
    retriever = BlockRAGEmbeddingRetriever(store, top_k=2, filter_policy=FilterPolicy.MERGE, return_embedding=True)
    found = (await retriever.run_async(embedding))["documents"]
    assert found == retriever.run(embedding)["documents"]
    assert len(found[0].embedding) == 1024
    again = BlockRAGEmbeddingRetriever.from_dict(retriever.to_dict())
    assert again.to_dict() == retriever.to_dict()
    with pytest.raises(TypeError, match="InMemoryDocumentStore; pass a BlockRAGDocumentStore"):
        BlockRAGEmbeddingRetriever(InMemoryDocumentStore())
    with pytest.raises(ValueError, match="top_k=0"):
        BlockRAGEmbeddingRetriever(store, top_k=0)


async def test_embedders():
    embedder = BlockRAGDocumentEmbedder("lexical:64")
    await embedder.warm_up_async()
    documents = [Document(id="1", content="a river", meta={"title": "Nile"}), Document(id="2", content="a mountain")]
    embedded = (await embedder.run_async(documents))["documents"]
    assert [document.id for document in embedded] == ["1", "2"]
    assert documents[0].embedding is None
    text_embedder = BlockRAGTextEmbedder("lexical:64")
    await text_embedder.warm_up_async()
    query = text_embedder.run("How long is the Nile?")["embedding"]
    scores = [sum(a * b for a, b in zip(query, d.embedding, strict=True)) for d in embedded]
    assert len(query) == 64
    assert scores[0] > scores[1]
    assert embedder.run([])["documents"] == []
    assert BlockRAGDocumentEmbedder.from_dict(embedder.to_dict()).encoder == "lexical:64"
    assert BlockRAGTextEmbedder.from_dict(text_embedder.to_dict()).encoder == "lexical:64"
    with pytest.raises(ValueError, match="text is a list"):
        text_embedder.run(["a", "b"])
    with pytest.raises(ValueError, match="pass a list of Document"):
        embedder.run("a")
    assert copy.deepcopy(text_embedder).run("Nile") == text_embedder.run("Nile")
    with pytest.raises(ValueError, match="'x' has no text content"):
        embedder.run([Document(id="x")])
    with pytest.raises(ValueError, match="no-such-encoder"):
        BlockRAGTextEmbedder("no-such-encoder").warm_up()


# -- packaging --------------------------------------------------------------------------------------------------------


def test_importing_is_light_and_warns_of_nothing():
    modules = ["components." + kind for kind in ("generators", "writers", "retrievers", "embedders")]
    imports = "".join(f"import haystack_integrations.{kind}.blockrag\n" for kind in [*modules, "document_stores"])
    heavy = {"transformers", "faiss", "sentence_transformers", "diskcache", "llama_index"}
    shown = f"print(sorted({heavy} & (set(sys.modules) - before)))"
    code = f"import sys, haystack\nbefore = set(sys.modules)\n{imports}{shown}"
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
