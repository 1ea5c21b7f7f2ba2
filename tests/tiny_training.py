"""Tiny checkpoints and training lines on disk, for every test that fine-tunes: two layers of width 32, a few lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tiny_models import ModelCase, tiny_model
from tiny_tokenizers import plain_tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from blockrag.finetune.data.lines import BlocksLine, Candidate, ChatLine, Line, Question, RagLine, write_lines
from blockrag.finetune.reading import read_samples
from blockrag.finetune.samples import Sample
from blockrag.passage import Passage
from blockrag.prompt import TEMPLATES, PromptTemplate

WORDS = ("river", "lake", "sea", "book", "author", "engine", "computer", "writer", "turn", "system", "question")
PREFIXED = "[Block-Attention]"


def save_tiny(directory: Path, *, seed: int = 0, tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """A llama of two layers and width 32 with random weights, as a directory; GQA, tied to a tokenizer of 512."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.3,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(directory)
    (tokenizer or plain_tokenizer()).save_pretrained(directory)
    return directory


def save_family(directory: Path, case: ModelCase) -> Path:
    """A tiny model of a family, as a directory."""
    tiny_model(case).save_pretrained(directory)
    plain_tokenizer().save_pretrained(directory)
    return directory


def rag_line(number: int, *, passages: int = 2, questions: int = 2) -> RagLine:
    """A line of its own for every number: passages and answers of different lengths."""

    def word(at: int) -> str:
        return WORDS[(number * 5 + at) % len(WORDS)]

    return RagLine(
        passages=tuple(
            Candidate(
                Passage(id=str(at), title=f"The {word(at)}", text=f"It has {number} of {word(at + 1)} " * (1 + at % 2))
            )
            for at in range(passages)
        ),
        questions=tuple(
            Question(
                f"Which {word(at)} is it?", (" ".join([word(at + 2)] * (1 + (number + at) % 3)),), kind=f"k{at % 2}"
            )
            for at in range(questions)
        ),
    )


def rag_lines(count: int, *, passages: int = 2, questions: int = 2) -> list[Line]:
    """`rag_line` for the first numbers."""
    return [rag_line(number, passages=passages, questions=questions) for number in range(count)]


def every_kind() -> list[Line]:
    """One line of each kind, and the corners: without passages, a lone query, a block that is the marker alone."""
    return [
        rag_line(1, passages=3, questions=3),
        rag_line(2, passages=0, questions=1),
        BlocksLine(("You answer.\n", "- Title: Sea\nThe sea.\n", "Which sea?\n"), "the sea"),
        BlocksLine(("Which sea?\n",), "this one"),
        BlocksLine(("", "The sea.\n", "Which sea?\n"), "this one"),
        ChatLine(
            (
                {"role": "system", "content": "You answer."},
                {"role": "user", "content": "Who wrote it?"},
                {"role": "assistant", "content": "The author."},
                {"role": "user", "content": "When?"},
                {"role": "assistant", "content": "In 1843."},
            )
        ),
        ChatLine(({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "A question."})),
    ]


def samples_from(
    directory: Path, lines: Iterable[Line], tokenizer: PreTrainedTokenizerBase, template: PromptTemplate | None = None
) -> list[Sample]:
    """Lines through a file, as training reads them."""
    path = directory / "lines.jsonl"
    write_lines(path, lines)
    return read_samples([path], template or TEMPLATES["plain"], tokenizer, 4096, "error")[0]


def write_data(path: Path, lines: Sequence[Line]) -> Path:
    """A data file; returns its path."""
    write_lines(path, lines)
    return path
