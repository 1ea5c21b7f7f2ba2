"""The end of a run: from however many processes, and however its weights are shared out, to one directory.

What a directory holds is for `saving` to say.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockrag.finetune.adapters import load_with_adapters
from blockrag.finetune.saving import CHECKPOINTS, save_finetuned

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from blockrag.finetune.trainer import BlockTrainer
    from blockrag.model.facts import BlockAttentionFacts

__all__ = ["save_trained"]


def save_trained(
    trainer: BlockTrainer,
    out: Path,
    trained: Any,
    tokenizer: PreTrainedTokenizerBase,
    facts: BlockAttentionFacts,
    log: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write the directory, from the first process; every process has to call it, and returns when it is written.

    Args:
        trainer: What trained it.
        out: The directory.
        trained: The model, adapters included; they are merged, and saved alone beside it.
        tokenizer: Its tokenizer.
        facts: What blockrag will read.
        log: How it was made; see `save_finetuned`.
        dtype: Of the saved weights.
    """
    gathered: Path | None = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # Weights that are shared out over the processes are gathered by the Trainer, by all of them together.
        gathered = out / CHECKPOINTS / "gathered"
        trainer.save_model(str(gathered))
    if trainer.is_world_process_zero():
        _write(out, trained, gathered, tokenizer, facts, log, dtype)
    # A launcher takes a process that fails for the end of all, and one that leaves can: torch aborts now and then where
    # an interpreter ends beside gloo's threads. The first must not be stopped by that while it writes.
    trainer.accelerator.wait_for_everyone()


def _write(
    out: Path,
    trained: Any,
    gathered: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    facts: BlockAttentionFacts,
    log: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write the directory, from the trained model or from where it was gathered, which is then removed."""

    def write_weights(directory: Path) -> None:
        model = trained if gathered is None else _reloaded(gathered, adapters=hasattr(trained, "merge_and_unload"))
        if hasattr(model, "merge_and_unload"):
            model.save_pretrained(directory / "adapter")
            model = model.merge_and_unload()
        model.eval().to(dtype).save_pretrained(directory)

    save_finetuned(out, write_weights, tokenizer, facts, log)
    if gathered is not None:
        shutil.rmtree(gathered)


def _reloaded(directory: Path, *, adapters: bool) -> Any:
    """A gathered model, in one process."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    # Under ZeRO-3 transformers would share out the weights again, and wait for the other processes.
    unset_hf_deepspeed_config()
    if adapters:
        return load_with_adapters(directory)
    return AutoModelForCausalLM.from_pretrained(directory)
