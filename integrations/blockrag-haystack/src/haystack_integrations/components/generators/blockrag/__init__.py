"""The chat generator that composes its prompts from stored blocks."""

from haystack_integrations.components.generators.blockrag.chat_generator import BlockRAGChatGenerator

__all__ = ["BlockRAGChatGenerator"]
