"""Where the weights of a run lie and what they are computed with: device, processes, dtypes, attention."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from blockrag.errors import InputError
from blockrag.model.loading import resolve_device, resolve_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from blockrag.finetune.settings import FinetuneSettings

__all__ = ["is_shared_out", "saved_dtype", "train_device", "train_dtype", "use_flex"]


def train_device(device: str | torch.device) -> torch.device:
    """Where to train.

    Raises:
        InputError: There is no such device, or it is one of several GPUs by number, which the Trainer does not take.
    """
    resolved = resolve_device(device)
    if resolved.type == "cuda" and resolved.index is not None:
        raise InputError(
            f"device {str(device)!r} names one GPU by number; set CUDA_VISIBLE_DEVICES={resolved.index} and pass 'cuda'"
        )
    return resolved


def is_shared_out(arguments: TrainingArguments) -> bool:
    """Whether each process holds a part of the weights, gradients or optimizer alone: FSDP or DeepSpeed."""
    # Set by `accelerate launch`.
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")
    return fsdp or arguments.deepspeed_plugin is not None


def train_dtype(dtype: str | torch.dtype, device: torch.device, settings: FinetuneSettings) -> torch.dtype | str:
    """The dtype of the weights while training, see `finetune`; "auto" for the checkpoint's own."""
    if dtype == "auto":
        return "auto" if settings.lora_rank and device.type == "cuda" else torch.float32
    return resolve_dtype(dtype, device)


def saved_dtype(model: PreTrainedModel, save_dtype: str | torch.dtype, revision: str | None) -> torch.dtype:
    """The dtype of the saved weights, see `finetune`; where the checkpoint does not say its own, that of training."""
    from transformers import AutoConfig

    if save_dtype != "auto":
        chosen = resolve_dtype(save_dtype, model.device)
        if isinstance(chosen, torch.dtype):
            return chosen
    said = AutoConfig.from_pretrained(model.config._name_or_path, revision=revision).dtype
    return said if isinstance(said, torch.dtype) else model.dtype


def use_flex(model: PreTrainedModel, device: torch.device) -> bool:
    """FlexAttention on a GPU where the model has it; elsewhere the dense mask of the attention it was loaded with."""
    if device.type != "cuda" or not getattr(model, "_supports_flex_attn", False):
        return False
    model.set_attn_implementation("flex_attention")
    return True
