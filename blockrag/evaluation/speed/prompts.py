"""Prompts to measure with: passages of random tokens and a query.

A shorter prompt begins with the passages of a longer one, so that several lengths share most of their blocks and only
the longest has to be computed in full.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from blockrag.errors import InputError
from blockrag.prompt import Block, SegmentedPrompt

if TYPE_CHECKING:
    from blockrag.model.block_model import BlockModel

__all__ = ["PromptSettings", "cut", "random_blocks", "random_prompt"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSettings:
    """What the prompts of a benchmark look like.

    Args:
        query_tokens: Tokens of the query block, at least one.
        block_tokens: Least and most tokens of a passage; see `cut`.
        seed: Of lengths and tokens.

    Raises:
        InputError: There is no query, or passages of every length cannot be cut.
    """

    query_tokens: int = 50
    block_tokens: tuple[int, int] = (128, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        least, most = self.block_tokens
        if self.query_tokens < 1 or least < 1:
            raise InputError(
                f"query tokens {self.query_tokens} and block tokens {least},{most} must be at least 1; pass larger ones"
            )
        if most < 2 * least:
            raise InputError(f"block tokens {least},{most}: the most must be at least twice the least")


def random_prompt(model: BlockModel, num_tokens: int, settings: PromptSettings) -> SegmentedPrompt:
    """Passages of random tokens and a query, `num_tokens` tokens together; only the query if nothing else fits.

    Args:
        model: Its ordinary tokens are used, not its control tokens.
        num_tokens: Tokens of the whole prompt, at least those of the query.
        settings: What it looks like.

    Raises:
        InputError: The prompt is shorter than its query.
    """
    passages = num_tokens - settings.query_tokens
    if passages < 0:
        raise InputError(
            f"a prompt of {num_tokens} tokens leaves no place for a query of {settings.query_tokens}; "
            "pass greater lengths or a shorter query"
        )
    lengths = cut(passages, *settings.block_tokens, random.Random(settings.seed)) if passages else []
    [query] = random_blocks(model, [settings.query_tokens], seed=settings.seed, local=False)
    return SegmentedPrompt(blocks=(*random_blocks(model, lengths, seed=settings.seed), query))


def random_blocks(model: BlockModel, lengths: Sequence[int], *, seed: int, local: bool = True) -> list[Block]:
    """Blocks of random tokens; a block's tokens depend on its number alone, and a shorter one begins alike.

    Args:
        model: Its ordinary tokens are used, not its control tokens.
        lengths: Tokens of each block.
        seed: Of the tokens.
        local: Passages, or queries.
    """
    control = {*model.tokenizer.all_special_ids, *model.stop_ids}
    vocabulary = model.model.config.get_text_config(decoder=True).vocab_size
    tokens = [token for token in range(vocabulary) if token not in control]
    kind = "passage" if local else "query"
    return [
        Block(
            token_ids=tuple(random.Random(f"{seed} {kind} {number}").choices(tokens, k=length)),
            text="",
            local=local,
            kind="passage" if local else "query",
        )
        for number, length in enumerate(lengths)
    ]


def cut(total: int, least: int, most: int, generator: random.Random) -> list[int]:
    """`total` as a sum of random lengths between `least` and `most`; a total below `least` is one length.

    Args:
        total: At least 1.
        least: At least 1.
        most: At least twice `least`, so that every total from `least` on can be cut.
        generator: Where the lengths come from.

    Raises:
        ValueError: One of the numbers is too small.
    """
    if total < 1 or least < 1 or most < 2 * least:
        raise ValueError(f"cannot cut {total} tokens into blocks of {least} to {most}; most must be 2 x least or more")
    lengths = []
    while total > most:
        # What is left must still make a block.
        lengths.append(generator.randint(least, min(most, total - least)))
        total -= lengths[-1]
    return [*lengths, total]
