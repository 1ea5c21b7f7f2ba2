"""Every number that shapes a fine-tuning run, and the published recipes by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, get_args, get_type_hints

from blockrag.errors import InputError
from blockrag.finetune.loss import Reduction
from blockrag.finetune.rows import Order, Variants

__all__ = ["BLOCK_PREFIX", "PRESETS", "FinetuneSettings", "Optimizer", "Schedule"]

BLOCK_PREFIX = "[Block-Attention]"
"""What the published checkpoints were trained with; plain text, no token of its own."""

Schedule: TypeAlias = Literal["constant", "linear", "cosine", "hold-then-linear"]
Optimizer: TypeAlias = Literal["adamw", "muon"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSettings:
    """The numbers of one run.

    Args:
        variants: In which attention every sample is trained; see `Rows`.
        block_prefix: Text at the front of block 0 under block attention, in training and from then on in every prompt;
            empty for none. By default that of a template that is given and has one, or else what the model was
            block-fine-tuned with, or else "[Block-Attention]". Full attention has none.
        max_tokens: Longest sample, and longest packed row.
        pack: Put samples behind each other in rows of up to `max_tokens`. With dense masks, as on a CPU, long rows cost
            quadratically and are better left short.
        order: See `Rows`.
        max_gap: See `Rows`.
        prompt_weight: What a token of the prompt counts in the loss, beside 1 for a token of the answer; 1 trains all
            tokens alike.
        reduction: See `blockrag.finetune.loss.Reduction`.
        epochs: Passes over the data; ignored if `steps` is given.
        steps: Optimizer steps.
        batch_rows: Rows to a forward, on each device.
        accumulate: Forwards to an optimizer step.
        learning_rate: The highest.
        schedule: "constant", "linear" and "cosine" behind a linear warm-up; "hold-then-linear" holds the highest and
            falls in the last `decay` of the run to a fiftieth.
        warmup: Share of the steps, or from 1 on their number.
        decay: Share of the steps in which "hold-then-linear" falls.
        optimizer: "adamw", or "muon" for the matrices of the layers and AdamW for the rest, which takes small models
            from random weights to their answers in about half of the tokens.
        weight_decay: The optimizer's.
        betas: AdamW's.
        max_grad_norm: Gradients are scaled down to it; 0 leaves them as they are.
        seed: Draws rows, gaps, dropout and adapters.
        bf16: Compute in bfloat16 (autocast); weights and optimizer keep their dtype.
        gradient_checkpointing: Compute activations twice instead of keeping them.
        lora_rank: Train low-rank adapters of this rank instead of the weights; 0 for the weights.
        lora_alpha: Their scale, divided by the rank.
        lora_dropout: Their dropout.
        eval_steps: Steps between two evaluations; 0 for one at the end.
        save_steps: Steps between two checkpoints, beside one at the end; 0 for none: a run that stops is lost.
        save_limit: Checkpoints to keep.
        log_steps: Steps between two lines of the log.

    Raises:
        InputError: A value is out of range.
    """

    variants: Variants = "both"
    block_prefix: str | None = None
    max_tokens: int = 4096
    pack: bool = False
    order: Order = "shuffled"
    max_gap: int = 0
    prompt_weight: float = 0.0
    reduction: Reduction = "mean"
    epochs: float = 1.0
    steps: int = 0
    batch_rows: int = 1
    accumulate: int = 1
    learning_rate: float = 2e-5
    schedule: Schedule = "linear"
    warmup: float = 0.03
    decay: float = 0.4
    optimizer: Optimizer = "adamw"
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    seed: int = 42
    bf16: bool = False
    gradient_checkpointing: bool = False
    lora_rank: int = 0
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    eval_steps: int = 0
    save_steps: int = 0
    save_limit: int = 2
    log_steps: int = 10

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):
            value, choices = getattr(self, field.name), get_args(hints[field.name])
            if choices and isinstance(choices[0], str) and value not in choices:
                raise InputError(f"{field.name}={value!r} is none of {', '.join(map(repr, choices))}")
        for name in ("max_tokens", "batch_rows", "accumulate", "lora_alpha", "log_steps", "save_limit"):
            self._at_least(name, 1)
        for name in (
            *("max_gap", "prompt_weight", "steps", "warmup", "weight_decay", "max_grad_norm"),
            *("lora_rank", "eval_steps", "save_steps"),
        ):
            self._at_least(name, 0)
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{field.name}={value!r} must be a finite number")
        if not all(0 <= beta < 1 for beta in self.betas) or not 0 <= self.lora_dropout < 1:
            raise InputError(
                f"betas={self.betas}, lora_dropout={self.lora_dropout}: each must be from 0 on and less than 1"
            )
        if self.learning_rate <= 0 or self.epochs <= 0 or not 0 < self.decay <= 1 or self.prompt_weight > 1:
            raise InputError(
                f"learning_rate={self.learning_rate}, epochs={self.epochs}, decay={self.decay}, "
                f"prompt_weight={self.prompt_weight}: the first two must be positive, the others at most 1"
            )

    def _at_least(self, name: str, least: int) -> None:
        if getattr(self, name) < least:
            raise InputError(f"{name}={getattr(self, name)!r} must be at least {least}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        return {**asdict(self), "betas": list(self.betas)}


_SAVED = FinetuneSettings(eval_steps=200, save_steps=200)
"""What no publication says: a run of hours that stops goes on where it was 200 steps ago at most."""

PRESETS: Mapping[str, tuple[str, FinetuneSettings]] = MappingProxyType(
    {
        "paper": (
            "arXiv 2409.15355, section 3.1: both attentions, learning rate 2e-5, batch 64, 20 warm-up steps, 1 epoch",
            replace(_SAVED, learning_rate=2e-5, warmup=20, schedule="constant", accumulate=64),
        ),
        "tulu3": (
            "The published script for Tulu 3: 2e-6 with linear decay, batch 128, sum over the tokens of an answer",
            replace(_SAVED, learning_rate=2e-6, reduction="sum", accumulate=128),
        ),
        "llama3": (
            "The first published script, for Llama 3: block attention only, loss over all tokens, 2e-5, batch 64",
            replace(
                _SAVED,
                variants="block",
                block_prefix="",
                max_tokens=8192,
                prompt_weight=1.0,
                learning_rate=2e-5,
                schedule="constant",
                warmup=20,
                accumulate=64,
            ),
        ),
        "cards": (
            "The model cards of Llama-3.2-1B-Block-FT and Qwen3-8B-block-FT: 2e-6, sum over the tokens of an answer",
            replace(_SAVED, learning_rate=2e-6, reduction="sum", accumulate=64),
        ),
        "packed": (
            "Ours: many questions to a row, rows packed to 4,096 tokens; for a GPU with FlexAttention",
            replace(_SAVED, pack=True, accumulate=8, bf16=True, gradient_checkpointing=True),
        ),
    }
)
"""What each recipe is, and its settings. Batches are for one device: with n devices, divide `accumulate` by n.

Where a publication does not say, this fills in: the paper names neither schedule nor reduction (constant behind the
warm-up and mean here), the cards no batch size (64 here), warm-up or schedule (those of the script). The paper's
learning rate and its script's differ by a factor of ten, and nobody says why."""
