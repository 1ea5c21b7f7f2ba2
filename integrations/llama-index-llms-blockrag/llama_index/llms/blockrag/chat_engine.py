"""`BlockContextChatEngine`: LlamaIndex's context chat engine, with passages that stay whole."""

from __future__ import annotations

from llama_index.core.base.llms.types import ChatMessage, MessageRole
from llama_index.core.chat_engine import ContextChatEngine
from llama_index.core.chat_engine.utils import get_prefix_messages_with_context
from llama_index.core.prompts import ChatPromptTemplate
from llama_index.llms.blockrag.synthesizer import BlockSynthesizer

__all__ = ["BlockContextChatEngine"]


class BlockContextChatEngine(ContextChatEngine):
    """`ContextChatEngine` whose answers come from a `BlockSynthesizer`: one call, whole passages.

    Made as the stock one is: `BlockContextChatEngine.from_defaults(retriever=index.as_retriever(), llm=llm)`. The
    prompt says the same: passages and system prompt, the conversation so far, the question.
    """

    # Stock code calls nothing of its synthesizer but synthesize() and asynthesize().
    def _get_response_synthesizer(  # type: ignore[override]
        self, chat_history: list[ChatMessage], streaming: bool = False
    ) -> BlockSynthesizer:
        prefix = list(self._prefix_messages)
        leads = bool(prefix) and prefix[0].role == MessageRole.SYSTEM
        system_prompt = str(prefix.pop(0).content) if leads else ""
        messages = get_prefix_messages_with_context(
            self._context_template, system_prompt, prefix, chat_history, self._llm.metadata.system_role
        )
        template = ChatPromptTemplate.from_messages(
            messages, function_mappings=self._context_template.function_mappings
        )
        return BlockSynthesizer(
            self._llm, text_qa_template=template, streaming=streaming, callback_manager=self.callback_manager
        )
