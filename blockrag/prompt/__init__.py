"""From passages, messages and questions to blocks of token ids.

Structure travels as data from here on: a `SegmentedPrompt` holds the blocks that were tokenized, each on its own, and
nothing is ever tokenized again or recovered by parsing a prompt string. What is kept where:

    segment.py    Block, SegmentedPrompt: the values
    encode.py     text and markup to token ids; content can never become a control token
    splitter.py   free text and demonstration prompts to pieces of text
    template.py   PromptTemplate: what a model's prompts look like
    message.py    Message, Excerpt: a conversation that says which of its text is a passage
    chat.py       conversations to blocks, in the chat form or the RAG form
    locate.py     passages found again in a text they were pasted into
    tools.py      functions a model may call: offering them, reading its calls
    registry.py   the named templates
    derive.py     a template from a tokenizer's chat template
    reader.py     the one reader of prompts that exist only as a single string

Nothing here imports a modelling or tokenizer library: a tokenizer is an argument.
"""

from __future__ import annotations

from blockrag.prompt.chat import excerpt_blocks, fits_rag, segment_chat, segment_rag
from blockrag.prompt.derive import template_for
from blockrag.prompt.locate import cut_excerpts
from blockrag.prompt.message import Excerpt, Message, Part, ToolCall
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
from blockrag.prompt.tools import parse_tool_calls, supports_tools

__all__ = [
    "TEMPLATES",
    "Block",
    "Excerpt",
    "Message",
    "Part",
    "PromptTemplate",
    "SegmentedPrompt",
    "ToolCall",
    "Turn",
    "cut_excerpts",
    "excerpt_blocks",
    "fits_rag",
    "merge_pieces",
    "parse_rag_prompt",
    "parse_tool_calls",
    "segment_chat",
    "segment_rag",
    "split_bbh_prompt",
    "split_by_delimiter",
    "split_drop_prompt",
    "split_turn_demonstrations",
    "supports_tools",
    "template_for",
]
