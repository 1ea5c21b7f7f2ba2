"""`finetune`: from a model and data files to a directory that loads with plain transformers and with blockrag."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from blockrag.finetune.adapters import with_adapters
from blockrag.finetune.arguments import set_schedule, training_arguments
from blockrag.finetune.collate import Collator
from blockrag.finetune.data.lines import read_lines
from blockrag.finetune.dependencies import require
from blockrag.finetune.facts import trained_facts, training_template
from blockrag.finetune.gathering import save_trained
from blockrag.finetune.muon import muon_of
from blockrag.finetune.placing import is_shared_out, saved_dtype, train_device, train_dtype, use_flex
from blockrag.finetune.progress import SaysProgress
from blockrag.finetune.reading import TooLong, read_evaluated, read_samples, rows_of
from blockrag.finetune.resuming import RunIdentity, checkpoint_of, record, require_same
from blockrag.finetune.saving import FactsInCheckpoints, data_file, versions
from blockrag.finetune.settings import PRESETS, FinetuneSettings
from blockrag.finetune.steps import steps_of, tokens_of
from blockrag.finetune.trainer import BlockTrainer, StopsOnNaN
from blockrag.fingerprint import hash_tensors, hash_tokenizer
from blockrag.model.loading import load_pretrained
from blockrag.model.profile import positions_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from blockrag.prompt import PromptTemplate

__all__ = ["Finetuned", "finetune"]

logger = logging.getLogger(__name__)

_FLEX_MULTIPLE = 128


@dataclass(frozen=True, slots=True)
class Finetuned:
    """What a run left.

    Args:
        path: The directory.
        steps: Optimizer steps, those before a resumption included.
        samples: Samples trained on.
        skipped: Lines left out because they were too long.
        seconds: Wall-clock seconds of this call's training.
        history: The Trainer's log: losses, learning rates, evaluations.
    """

    path: Path
    steps: int
    samples: int
    skipped: int
    seconds: float
    history: tuple[dict[str, Any], ...]


def finetune(
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    settings: FinetuneSettings | None = None,
    *,
    eval_data: Sequence[str | Path] = (),
    eval_limit: int = 200,
    template: PromptTemplate | None = None,
    resume: bool = False,
    too_long: TooLong = "error",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    save_dtype: str | torch.dtype = "auto",
    distributed_config: Path | None = None,
    revision: str | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Callable[[str], None] = logger.info,
) -> Finetuned:
    """Fine-tune a model for block attention.

    With several GPUs, start it with `accelerate launch` or `torchrun`; every process calls this function.

    Args:
        model: A directory or a hub id.
        data: Files of JSON lines; see `blockrag.finetune.data.lines`.
        out: The directory to write; see `blockrag.finetune.saving`.
        settings: The numbers; by default the paper's.
        eval_data: Files of lines to score in both attentions while training.
        eval_limit: Most lines of them.
        template: How prompts are built; by default the model's own, with `settings.block_prefix`.
        resume: Go on from the last checkpoint in `out`; see `blockrag.finetune.resuming` for what may differ then.
        too_long: Whether a sample beyond `settings.max_tokens` is an error or left out.
        device: "auto", "cpu" or "cuda"; which GPU of several is for CUDA_VISIBLE_DEVICES or the launcher to say.
        dtype: Of the weights while training. "auto" is float32; for adapters on a GPU the checkpoint's own.
        save_dtype: Of the saved weights; "auto" is the checkpoint's own.
        distributed_config: A DeepSpeed (JSON) file for the Trainer; FSDP is configured through accelerate.
        revision: Branch, tag or commit on the hub.
        callbacks: Of the Trainer.
        progress: Gets a line now and then; in the first process only.

    Raises:
        DataError: A line cannot be used; nothing is written.
        InputError: The model does not exist; `out` holds something and `resume` is off; there is nothing to resume, or
            it was begun with other data, settings, template or model.
        UnsupportedModelError: The model has layers that keep other states than keys and values.
        MissingDependencyError: accelerate, or peft for adapters, is not installed.
    """
    from transformers import PrinterCallback

    settings = settings or PRESETS["paper"][1]
    out = Path(out)
    checkpoint = checkpoint_of(out, resume=resume)
    require("accelerate", "fine-tuning")
    # Before the weights: the Trainer's arguments bring processes together, and DeepSpeed and FSDP then have every
    # process load only its part.
    arguments = training_arguments(out, settings, train_device(device), distributed_config, has_eval=bool(eval_data))
    placed = arguments.device
    base, tokenizer, known = load_pretrained(
        model,
        device=torch.device("cpu") if is_shared_out(arguments) else placed,
        dtype=train_dtype(dtype, placed, settings),
        revision=revision,
    )
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in base.parameters())
    kept = saved_dtype(base, save_dtype, revision)
    shown = training_template(template, known, tokenizer, settings)
    most, window = settings.max_tokens, positions_of(base)
    samples, skipped = read_samples(data, shown, tokenizer, most, too_long, window=window)
    evaluated = read_evaluated(eval_data, shown, tokenizer, most, window=window, limit=eval_limit)
    # Now, as they were read: days later they may be others, or gone.
    files, eval_files = (
        [data_file(Path(path), sum(1 for _ in read_lines(path))) for path in paths] for paths in (data, eval_data)
    )
    rows = rows_of(samples, settings)
    steps = steps_of(settings, len(rows), arguments.world_size)
    identity: RunIdentity | None = None
    if arguments.process_index == 0:
        # In front of the adapters, and where the weights are: FSDP gives them to the first process alone.
        identity = RunIdentity.of(
            settings,
            shown,
            steps=steps,
            rows_per_step=settings.batch_rows * settings.accumulate * arguments.world_size,
            weights=hash_tensors(base.state_dict().items()),
            tokenizer=hash_tokenizer(tokenizer),
            dtype=str(base.dtype).removeprefix("torch."),
            data=files,
            eval_data=eval_files,
            eval_limit=eval_limit,
        )
        if checkpoint is not None and steps > (before := require_same(out, identity)):
            progress(f"the run gets longer: {steps:,} steps instead of {before:,}")
    flexible = use_flex(base, placed)
    trained = with_adapters(base, settings) if settings.lora_rank else base
    trained.train()
    facts = trained_facts(known, shown, rows, settings)
    set_schedule(arguments, settings, steps)
    trainer = BlockTrainer(
        trained,
        base,
        arguments,
        rows,
        Collator(_pad_id(tokenizer), settings.prompt_weight, _FLEX_MULTIPLE if flexible else 1),
        reduction=settings.reduction,
        tokenizer=tokenizer,
        evaluated=evaluated,
        optimizer=muon_of(trained, arguments, settings) if settings.optimizer == "muon" else None,
        callbacks=[
            FactsInCheckpoints(facts),
            StopsOnNaN(),
            SaysProgress(progress, tokens_of(rows, settings, steps, arguments.world_size)),
            *callbacks,
        ],
    )
    trainer.remove_callback(PrinterCallback)
    if identity is not None and settings.save_steps:
        record(out, identity)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    # With `eval_steps` the Trainer did, behind the last step at the latest.
    if evaluated and not settings.eval_steps:
        trainer.evaluate()
    history = tuple(trainer.state.log_history)
    log = {
        "name": out.name,
        "base": Path(model).name if Path(model).exists() else str(model),
        "settings": settings.to_dict(),
        "template": shown.name,
        "data": files,
        "eval_data": eval_files,
        "samples": len(samples),
        "skipped": skipped,
        "rows": len(rows),
        "parameters": parameters,
        "steps": trainer.state.global_step,
        "tokens_seen": trainer.state.num_input_tokens_seen,
        "seconds": round(seconds, 1),
        "processes": arguments.world_size,
        "device": placed.type,
        "versions": versions(),
        "history": list(history),
    }
    save_trained(trainer, out, trained, tokenizer, facts, log, kept)
    return Finetuned(out, trainer.state.global_step, len(samples), skipped, seconds, history)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token does: padding is seen by nobody and trained by nobody."""
    pad_id: int = tokenizer.pad_token_id or 0
    return pad_id
