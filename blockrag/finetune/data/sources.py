"""The data sets that can be read, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from types import MappingProxyType
from typing import TypeAlias

from blockrag.finetune.data.chat import read_chat
from blockrag.finetune.data.lines import Line
from blockrag.finetune.data.multihop import read_multihop
from blockrag.finetune.data.retrieved import read_retrieved
from blockrag.finetune.data.squad import read_squad

__all__ = ["SOURCES", "Reader"]

Reader: TypeAlias = Callable[..., Iterator[Line]]
"""Takes a path and `left_out`, and what options its data set has."""

SOURCES: Mapping[str, Reader] = MappingProxyType(
    {
        "2wiki": read_multihop,
        # Its sentences bring the space between them along; where there is none, as in ".ldt", none belongs.
        "hotpotqa": partial(read_multihop, sentence_separator=""),
        "musique": read_multihop,
        "nq": read_retrieved,
        "triviaqa": read_retrieved,
        "squad": read_squad,
        "chat": read_chat,
    }
)
"""Readers by data set."""
