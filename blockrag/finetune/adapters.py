"""Low-rank adapters: put around a model to train them alone, and loaded with it to merge them. By peft."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockrag.finetune.dependencies import require

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from blockrag.finetune.settings import FinetuneSettings

__all__ = ["load_with_adapters", "with_adapters"]


def with_adapters(model: PreTrainedModel, settings: FinetuneSettings) -> Any:
    """The model with low-rank adapters on every linear layer but the output's; they alone are trained.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    require("peft", "training adapters")
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=settings.lora_rank,
        lora_alpha=settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    with _old_names_of_peft():
        return get_peft_model(model, config)


def load_with_adapters(directory: Path) -> Any:
    """A model with the adapters of a directory around it, which names the model."""
    from peft import AutoPeftModelForCausalLM

    with _old_names_of_peft():
        return AutoPeftModelForCausalLM.from_pretrained(directory)


@contextmanager
def _old_names_of_peft() -> Iterator[None]:
    """Without a warning that users can do nothing about.

    Every model is asked by peft 0.21 for an attribute that transformers 5 has renamed, whatever is passed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield
