"""From tokens to text as they arrive: whole characters only, nothing of a stop string.

A token may end in the middle of a character, and a stop string may be spread over several tokens; text is held back
exactly as long as either may still be the case.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["TextStream"]


class TextStream:
    """Turns one answer's tokens into text.

    Args:
        tokenizer: The model's tokenizer.
        stop: Strings that end the text and are not part of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._stop = [s for s in stop if s]
        self._ids: list[int] = []
        # Tokens before `_start` are spelled out; from `_start` on they are decoded together, because a token's
        # text may depend on its neighbour's (leading spaces, characters of several tokens).
        self._start = self._read = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Add a token; returns the text that became certain with it."""
        self._ids.append(token_id)
        known = self._decode(self._ids[self._start : self._read])
        text = self._decode(self._ids[self._start :])
        if text.endswith("\ufffd") or len(text) <= len(known):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._emit(self._held + text[len(known) :], final=False)

    def finish(self) -> str:
        """No more tokens: returns the text still held back."""
        if self.stopped:
            return ""
        known = self._decode(self._ids[self._start : self._read])
        rest = self._decode(self._ids[self._start :])[len(known) :]
        return self._emit(self._held + rest, final=True)

    @property
    def tokens_hidden(self) -> int:
        """Tokens at the end that `text` does not need: those of a stop string."""
        needed = len(self._ids)
        while needed and len(self._decode(self._ids[: needed - 1])) >= len(self.text):
            needed -= 1
        return len(self._ids) - needed

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _emit(self, text: str, *, final: bool) -> str:
        cuts = [position for position in (text.find(s) for s in self._stop) if position >= 0]
        if cuts:
            self.stopped = True
            text, self._held = text[: min(cuts)], ""
        else:
            held = 0 if final else self._undecided(text)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that a stop string begins with."""
        longest = max((len(s) for s in self._stop), default=1) - 1
        for length in range(min(longest, len(text)), 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0
