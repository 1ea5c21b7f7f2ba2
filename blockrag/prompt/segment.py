"""`Block` and `SegmentedPrompt`: a prompt as the model will see it, cut into independently attended runs of tokens.

The last block is the query block: it sees everything before it. A local block sees only itself, which is what lets
its KV states be computed once and reused (arXiv 2409.15355, section 2). Nothing here knows templates or tokenizers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from blockrag.errors import PromptError

__all__ = ["Block", "BlockKind", "SegmentedPrompt"]

BlockKind = Literal["prefix", "passage", "separator", "turn", "query", "answer"]


@dataclass(frozen=True, slots=True)
class Block:
    """One run of tokens, tokenized on its own.

    Args:
        token_ids: Its token ids.
        text: Exactly what was tokenized, markup included.
        local: True: its tokens attend only to this block. False: they see everything before it as well.
        kind: What it is, for reports: the prefix, a passage (or demonstration, or piece of text), what separates two
            passages, a turn, the query, an answer.
        source: Id of the passage it shows, empty if it shows none.
        marker: The first and the end of the tokens, and of the characters of `text`, that tell the model that blocks
            follow; all 0 without such a marker. Full attention leaves them out.
    """

    token_ids: tuple[int, ...]
    text: str
    local: bool
    kind: BlockKind
    source: str = ""
    marker: tuple[int, int, int, int] = (0, 0, 0, 0)

    def as_global(self) -> Block:
        """The block under full attention: global, and without the marker that blocks follow."""
        first, end, first_character, end_character = self.marker
        return Block(
            token_ids=self.token_ids[:first] + self.token_ids[end:],
            text=self.text[:first_character] + self.text[end_character:],
            local=False,
            kind=self.kind,
            source=self.source,
        )

    def __len__(self) -> int:
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class SegmentedPrompt:
    """A prompt as blocks; local blocks without tokens are dropped on construction.

    Args:
        blocks: At least one; the last one is global and holds at least one token.
        stop: Strings that end the answer, besides the model's own end-of-sequence tokens.

    Raises:
        PromptError: There is no block, or the last one is local or empty.
    """

    blocks: tuple[Block, ...]
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.blocks:
            raise PromptError("a prompt needs at least one block, the query block; got none")
        last = self.blocks[-1]
        if last.local or not last.token_ids:
            state = "local" if last.local else "without tokens"
            raise PromptError(
                f"the last block of {len(self.blocks)} is {state} (text {last.text[:40]!r}); "
                "end the prompt with a global query block that holds at least one token"
            )
        kept = tuple(block for block in self.blocks if block.token_ids or not block.local)
        object.__setattr__(self, "blocks", kept)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each block."""
        return tuple(len(block.token_ids) for block in self.blocks)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """All token ids in prompt order."""
        return tuple(token for block in self.blocks for token in block.token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of the whole prompt."""
        return sum(len(block.token_ids) for block in self.blocks)

    @property
    def local_blocks(self) -> tuple[Block, ...]:
        """The blocks whose KV states depend on nothing but their own tokens, in prompt order."""
        return tuple(block for block in self.blocks if block.local)

    @property
    def text(self) -> str:
        """What was tokenized, joined; tokenizing this string again may give other ids at the block boundaries."""
        return "".join(block.text for block in self.blocks)

    def as_full(self) -> SegmentedPrompt:
        """The same prompt under full attention: one global block, without the marker that blocks follow."""
        seen = SegmentedPrompt(blocks=tuple(block.as_global() for block in self.blocks), stop=self.stop)
        block = Block(token_ids=seen.token_ids, text=seen.text, local=False, kind="query")
        return SegmentedPrompt(blocks=(block,), stop=self.stop)
