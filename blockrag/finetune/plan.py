"""What a run would be, without training: rows, tokens, steps, and the memory it takes by arithmetic.

The model is built without its weights, so that an 8B model is planned for on a laptop.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from blockrag.finetune.adapters import with_adapters
from blockrag.finetune.facts import training_template
from blockrag.finetune.placing import train_dtype
from blockrag.finetune.reading import TooLong, read_samples, rows_of
from blockrag.finetune.rows import Rows
from blockrag.finetune.settings import FinetuneSettings
from blockrag.finetune.steps import steps_of
from blockrag.model.loading import load_tokenizer, load_without_weights, resolve_device
from blockrag.model.profile import positions_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from blockrag.prompt import PromptTemplate

__all__ = ["Memory", "Plan", "plan"]


@dataclass(frozen=True, slots=True)
class Memory:
    """What the largest row takes on one device that holds everything, in bytes; an estimate.

    The first three are known; activations are a count of what the layers of a Llama keep for the backward pass, within
    a quarter of what was measured for Llama and Qwen3. The workspace of kernels and fragmentation are not in it.

    Args:
        weights: All weights, and their copies in bfloat16 where that is computed in.
        gradients: Of the weights that are trained.
        optimizer: AdamW's two moments of them.
        activations: What is kept for the backward pass, of the longest row.
        logits: Logits, their copy in float32, and the gradients of both, of the row with the most tokens that count.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits


@dataclass(frozen=True, slots=True)
class Plan:
    """What `finetune` would do.

    Args:
        samples: Samples.
        questions: Questions, or answers of conversations, in them.
        skipped: Lines that had something left out for being too long.
        rows: Rows, over both attentions.
        tokens: Tokens of all rows.
        tokens_apart: What they would be with a row for every question, its passages repeated.
        longest_row: Tokens of the longest row.
        max_blocks: Most local blocks of a sample.
        max_positions: Most positions of a sample.
        steps: Optimizer steps.
        rows_per_step: Rows of one.
        parameters: Parameters of the model.
        trained: Parameters that are trained.
        memory: See `Memory`.
    """

    samples: int
    questions: int
    skipped: int
    rows: int
    tokens: int
    tokens_apart: int
    longest_row: int
    max_blocks: int
    max_positions: int
    steps: int
    rows_per_step: int
    parameters: int
    trained: int
    memory: Memory

    @property
    def saving(self) -> float:
        """How many times fewer tokens there are for questions that share their passages."""
        return self.tokens_apart / self.tokens


def plan(
    model: str | Path,
    data: Sequence[str | Path],
    settings: FinetuneSettings,
    *,
    template: PromptTemplate | None = None,
    too_long: TooLong = "error",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    processes: int = 1,
) -> Plan:
    """Read the data as `finetune` would, and count.

    Args:
        model: See `finetune`, as all that is not explained here.
        data: Files.
        settings: The numbers.
        template: How prompts are built.
        too_long: Whether a sample beyond `settings.max_tokens` is an error or left out.
        device: Where it would run.
        dtype: Of the weights.
        processes: How many there would be.

    Raises:
        DataError: A line cannot be used.
        InputError: The model does not exist, or holds no causal language model.
        MissingDependencyError: peft is not installed, and adapters are to be trained.
    """
    tokenizer, known = load_tokenizer(model)
    shown = training_template(template, known, tokenizer, settings)
    empty = load_without_weights(model)
    window = positions_of(empty)
    samples, skipped = read_samples(data, shown, tokenizer, settings.max_tokens, too_long, window=window)
    rows = rows_of(samples, settings)
    lengths = rows.lengths()
    blocks, positions = rows.longest()
    chosen = train_dtype(dtype, resolve_device(device), settings)
    held = chosen if isinstance(chosen, torch.dtype) else empty.config.dtype or torch.float32
    parameters = sum(weight.numel() for weight in empty.parameters())
    trained = with_adapters(empty, settings) if settings.lora_rank else empty
    trainable = sum(weight.numel() for weight in trained.parameters() if weight.requires_grad)
    return Plan(
        samples=len(samples),
        questions=sum(len(sample.branches) for sample in samples),
        skipped=skipped,
        rows=len(rows),
        tokens=sum(lengths),
        tokens_apart=sum(
            item.sample.shared_tokens + len(branch)
            for at in range(len(rows))
            for item in rows[at]
            for branch in item.sample.branches
        ),
        longest_row=max(lengths),
        max_blocks=blocks,
        max_positions=positions,
        steps=steps_of(settings, len(rows), processes),
        rows_per_step=settings.batch_rows * settings.accumulate * processes,
        parameters=parameters,
        trained=trainable,
        memory=_memory(empty.config.get_text_config(), settings, rows, max(lengths), held, parameters, trainable),
    )


def _memory(
    config: PretrainedConfig,
    settings: FinetuneSettings,
    rows: Rows,
    longest: int,
    held: torch.dtype,
    parameters: int,
    trained: int,
) -> Memory:
    # peft keeps adapters in float32 over weights of 16 bits.
    trained_bytes = trained * (4 if settings.lora_rank else held.itemsize)
    frozen_bytes = (parameters if settings.lora_rank else 0) * held.itemsize
    mixed = settings.bf16 and held == torch.float32
    # Autocast keeps the copies it makes of trained weights until the forward is done.
    copies = 2 * trained if mixed else 0
    tokens = settings.batch_rows * longest
    # Norms compute in float32, and the residual stream stays in the dtype of the embeddings.
    kept = _kept_numbers(config) * tokens * (3 if mixed else held.itemsize)
    if settings.gradient_checkpointing:
        activations = kept + config.num_hidden_layers * config.hidden_size * tokens * held.itemsize
    else:
        activations = config.num_hidden_layers * kept
    counted = settings.batch_rows * max(
        longest if settings.prompt_weight else sum(len(b.answer) for item in rows[at] for b in item.sample.branches)
        for at in range(len(rows))
    )
    return Memory(
        weights=frozen_bytes + trained_bytes + copies,
        gradients=trained_bytes,
        optimizer=2 * trained_bytes,
        activations=int(activations),
        # In 32 bits logits, their logarithms and gradient; in 16 bits logits and gradient beside three in 32.
        logits=counted * config.vocab_size * (16 if mixed or held.itemsize == 2 else 12),
    )


def _kept_numbers(config: PretrainedConfig) -> int:
    """Numbers that one layer keeps of a token for the backward pass, with an attention that keeps no scores."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    keys = 2 * head * (getattr(config, "num_key_value_heads", None) or heads)
    wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return int(4 * wide + 6 * config.hidden_size + 2 * (heads * head + keys))
