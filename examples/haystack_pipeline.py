"""A Haystack pipeline whose documents stay blocks, from the document store to the model.

Runs offline in seconds with the small demo model.
Run:  pip install blockrag-haystack && python examples/haystack_pipeline.py
"""

from haystack import Document, Pipeline
from haystack.components.writers import DocumentWriter
from haystack.dataclasses import ChatMessage
from haystack_integrations.components.embedders.blockrag import BlockRAGDocumentEmbedder, BlockRAGTextEmbedder
from haystack_integrations.components.generators.blockrag import BlockRAGChatGenerator
from haystack_integrations.components.retrievers.blockrag import BlockRAGEmbeddingRetriever
from haystack_integrations.document_stores.blockrag import BlockRAGDocumentStore

from blockrag.demo import load_corpus

documents = [Document(content=one.text, meta={"title": one.title}) for one in load_corpus()]

# With a model, the store also computes the KV states of what is written, and drops them with the last document.
store = BlockRAGDocumentStore(embedding_dim=1024, model="demo")

indexing = Pipeline()
indexing.add_component("embedder", BlockRAGDocumentEmbedder())
indexing.add_component("writer", DocumentWriter(store))
indexing.connect("embedder.documents", "writer.documents")
indexing.run({"embedder": {"documents": documents}})
print(f"{store.count_documents()} documents indexed")

answering = Pipeline()
answering.add_component("embedder", BlockRAGTextEmbedder())
answering.add_component("retriever", BlockRAGEmbeddingRetriever(store, top_k=3))
answering.add_component("llm", BlockRAGChatGenerator("demo", generation_kwargs={"max_tokens": 24}))
answering.connect("embedder.embedding", "retriever.query_embedding")
answering.connect("retriever.documents", "llm.documents")

for question in ("What is the capital of Bhutan?", "What is the currency of Kenya?"):
    inputs = {"embedder": {"text": question}, "llm": {"messages": [ChatMessage.from_user(question)]}}
    result = answering.run(inputs, include_outputs_from={"retriever"})
    (reply,) = result["llm"]["replies"]
    usage = reply.meta["usage"]
    print(f"\n{question}  ->  {reply.text}")
    print("  from", ", ".join(document.meta["title"] for document in result["retriever"]["documents"]))
    print(f"  {usage['prompt_tokens_details']['cached_tokens']} of {usage['prompt_tokens']} prompt tokens were reused")

# The whole pipeline is plain YAML, as every Haystack pipeline is.
assert Pipeline.loads(answering.dumps()).to_dict() == answering.to_dict()  # noqa: S101
