"""What one answer cost: counted work and measured time, split by step. Plain values, no behavior beyond sums."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["GenerationTimings", "Usage"]


@dataclass(slots=True)
class Usage:
    """Work counted while one prompt ran.

    `tokens_reused` came from the store and were not computed; `tokens_computed` went through the model before the
    first token of the answer (missing blocks and global blocks). `blocks_kept` and `tokens_kept`, among those reused,
    were still in place from an earlier prompt that opened with the same blocks: neither read nor composed.
    `blocks_damaged` are stored copies that failed verification; they are among `blocks_computed`. `blocks_missing` are
    passages that were not stored or damaged where such a prompt is answered in full attention (`on_miss="full"`): if
    there are any, this one was. `store_failures` are reads and writes of blocks that an error of the store prevented.
    """

    blocks_reused: int = 0
    blocks_computed: int = 0
    blocks_kept: int = 0
    blocks_damaged: int = 0
    blocks_missing: int = 0
    store_failures: int = 0
    tokens_reused: int = 0
    tokens_kept: int = 0
    tokens_computed: int = 0
    new_tokens: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.tokens_reused + self.tokens_computed

    def as_openai(self) -> dict[str, object]:
        """The counts under the names of the OpenAI API: what was reused counts as cached.

        Source: https://platform.openai.com/docs/api-reference/chat/object (usage).
        """
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.new_tokens,
            "total_tokens": self.prompt_tokens + self.new_tokens,
            "prompt_tokens_details": {"cached_tokens": self.tokens_reused},
        }

    def charge(self, blocks: int, tokens: int) -> None:
        """Count some blocks as computed that were found only because the same request had just computed them."""
        if blocks <= self.blocks_reused - self.blocks_kept:
            self.blocks_reused -= blocks
            self.tokens_reused -= tokens
            self.blocks_computed += blocks
            self.tokens_computed += tokens


@dataclass(slots=True)
class GenerationTimings:
    """Wall-clock seconds of one prompt.

    `load_s` is reading stored blocks, `check_s` verifying them, `compose_s` placing and rotating them (each a share of
    the time that passed, where several threads do all three at once), `block_prefill_s` computing and storing missing
    ones, `query_prefill_s` the forward of the global blocks. `ttft_s` runs from the request to the first token and is
    more than their sum; `decode_s` is everything after it.

    In a batch every prompt has its own: `ttft_s` begins when its turn to be composed comes, after the missing blocks of
    all prompts were computed, and ends with its own first token; `decode_s` contains the steps of the others.
    """

    load_s: float = 0.0
    check_s: float = 0.0
    compose_s: float = 0.0
    block_prefill_s: float = 0.0
    query_prefill_s: float = 0.0
    ttft_s: float = 0.0
    decode_s: float = 0.0
