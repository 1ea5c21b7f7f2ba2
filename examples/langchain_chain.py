"""LangChain: a retriever, a chain that answers and streams, and how much of each prompt was computed before.

Runs offline in seconds with the small demo model.
Run:  pip install langchain-blockrag && python examples/langchain_chain.py
"""

from langchain_blockrag import BlockRAGEmbeddings, BlockRAGVectorStore, ChatBlockRAG, documents_to_blocks
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.runnables import RunnablePassthrough

from blockrag.demo import load_corpus

documents = [
    Document(id=passage.id, page_content=passage.text, metadata={"title": passage.title}) for passage in load_corpus()
]

llm = ChatBlockRAG(model="demo", max_tokens=24)

# Any embeddings will do. With `llm`, each document's KV states are computed as it is added.
vector_store = BlockRAGVectorStore.from_documents(documents, BlockRAGEmbeddings(encoder="lexical"), llm=llm)
retriever = vector_store.as_retriever(search_kwargs={"k": 3})

# documents_to_blocks stands where the prompt and `format_docs` would.
answers = {"context": retriever, "question": RunnablePassthrough()} | documents_to_blocks | llm

for question in ("What is the capital of Bhutan?", "What is the currency of Kenya?"):
    answer = answers.invoke(question)
    usage = answer.usage_metadata
    print(f"{question}  ->  {answer.text}")
    print(f"  {usage['input_token_details']['cache_read']} of {usage['input_tokens']} prompt tokens reused")

print("streamed: ", end="")
for piece in (answers | StrOutputParser()).stream("What is the capital of Kenya?"):
    print(piece, end="|", flush=True)
print()

# The same weights, the same prompt, without blocks: every passage is prefilled again.
full = llm.bind(documents=retriever.invoke("What is the capital of Bhutan?"), attention="full")
answer = full.invoke("What is the capital of Bhutan?")
print(f"full attention  ->  {answer.text}   ({answer.usage_metadata['input_tokens']} tokens computed)")
