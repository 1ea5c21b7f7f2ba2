"""What a checkpoint says about itself beside its weights: whether, and how, it was fine-tuned for block attention.

Kept as `block_attention.json` in the model's directory, where plain transformers ignores it. A model without the file
works, but nobody knows whether it was trained for block attention; one that was not loses much of its accuracy
(arXiv 2409.15355, table 1: 71.3 to 50.0 averaged over four question-answering sets).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blockrag.errors import InputError, PromptError
from blockrag.prompt import PromptTemplate

__all__ = ["FACTS_FILE", "BlockAttentionFacts", "NotBlockFineTunedWarning", "load_facts", "save_facts"]

FACTS_FILE = "block_attention.json"
_FORMAT = 1


class NotBlockFineTunedWarning(UserWarning):
    """The model is not known to be fine-tuned for block attention, so answers may be much worse than its usual."""


@dataclass(frozen=True, slots=True)
class BlockAttentionFacts:
    """A checkpoint's block-attention facts.

    Args:
        block_fine_tuned: Whether it was fine-tuned for block attention; None when nobody said.
        template: The prompt template it was trained with.
        max_blocks: Most local blocks per prompt seen in training; None when unknown.
        max_tokens: Longest prompt seen in training, in tokens; None when unknown.
    """

    block_fine_tuned: bool | None = None
    template: PromptTemplate | None = None
    max_blocks: int | None = None
    max_tokens: int | None = None


def load_facts(path: Path) -> BlockAttentionFacts:
    """Read a `block_attention.json`.

    Raises:
        InputError: The file is not what `save_facts` writes.
    """
    try:
        raw: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if raw.pop("format") != _FORMAT:
            raise InputError(f"{path.name} has another format than {_FORMAT}; update blockrag to read it")
        template = raw.pop("template", None)
        facts = BlockAttentionFacts(
            template=None if template is None else PromptTemplate.from_dict(template),
            **raw,
        )
    except PromptError as error:
        raise InputError(f"{path}: {error}") from error
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not a valid {FACTS_FILE} ({error}); delete it or save the model again") from error
    # A string such as "no" would count as true.
    counts = (facts.max_blocks, facts.max_tokens)
    if not isinstance(facts.block_fine_tuned, bool | None) or not all(
        type(count) in (int, type(None)) for count in counts
    ):
        raise InputError(f"{path} holds a value of the wrong type in {raw}; delete it or save the model again")
    return facts


def save_facts(facts: BlockAttentionFacts, directory: Path) -> Path:
    """Write the facts beside a model's weights; returns the file's path."""
    content: Mapping[str, object] = {
        "format": _FORMAT,
        "block_fine_tuned": facts.block_fine_tuned,
        "max_blocks": facts.max_blocks,
        "max_tokens": facts.max_tokens,
        "template": None if facts.template is None else facts.template.to_dict(),
    }
    path = directory / FACTS_FILE
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
    return path
