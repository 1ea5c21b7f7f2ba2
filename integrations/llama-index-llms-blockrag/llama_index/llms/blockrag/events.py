"""`BlockCacheEvent`: what one call to the language model found in its block store, for instrumentation handlers."""

from __future__ import annotations

from llama_index.core.instrumentation.events import BaseEvent

__all__ = ["BlockCacheEvent"]


class BlockCacheEvent(BaseEvent):
    """Work saved and done by one answer; sent when the answer is complete.

    Args:
        blocks_reused: Blocks whose KV states came from the store.
        blocks_computed: Blocks that went through the model: missing ones, and the question.
        tokens_reused: Tokens of the former.
        tokens_computed: Tokens of the latter.
        passages_found: Passages of the prompt that are blocks of their own.
        passages_missed: Passages in the prompt that are no blocks: split, rewritten, or quoted by the question.
        ttft_s: Seconds from the start of the prompt to its first token.
    """

    blocks_reused: int
    blocks_computed: int
    tokens_reused: int
    tokens_computed: int
    passages_found: int
    passages_missed: int
    ttft_s: float

    @classmethod
    def class_name(cls) -> str:
        """The event's name."""
        return "BlockCacheEvent"
