"""`finetune`: from a model and data files to a directory that loads with plain transformers and with blockrag."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from blockrag.errors import DataError, InputError, MissingDependencyError
from blockrag.finetune.collate import Collator
from blockrag.finetune.data.lines import read_lines
from blockrag.finetune.progress import SaysProgress
from blockrag.finetune.resuming import RunIdentity, checkpoint_of, last_checkpoint, record, require_same
from blockrag.finetune.rows import Rows
from blockrag.finetune.samples import Sample, fitted, samples_of
from blockrag.finetune.saving import CHECKPOINTS, FactsInCheckpoints, data_file, save_finetuned, versions
from blockrag.finetune.settings import BLOCK_PREFIX, PRESETS, FinetuneSettings
from blockrag.finetune.trainer import BlockTrainer, StopsOnNaN
from blockrag.fingerprint import hash_tensors, hash_tokenizer
from blockrag.model.facts import BlockAttentionFacts
from blockrag.model.loading import load_pretrained, resolve_device, resolve_dtype
from blockrag.model.profile import positions_of
from blockrag.prompt import template_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

    from blockrag.prompt import PromptTemplate

__all__ = [
    "Finetuned",
    "TooLong",
    "finetune",
    "last_checkpoint",
    "read_samples",
    "rows_of",
    "steps_of",
    "tokens_of",
    "train_dtype",
    "training_template",
    "with_adapters",
]

logger = logging.getLogger(__name__)

TooLong = Literal["error", "skip"]

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
    _require("accelerate", "fine-tuning")
    # Before the weights: the Trainer's arguments bring processes together, and DeepSpeed and FSDP then have every
    # process load only its part.
    arguments = _arguments(out, settings, _device(device), distributed_config, has_eval=bool(eval_data))
    placed = arguments.device
    shared_out = arguments.deepspeed_plugin is not None or _is_fsdp()
    base, tokenizer, known = load_pretrained(
        model,
        device=torch.device("cpu") if shared_out else placed,
        dtype=train_dtype(dtype, placed, settings),
        revision=revision,
    )
    parameters = sum(getattr(weight, "ds_numel", weight.numel()) for weight in base.parameters())
    kept = _saved_dtype(base, save_dtype, revision)
    shown = training_template(template, known, tokenizer, settings)
    most, window = settings.max_tokens, positions_of(base)
    samples, skipped = read_samples(data, shown, tokenizer, most, too_long, window=window)
    evaluated, _ = read_samples(eval_data, shown, tokenizer, most, "skip", window=window, limit=eval_limit)
    if eval_data and not evaluated:
        raise DataError(
            f"no line of {', '.join(map(str, eval_data))} can be scored, all are longer than {most} tokens or the "
            "model's positions; raise --max-tokens, or keep fewer passages (blockrag data rerank -k)"
        )
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
    flexible = _use_flex(base, placed)
    trained = with_adapters(base, settings) if settings.lora_rank else base
    trained.train()
    facts = _facts(known, shown, rows, settings)
    _set_schedule(arguments, settings, steps)
    trainer = BlockTrainer(
        trained,
        base,
        arguments,
        rows,
        Collator(_pad_id(tokenizer), settings.prompt_weight, _FLEX_MULTIPLE if flexible else 1),
        reduction=settings.reduction,
        tokenizer=tokenizer,
        evaluated=evaluated,
        optimizer=_muon(trained, arguments, settings) if settings.optimizer == "muon" else None,
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
    _save(trainer, out, trained, tokenizer, facts, log, kept)
    return Finetuned(out, trainer.state.global_step, len(samples), skipped, seconds, history)


def read_samples(
    paths: Sequence[str | Path],
    template: PromptTemplate,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int,
    too_long: TooLong,
    *,
    window: int | None = None,
    limit: int | None = None,
) -> tuple[list[Sample], int]:
    """The samples of data files.

    Args:
        paths: The files.
        template: The template.
        tokenizer: The tokenizer.
        max_tokens: Longest sample; the questions of a line are shared out to several where they do not fit into one.
        too_long: Whether a question that does not fit with its passages is an error or left out.
        window: Positions the model was made for; None for any.
        limit: Most lines.

    Returns:
        The samples, and how many lines had something left out.

    Raises:
        DataError: A line cannot be used; names the file and the line.
    """
    lines = ((f"{path}, line {number}", line) for path in paths for number, line in read_lines(path))
    samples: list[Sample] = []
    skipped = 0
    for where, line in islice(lines, limit):
        found = samples_of(line, template, tokenizer, where)
        if too_long == "error":
            samples.extend(fitted(found, max_tokens, window))
            continue
        kept, left_out = _that_fit(found, max_tokens, window)
        samples.extend(kept)
        skipped += left_out
    if skipped:
        logger.warning(
            "%s: questions of more than %d tokens, passages included, were left out in %d lines",
            ", ".join(map(str, paths)),
            min(max_tokens, window or max_tokens),
            skipped,
        )
    return samples, skipped


def rows_of(samples: Sequence[Sample], settings: FinetuneSettings) -> Rows:
    """The rows to train on.

    Raises:
        DataError: There is no sample.
    """
    return Rows(
        samples,
        variants=settings.variants,
        pack_tokens=settings.max_tokens if settings.pack else None,
        order=settings.order,
        max_gap=settings.max_gap,
        seed=settings.seed,
    )


def _that_fit(samples: Iterator[Sample], max_tokens: int, window: int | None) -> tuple[list[Sample], bool]:
    longest = min(max_tokens, window or max_tokens)
    kept: list[Sample] = []
    left_out = False
    for sample in samples:
        branches = tuple(branch for branch in sample.branches if sample.shared_tokens + len(branch) <= longest)
        left_out |= len(branches) < len(sample.branches)
        if branches:
            kept.extend(fitted([replace(sample, branches=branches)], max_tokens))
    return kept, left_out


def _require(package: str, purpose: str) -> None:
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise MissingDependencyError(f"{purpose} needs {package}; run: pip install 'blockrag[finetune]'")


def _device(device: str | torch.device) -> torch.device:
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


def _is_fsdp() -> bool:
    """Whether `accelerate launch` was told to shard the weights."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def train_dtype(dtype: str | torch.dtype, device: torch.device, settings: FinetuneSettings) -> torch.dtype | str:
    """The dtype of the weights while training, see `finetune`; "auto" for the checkpoint's own."""
    if dtype == "auto":
        return "auto" if settings.lora_rank and device.type == "cuda" else torch.float32
    return resolve_dtype(dtype, device)


def _saved_dtype(model: PreTrainedModel, save_dtype: str | torch.dtype, revision: str | None) -> torch.dtype:
    from transformers import AutoConfig

    if save_dtype != "auto":
        chosen = resolve_dtype(save_dtype, model.device)
        if isinstance(chosen, torch.dtype):
            return chosen
    said = AutoConfig.from_pretrained(model.config._name_or_path, revision=revision).dtype
    return said if isinstance(said, torch.dtype) else model.dtype


def training_template(
    template: PromptTemplate | None,
    known: BlockAttentionFacts,
    tokenizer: PreTrainedTokenizerBase,
    settings: FinetuneSettings,
) -> PromptTemplate:
    """The template that is trained, and saved: what was asked for or the model's own, with the block prefix."""
    found = template or known.template or template_for(tokenizer, name_or_path=tokenizer.name_or_path)
    prefix = settings.block_prefix
    if prefix is None and template is not None and template.block_attention_prefix:
        prefix = template.block_attention_prefix
    if prefix is None:
        # What a model was block-fine-tuned with stays, in another template too; others get the published text.
        own = known.template.block_attention_prefix if known.template is not None else ""
        prefix = own if known.block_fine_tuned else BLOCK_PREFIX
    return found if settings.variants == "full" else replace(found, block_attention_prefix=prefix)


def _facts(
    known: BlockAttentionFacts, template: PromptTemplate, rows: Rows, settings: FinetuneSettings
) -> BlockAttentionFacts:
    if settings.variants == "full":
        return replace(known, template=template, block_fine_tuned=known.block_fine_tuned or False)
    blocks, tokens = rows.longest()
    return BlockAttentionFacts(block_fine_tuned=True, template=template, max_blocks=blocks, max_tokens=tokens)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any token does: padding is seen by nobody and trained by nobody."""
    pad_id: int = tokenizer.pad_token_id or 0
    return pad_id


def _use_flex(model: PreTrainedModel, device: torch.device) -> bool:
    """FlexAttention on a GPU where the model has it; elsewhere the dense mask of the attention it was loaded with."""
    if device.type != "cuda" or not getattr(model, "_supports_flex_attn", False):
        return False
    model.set_attn_implementation("flex_attention")
    return True


def with_adapters(model: PreTrainedModel, settings: FinetuneSettings) -> Any:
    """The model with low-rank adapters on every linear layer but the output's; they alone are trained.

    Raises:
        MissingDependencyError: peft is not installed.
    """
    _require("peft", "training adapters")
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


@contextmanager
def _old_names_of_peft() -> Iterator[None]:
    """Without a warning that users can do nothing about.

    Every model is asked by peft 0.21 for an attribute that transformers 5 has renamed, whatever is passed.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _muon(model: torch.nn.Module, arguments: TrainingArguments, settings: FinetuneSettings) -> torch.optim.Optimizer:
    """Muon, where every process has whole matrices.

    Raises:
        InputError: The weights are shared out over processes.
        MissingDependencyError: This torch has no Muon.
    """
    from blockrag.finetune.muon import MuonWithAdamW

    if not hasattr(torch.optim, "Muon"):
        raise MissingDependencyError(f"torch {torch.__version__} has no Muon; run: pip install 'torch>=2.9'")
    if arguments.fsdp or arguments.deepspeed or "ACCELERATE_USE_FSDP" in os.environ:
        raise InputError("optimizer='muon' needs whole matrices, and FSDP or DeepSpeed cuts them; use 'adamw' there")
    return MuonWithAdamW(model, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay)


def _arguments(
    out: Path, settings: FinetuneSettings, device: torch.device, deepspeed: Path | None, *, has_eval: bool
) -> TrainingArguments:
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


def _set_schedule(arguments: TrainingArguments, settings: FinetuneSettings, steps: int) -> None:
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


def steps_of(settings: FinetuneSettings, rows: int, processes: int = 1) -> int:
    """Optimizer steps of a run, as the Trainer counts them."""
    return settings.steps or math.ceil(settings.epochs * _steps_of_pass(settings, rows, processes))


def _steps_of_pass(settings: FinetuneSettings, rows: int, processes: int) -> int:
    batches = math.ceil(math.ceil(rows / settings.batch_rows) / processes)
    return max(1, math.ceil(batches / settings.accumulate))


def tokens_of(rows: Rows, settings: FinetuneSettings, steps: int, processes: int = 1) -> float:
    """Tokens of all rows of so many steps, padding left out; in a pass that is not finished, of shuffled rows, about.

    With a curriculum they are not the average's: the first rows are the shortest.
    """
    lengths = rows.lengths()
    passes, rest = divmod(steps, _steps_of_pass(settings, len(rows), processes))
    started = min(len(rows), rest * settings.batch_rows * settings.accumulate * processes)
    part = sum(lengths[:started]) if settings.order == "file" else started * sum(lengths) / len(rows)
    return passes * sum(lengths) + part


def _schedule(settings: FinetuneSettings, steps: int) -> tuple[str, dict[str, Any]]:
    """The schedule's name in transformers, and its arguments."""
    if settings.schedule == "hold-then-linear":
        falling = max(1, round(steps * settings.decay))
        return "warmup_stable_decay", {"num_decay_steps": falling, "min_lr_ratio": 0.02, "decay_type": "linear"}
    return {"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule), {}


def _save(
    trainer: BlockTrainer,
    out: Path,
    trained: Any,
    tokenizer: PreTrainedTokenizerBase,
    facts: BlockAttentionFacts,
    log: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    """Write the directory, from the first process."""
    gathered: Path | None = None
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        # Weights that are shared out over the processes are gathered by the Trainer, by all of them together.
        gathered = out / CHECKPOINTS / "gathered"
        trainer.save_model(str(gathered))
    if not trainer.is_world_process_zero():
        return

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
        from peft import AutoPeftModelForCausalLM

        with _old_names_of_peft():
            return AutoPeftModelForCausalLM.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory)
