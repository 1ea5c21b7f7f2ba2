"""A conversation over documents: passages that were shown in one turn cost nothing in the next.

Runs offline in seconds with the small demo model. Needs:  pip install llama-index-llms-blockrag
Run:  python examples/llama_index_chat_engine.py
"""

import asyncio

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.llms.blockrag import BlockContextChatEngine, BlockRAGLLM, LexicalEmbedding

from blockrag.demo import load_corpus

llm = BlockRAGLLM(model_name="demo", prompt_form="rag", max_new_tokens=24)
Settings.llm = llm
Settings.embed_model = LexicalEmbedding()
Settings.tokenizer = llm.tokenizer.encode

documents = [Document(text=p.text, metadata={"title": p.title}, id_=p.id) for p in load_corpus()]
index = VectorStoreIndex.from_documents(documents)

# The stock engine keeps its passages as blocks, with no change to it.
chat_engine = index.as_chat_engine(chat_mode="context", similarity_top_k=3)
for question in ("What is the capital of Bhutan?", "What is the capital of Kenya?"):
    print(f"{question}  ->  {chat_engine.chat(question)}")
print(f"passages of the stock engine: {llm.tracking_counts}")


async def main() -> None:
    """Two users at once, streamed, on an engine that never splits a passage."""

    async def talk(question: str) -> str:
        engine = BlockContextChatEngine.from_defaults(index.as_retriever(similarity_top_k=3), llm=llm)
        response = await engine.astream_chat(question)
        return "".join([token async for token in response.async_response_gen()])

    questions = ("What is the capital of Bhutan?", "What is the currency of Kenya?")
    for question, answer in zip(questions, await asyncio.gather(*map(talk, questions)), strict=True):
        print(f"{question}  ->  {answer}")
    usage = (await llm.acomplete("What is the capital of Bhutan?")).raw["usage"]
    print(f"usage of a single call: {usage}")


asyncio.run(main())
