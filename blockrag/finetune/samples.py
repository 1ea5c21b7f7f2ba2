"""Training lines as token ids: the blocks that all questions of a line share, and each question with its answer.

Segmentation is inference's own, `PromptTemplate`: what is trained is what will be asked. A question with its answer is
a *branch*: a final block that sees the shared blocks and itself. Nothing here knows masks, tensors or models.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from blockrag.errors import DataError, InputError
from blockrag.finetune.data.lines import BlocksLine, ChatLine, Line, RagLine

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from blockrag.prompt import Block, PromptTemplate

__all__ = ["Branch", "Ids", "Sample", "fitted", "samples_of"]

Ids = array
"""Token ids at four bytes each: a list takes ten times as much, and a training set holds a hundred million."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A question and its answer.

    Args:
        query: Token ids of the query block.
        answer: Token ids of the answer, what ends it included.
        kind: The question's kind.
    """

    query: Ids[int]
    answer: Ids[int]
    kind: str = ""

    def __len__(self) -> int:
        return len(self.query) + len(self.answer)


@dataclass(frozen=True, slots=True)
class Sample:
    """One line, tokenized.

    Args:
        blocks: Token ids of the local blocks, in prompt order; may be empty.
        branches: At least one.
        marker: First and end of the tokens that only block attention sees: in block 0, or in the query where there is
            no block.
        where: The file and the line.
    """

    blocks: tuple[Ids[int], ...]
    branches: tuple[Branch, ...]
    marker: tuple[int, int]
    where: str

    @property
    def shared_tokens(self) -> int:
        """Tokens of the blocks."""
        return sum(map(len, self.blocks))

    @property
    def num_tokens(self) -> int:
        """Tokens of the row this sample takes."""
        return self.shared_tokens + sum(map(len, self.branches))

    def without_marker(self) -> Sample:
        """The sample as full attention sees it."""
        first, end = self.marker
        if first == end:
            return self
        if not self.blocks:
            branches = tuple(replace(one, query=one.query[:first] + one.query[end:]) for one in self.branches)
            return replace(self, branches=branches, marker=(0, 0))
        opening = self.blocks[0][:first] + self.blocks[0][end:]
        # A block that held nothing else is none.
        return replace(self, blocks=((opening,) if opening else ()) + self.blocks[1:], marker=(0, 0))


def samples_of(
    line: Line, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[Sample]:
    """Tokenize one line: one sample, or one for each assistant message of a conversation.

    Args:
        line: The line.
        template: The template that inference will use.
        tokenizer: The model's tokenizer.
        where: What errors call the line.

    Raises:
        DataError: The template or the tokenizer cannot show the line; names the line.
    """
    try:
        if isinstance(line, RagLine):
            yield _rag_sample(line, template, tokenizer, where)
        elif isinstance(line, BlocksLine):
            # Their markup is their writer's: published data spells its control tokens in the strings.
            prompt = template.segment_blocks(tokenizer, line.blocks, allow_special=True)
            yield _sample(prompt.blocks, [template.answer_block(tokenizer, line.response)], where)
        else:
            yield from _chat_samples(line, template, tokenizer, where)
    except DataError:
        raise
    except InputError as error:
        raise DataError(f"{where}: {error}") from error


def fitted(samples: Iterable[Sample], max_tokens: int, window: int | None = None) -> Iterator[Sample]:
    """Samples of at most `max_tokens` tokens: branches that do not fit go to samples of their own.

    Args:
        samples: The samples.
        max_tokens: Most tokens of a row.
        window: Positions the model was made for, which a question has to share with its passages alone; None for any.

    Raises:
        DataError: A question with all its passages is longer; names the line, and what would help.
    """
    for sample in samples:
        _require_window(sample, window)
        start = 0
        while start < len(sample.branches):
            room, end = max_tokens - sample.shared_tokens, start
            while end < len(sample.branches) and len(sample.branches[end]) <= room:
                room -= len(sample.branches[end])
                end += 1
            if end == start:
                longest = sample.shared_tokens + len(sample.branches[start])
                raise DataError(
                    f"{sample.where}: {longest} tokens with {len(sample.blocks)} blocks, more than {max_tokens}; "
                    "raise --max-tokens, keep fewer passages (blockrag data rerank -k), or pass --skip-too-long"
                )
            yield replace(sample, branches=sample.branches[start:end])
            start = end


def _require_window(sample: Sample, window: int | None) -> None:
    longest = sample.shared_tokens + max(map(len, sample.branches))
    if window is not None and longest > window:
        raise DataError(
            f"{sample.where}: {longest} tokens with {len(sample.blocks)} blocks, more than the {window} positions the "
            "model was made for; keep fewer passages (blockrag data rerank -k), or pass --skip-too-long"
        )


def _rag_sample(line: RagLine, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, where: str) -> Sample:
    passages = [candidate.passage for candidate in line.passages]
    prompts = [template.segment(tokenizer, passages=passages, question=line.questions[0].question)]
    # The blocks are those of the first question; the others only bring their query.
    prompts += [template.segment(tokenizer, passages=(), question=asked.question) for asked in line.questions[1:]]
    branches = [
        Branch(
            Ids("i", prompt.blocks[-1].token_ids),
            Ids("i", template.answer_block(tokenizer, asked.target).token_ids),
            asked.kind,
        )
        for prompt, asked in zip(prompts, line.questions, strict=True)
    ]
    return replace(_sample(prompts[0].blocks, [], where), branches=tuple(branches))


def _chat_samples(
    line: ChatLine, template: PromptTemplate, tokenizer: PreTrainedTokenizerBase, where: str
) -> Iterator[Sample]:
    """One sample for each answer: what precedes its question is blocks, as published (one block per message)."""
    messages: Sequence[Mapping[str, str]] = line.messages
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if not number or messages[number - 1]["role"] != "user":
            raise DataError(f"{where}: message {number + 1} is an answer without a user message before it")
        prompt = template.segment_messages(tokenizer, messages[:number])
        yield _sample(prompt.blocks, [template.answer_block(tokenizer, message["content"])], where)


def _sample(blocks: Sequence[Block], answers: Sequence[Block], where: str) -> Sample:
    *shared, query = blocks
    first, end, *_ = blocks[0].marker
    return Sample(
        blocks=tuple(Ids("i", block.token_ids) for block in shared),
        branches=tuple(Branch(Ids("i", query.token_ids), Ids("i", answer.token_ids)) for answer in answers),
        marker=(first, end),
        where=where,
    )
