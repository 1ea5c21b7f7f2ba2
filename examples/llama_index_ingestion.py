"""KV states are computed while documents are ingested: the first question already finds every passage.

Runs offline in seconds with the small demo model. Needs:  pip install llama-index-llms-blockrag
Run:  python examples/llama_index_ingestion.py
"""

from llama_index.core import Document, VectorStoreIndex
from llama_index.core.ingestion import IngestionPipeline
from llama_index.core.llms import ChatMessage, TextBlock
from llama_index.core.query_engine import RetrieverQueryEngine
from llama_index.core.storage.docstore import SimpleDocumentStore
from llama_index.llms.blockrag import (
    BlockKVTransform,
    BlockRAGLLM,
    BlockRAGVectorStore,
    BlockSynthesizer,
    LexicalEmbedding,
    PassageBlock,
)

from blockrag.demo import load_corpus

# Components with equal fields share one model and one block store in a process; a directory is shared by processes.
same = {"model_name": "demo", "prompt_form": "rag", "store_url": "memory://?max_bytes=256MiB"}

embedding = LexicalEmbedding()
vector_store = BlockRAGVectorStore(**same)  # drops the KV states of passages that nobody has any more
pipeline = IngestionPipeline(
    transformations=[embedding, BlockKVTransform(**same)],
    vector_store=vector_store,
    docstore=SimpleDocumentStore(),
)
documents = [Document(text=p.text, metadata={"title": p.title}, id_=p.id) for p in load_corpus()]
nodes = pipeline.run(documents=documents)
llm = BlockRAGLLM(**same, max_new_tokens=24)
print(f"{len(nodes)} nodes ingested, {llm.block_model.store.stats().blocks} blocks stored")

index = VectorStoreIndex.from_vector_store(vector_store, embed_model=embedding)
retriever = index.as_retriever(similarity_top_k=4)
question = "What is the capital of Bhutan?"

# The first question ever. Passages can also be handed over one by one, as blocks of a message.
hits = retriever.retrieve(question)
response = llm.chat([ChatMessage(blocks=[*map(PassageBlock.from_node, hits), TextBlock(text=question)])])
print(f"{question}  ->  {response.message.content}")
print(f"  {response.raw['block_cache']}")

# Or by a synthesizer that splits none of them.
engine = RetrieverQueryEngine(retriever, response_synthesizer=BlockSynthesizer(llm))
answer = engine.query("What is the currency of Kenya?")
print(f"What is the currency of Kenya?  ->  {answer}, from {[hit.metadata['title'] for hit in answer.source_nodes]}")

# A document that changed: what was stored for its old text goes, everything else stays.
before = llm.block_model.store.stats().blocks
documents[0].set_content(documents[0].text + " It was written down again.")
pipeline.run(documents=documents)
print(f"one document changed: {before} blocks before, {llm.block_model.store.stats().blocks} after")
