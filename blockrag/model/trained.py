"""Whether prompts stay within what a checkpoint was block-fine-tuned on; said once, when the first does not."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from blockrag.model.facts import BlockAttentionFacts

__all__ = ["BeyondTrainingWarning", "TrainedRange"]


class BeyondTrainingWarning(UserWarning):
    """A prompt has more blocks or tokens than the model was block-fine-tuned on, so its answer may be worse."""


class TrainedRange:
    """The range of one model, and what has been said about it.

    Args:
        facts: What the checkpoint says of its block fine-tuning.
        name: What to call the model.
    """

    def __init__(self, facts: BlockAttentionFacts, name: str) -> None:
        self._limits = {"blocks": facts.max_blocks, "tokens": facts.max_tokens}
        self._name = name
        self._said: set[str] = set()

    def check(self, *, blocks: int, tokens: int) -> None:
        """Check a prompt that is composed of blocks.

        Args:
            blocks: Its local blocks.
            tokens: Its tokens.

        Warns:
            BeyondTrainingWarning: It has more of either than training had; once for each.
        """
        for what, count in (("blocks", blocks), ("tokens", tokens)):
            most = self._limits[what]
            if most is None or count <= most or what in self._said:
                continue
            self._said.add(what)
            warnings.warn(
                f"this prompt has {count} {what}; {self._name} was block-fine-tuned on at most {most}, and beyond "
                "that nobody knows how well it answers: use fewer or shorter passages, or fine-tune on longer prompts",
                BeyondTrainingWarning,
                stacklevel=2,
            )
