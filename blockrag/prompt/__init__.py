"""From passages, messages and questions to blocks of token ids.

Structure travels as data from here on: a `SegmentedPrompt` holds the blocks that were tokenized, each on its own, and
nothing is ever tokenized again or recovered by parsing a prompt string. What is kept where:

    segment.py    Block, SegmentedPrompt: the values
    encode.py     text and markup to token ids; content can never become a control token
    splitter.py   free text and demonstration prompts to pieces of text
    template.py   PromptTemplate: what a model's prompts look like
    registry.py   the named templates
    derive.py     a template from a tokenizer's chat template
    reader.py     the one reader of prompts that exist only as a single string

Nothing here imports a modelling or tokenizer library: a tokenizer is an argument.
"""

from __future__ import annotations

from blockrag.prompt.derive import template_for
from blockrag.prompt.reader import parse_rag_prompt
from blockrag.prompt.registry import TEMPLATES
from blockrag.prompt.segment import Block, SegmentedPrompt
from blockrag.prompt.splitter import (
    merge_pieces,
    split_bbh_prompt,
    split_by_delimiter,
    split_drop_prompt,
    split_turn_demonstrations,
)
from blockrag.prompt.template import PromptTemplate, Turn

__all__ = [
    "TEMPLATES",
    "Block",
    "PromptTemplate",
    "SegmentedPrompt",
    "Turn",
    "merge_pieces",
    "parse_rag_prompt",
    "split_bbh_prompt",
    "split_by_delimiter",
    "split_drop_prompt",
    "split_turn_demonstrations",
    "template_for",
]
