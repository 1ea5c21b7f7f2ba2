"""A stock LlamaIndex query engine; the one line that differs is the language model.

Runs offline in seconds with the small demo model. Needs:  pip install llama-index-llms-blockrag
Run:  python examples/llama_index_query_engine.py
"""

from typing import Any

from llama_index.core import Document, Settings, VectorStoreIndex
from llama_index.core.instrumentation import get_dispatcher
from llama_index.core.instrumentation.event_handlers import BaseEventHandler
from llama_index.core.instrumentation.events import BaseEvent
from llama_index.llms.blockrag import BlockCacheEvent, BlockRAGLLM, LexicalEmbedding

from blockrag.demo import load_corpus


class PrintReuse(BaseEventHandler):
    """Prints what every call to the language model found in the block store."""

    @classmethod
    def class_name(cls) -> str:
        """The handler's name."""
        return "PrintReuse"

    def handle(self, event: BaseEvent, **kwargs: Any) -> None:
        """Print one line per answer."""
        if isinstance(event, BlockCacheEvent):
            print(
                f"  {event.passages_found} passages found; {event.blocks_reused} blocks ({event.tokens_reused} tokens) "
                f"reused, {event.blocks_computed} ({event.tokens_computed} tokens) computed"
            )


get_dispatcher().add_event_handler(PrintReuse())

llm = BlockRAGLLM(model_name="demo", prompt_form="rag", max_new_tokens=24)  # the changed line
Settings.llm = llm
Settings.embed_model = LexicalEmbedding()  # any embedding model
Settings.tokenizer = llm.tokenizer.encode  # else LlamaIndex counts tokens with another one

documents = [Document(text=p.text, metadata={"title": p.title}, id_=p.id) for p in load_corpus()]
index = VectorStoreIndex.from_documents(documents)
query_engine = index.as_query_engine(similarity_top_k=4)

for question in ("What is the capital of Bhutan?", "What is the currency of Kenya?", "What is the capital of Bhutan?"):
    print(question)
    print(f"  {query_engine.query(question)}")

print("\nAnother response mode, streamed:")
streaming_engine = index.as_query_engine(similarity_top_k=4, response_mode="tree_summarize", streaming=True)
print(" ", "".join(streaming_engine.query("What is the capital of Kenya?").response_gen))
