"""One answer in progress: which token comes next, what text it makes, and where the answer ends.

Runs no model and knows no cache: whoever does gives it logits, so that answers of one prompt and of a batch of prompts
are decided by the same code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from blockrag.model.detokenize import TextStream
from blockrag.model.sampling import GenerationOptions, Sampler

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from transformers import PreTrainedTokenizerBase

    from blockrag.model.usage import GenerationTimings, Usage

__all__ = ["Chunk", "FinishReason", "Generation", "OngoingAnswer"]

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of an answer: the text that became certain with `token_id` (possibly none); one chunk per token."""

    text: str
    token_id: int


@dataclass(frozen=True, slots=True)
class Generation:
    """A finished answer.

    Args:
        text: The answer, without stop strings.
        token_ids: All tokens generated, the final end-of-sequence token included.
        finish_reason: "stop" (end of sequence or a stop string) or "length".
        usage: Counted work.
        timings: Measured seconds.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    timings: GenerationTimings


class OngoingAnswer:
    """Chooses the tokens of one answer.

    Args:
        options: How to generate.
        stop: The prompt's stop strings, besides the options' own.
        stop_ids: Tokens that end the answer, unless the options ignore them.
        budget: Tokens the answer may have at most.
        tokenizer: The model's tokenizer.
        device: Where the logits are.
    """

    def __init__(
        self,
        options: GenerationOptions,
        stop: Sequence[str],
        *,
        stop_ids: frozenset[int],
        budget: int,
        tokenizer: PreTrainedTokenizerBase,
        device: torch.device,
    ) -> None:
        self._sampler = Sampler(options, device)
        self._stream = TextStream(tokenizer, (*stop, *options.stop))
        self._stop_ids = frozenset() if options.ignore_eos else stop_ids
        self._budget = budget
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return self._stream.text

    @property
    def tokens_hidden(self) -> int:
        """Tokens at the end that belong to a stop string."""
        return self._stream.tokens_hidden if self._stream.stopped else 0

    def choose(self, logits: torch.Tensor, said: list[int]) -> Chunk | None:
        """Choose the next token; with the last one, `finish_reason` is set.

        Args:
            logits: Those after the last token, shape (vocabulary,).
            said: Prompt and answer so far; the token is appended unless it is an end-of-sequence token, which is not
                kept because the next turn's markup closes this one.

        Returns:
            The chunk, or None for an end-of-sequence token without text.
        """
        token = self._sampler.choose(logits, said)
        self.token_ids.append(token)
        if token in self._stop_ids:
            self.finish_reason = "stop"
            rest = self._stream.finish()
            return Chunk(rest, token) if rest else None
        said.append(token)
        text = self._stream.push(token)
        if self._stream.stopped or len(self.token_ids) >= self._budget:
            # The last token may complete a stop string and begin a character that never came.
            text += self._stream.finish()
            self.finish_reason = "stop" if self._stream.stopped else "length"
        return Chunk(text, token)
