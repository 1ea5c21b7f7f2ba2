"""The writer that computes documents' KV states ahead of the question."""

from haystack_integrations.components.writers.blockrag.kv_writer import BlockKVWriter

__all__ = ["BlockKVWriter"]
