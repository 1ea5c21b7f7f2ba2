"""The settings of a run as the Trainer's own arguments."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockrag.finetune.saving import CHECKPOINTS

if TYPE_CHECKING:
    import torch
    from transformers import TrainingArguments

    from blockrag.finetune.settings import FinetuneSettings

__all__ = ["set_schedule", "training_arguments"]

logger = logging.getLogger(__name__)


def training_arguments(
    out: Path, settings: FinetuneSettings, device: torch.device, deepspeed: Path | None, *, has_eval: bool
) -> TrainingArguments:
    """The Trainer's arguments, without what depends on the number of steps; see `set_schedule`.

    Args:
        out: The run's directory.
        settings: The numbers.
        device: Where to train.
        deepspeed: A DeepSpeed file.
        has_eval: Whether there is something to score.
    """
    from transformers import TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(out / CHECKPOINTS),
        per_device_train_batch_size=settings.batch_rows,
        per_device_eval_batch_size=max(4, settings.batch_rows),
        gradient_accumulation_steps=settings.accumulate,
        num_train_epochs=settings.epochs,
        max_steps=settings.steps or -1,
        learning_rate=settings.learning_rate,
        warmup_steps=settings.warmup,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        activation_checkpointing=settings.gradient_checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if settings.gradient_checkpointing else None,
        logging_steps=settings.log_steps,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if has_eval and settings.eval_steps else "no",
        eval_steps=settings.eval_steps or None,
        save_strategy="steps" if settings.save_steps else "no",
        save_steps=settings.save_steps or 500,
        save_total_limit=settings.save_limit,
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device.type == "cpu",
        train_sampling_strategy="sequential" if settings.order == "file" else "random",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        deepspeed=None if deepspeed is None else str(deepspeed),
        ddp_find_unused_parameters=False,
        average_tokens_across_devices=True,
    )
    if arguments.n_gpu > 1:
        # Started without `accelerate launch`: one GPU, rather than the Trainer's DataParallel, which splits layouts.
        arguments._n_gpu = 1
    return arguments


def set_schedule(arguments: TrainingArguments, settings: FinetuneSettings, steps: int) -> None:
    """Add what depends on the number of steps."""
    from transformers import SchedulerType

    name, arguments.lr_scheduler_kwargs = _schedule(settings, steps)
    arguments.lr_scheduler_type = SchedulerType(name)
    if (warmup := arguments.get_warmup_steps(steps)) >= steps:
        logger.warning(
            "the warm-up of %d steps takes the whole run of %d: it ends before the learning rate %g; lower --warmup",
            warmup,
            steps,
            settings.learning_rate,
        )


def _schedule(settings: FinetuneSettings, steps: int) -> tuple[str, dict[str, Any]]:
    """The schedule's name in transformers, and its arguments."""
    if settings.schedule == "hold-then-linear":
        falling = max(1, round(steps * settings.decay))
        return "warmup_stable_decay", {"num_decay_steps": falling, "min_lr_ratio": 0.02, "decay_type": "linear"}
    return {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule), {}
