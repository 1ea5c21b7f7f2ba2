"""`blockrag finetune`: a model and data files to a block-fine-tuned model; `blockrag presets`: the recipes by name."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from blockrag.cli.directory import model_name
from blockrag.cli.indexing import size
from blockrag.cli.options import AsJson, Device, Dtype
from blockrag.cli.output import Output, clean, quiet_transformers, reporting
from blockrag.errors import InputError

if TYPE_CHECKING:
    from blockrag.finetune.plan import Plan
    from blockrag.finetune.reading import TooLong
    from blockrag.finetune.run import Finetuned
    from blockrag.finetune.settings import FinetuneSettings
    from blockrag.prompt import PromptTemplate

__all__ = ["finetune", "presets"]


class Preset(str, Enum):
    """The recipes: those of `finetune.settings`, which is not imported for --help."""

    paper = "paper"
    tulu3 = "tulu3"
    llama3 = "llama3"
    cards = "cards"
    packed = "packed"


class Variants(str, Enum):
    """In which attention samples are trained."""

    both = "both"
    alternate = "alternate"
    block = "block"
    full = "full"


class Order(str, Enum):
    """How samples follow each other."""

    shuffled = "shuffled"
    file = "file"


class Reduction(str, Enum):
    """What the loss is divided by."""

    mean = "mean"
    sum = "sum"


class Schedule(str, Enum):
    """The learning rate over time."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"
    hold_then_linear = "hold-then-linear"


class Optimizer(str, Enum):
    """What makes steps of gradients."""

    adamw = "adamw"
    muon = "muon"


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="'demo', a hub id or a directory.")]
Data = Annotated[list[Path], typer.Option("--data", help="Training lines; repeat it for several files.")]
OutputDirectory = Annotated[Path, typer.Option("--output", help="The directory to write.")]
PresetOption = Annotated[Preset, typer.Option("--preset", help="Settings to start from: see `blockrag presets`.")]
EvalData = Annotated[
    list[Path] | None,
    typer.Option("--eval-data", help="Lines to score in both attentions while training; repeatable."),
]
EvalLimit = Annotated[int, typer.Option("--eval-limit", min=1, help="Most lines to score.")]
Template = Annotated[
    str | None,
    typer.Option("--template", help="tulu, tulu-block, llama3, chatml, plain, or a JSON file; by default the model's."),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")]
SkipTooLong = Annotated[
    bool, typer.Option("--skip-too-long", help="Leave out what is longer than --max-tokens, in place of an error.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Read the data, say what the run would be, and end.")]
SaveDtype = Annotated[str, typer.Option("--save-dtype", help="Of the saved weights; 'auto' is the model's own.")]
DeepSpeed = Annotated[
    Path | None, typer.Option("--deepspeed", help="A DeepSpeed file, e.g. examples/finetune/zero3.json.")
]

# One for each field of `FinetuneSettings`, in its order; None leaves the preset's.
VariantsOption = Annotated[
    Variants | None,
    typer.Option("--variants", help="Every sample in both attentions, in one after the other, or in one alone."),
]
BlockPrefix = Annotated[
    str | None, typer.Option("--block-prefix", help="Text in front of every prompt in block attention; '' for none.")
]
MaxTokens = Annotated[int | None, typer.Option("--max-tokens", help="Longest sample, and longest packed row.")]
Pack = Annotated[bool | None, typer.Option("--pack/--no-pack", help="Put samples behind each other in rows.")]
OrderOption = Annotated[Order | None, typer.Option("--order", help="Shuffled, or as in the files.")]
MaxGap = Annotated[int | None, typer.Option("--max-gap", help="Positions left out between blocks, at most.")]
PromptWeight = Annotated[
    float | None, typer.Option("--prompt-weight", help="What prompt tokens count in the loss; 0 trains answers alone.")
]
ReductionOption = Annotated[
    Reduction | None, typer.Option("--reduction", help="Loss per token, or per answer: the sum over its tokens.")
]
Epochs = Annotated[float | None, typer.Option("--epochs", help="Passes over the data.")]
Steps = Annotated[int | None, typer.Option("--steps", help="Optimizer steps, in place of --epochs.")]
BatchRows = Annotated[int | None, typer.Option("--batch-rows", help="Rows to a forward, on each device.")]
Accumulate = Annotated[
    int | None, typer.Option("--accumulate", help="Forwards to a step; divide a preset's by the number of devices.")
]
LearningRate = Annotated[float | None, typer.Option("--learning-rate", help="The highest.")]
ScheduleOption = Annotated[Schedule | None, typer.Option("--schedule", help="Of the learning rate.")]
Warmup = Annotated[float | None, typer.Option("--warmup", help="Share of the steps, or from 1 on their number.")]
Decay = Annotated[float | None, typer.Option("--decay", help="Share of the steps in which hold-then-linear falls.")]
OptimizerOption = Annotated[
    Optimizer | None, typer.Option("--optimizer", help="AdamW, or Muon for the matrices of the layers.")
]
WeightDecay = Annotated[float | None, typer.Option("--weight-decay", help="The optimizer's.")]
Betas = Annotated[tuple[float, float] | None, typer.Option("--betas", help="AdamW's.")]
MaxGradNorm = Annotated[float | None, typer.Option("--max-grad-norm", help="Gradients are scaled down to it.")]
TrainSeed = Annotated[int | None, typer.Option("--seed", help="Draws rows, gaps, dropout and adapters.")]
Bf16 = Annotated[bool | None, typer.Option("--bf16/--no-bf16", help="Compute in bfloat16; weights keep their dtype.")]
GradientCheckpointing = Annotated[
    bool | None,
    typer.Option(
        "--gradient-checkpointing/--no-gradient-checkpointing", help="Compute activations twice, to keep fewer."
    ),
]
LoraRank = Annotated[int | None, typer.Option("--lora-rank", help="Train adapters of this rank; 0 for the weights.")]
LoraAlpha = Annotated[int | None, typer.Option("--lora-alpha", help="Their scale, divided by the rank.")]
LoraDropout = Annotated[float | None, typer.Option("--lora-dropout", help="Their dropout.")]
EvalSteps = Annotated[
    int | None, typer.Option("--eval-steps", help="Steps between evaluations; 0: one, at the end. Presets have 200.")
]
SaveSteps = Annotated[
    int | None, typer.Option("--save-steps", help="Steps between checkpoints; 0: none. Presets have 200.")
]
SaveLimit = Annotated[int | None, typer.Option("--save-limit", help="Checkpoints to keep. Presets have 2.")]
LogSteps = Annotated[int | None, typer.Option("--log-steps", help="Steps between lines about the loss.")]


def finetune(
    model: ModelArgument,
    data: Data,
    output: OutputDirectory,
    preset: PresetOption = Preset.paper,
    eval_data: EvalData = None,
    eval_limit: EvalLimit = 200,
    template: Template = None,
    resume: Resume = False,
    skip_too_long: SkipTooLong = False,
    dry_run: DryRun = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    save_dtype: SaveDtype = "auto",
    deepspeed: DeepSpeed = None,
    variants: VariantsOption = None,
    block_prefix: BlockPrefix = None,
    max_tokens: MaxTokens = None,
    pack: Pack = None,
    order: OrderOption = None,
    max_gap: MaxGap = None,
    prompt_weight: PromptWeight = None,
    reduction: ReductionOption = None,
    epochs: Epochs = None,
    steps: Steps = None,
    batch_rows: BatchRows = None,
    accumulate: Accumulate = None,
    learning_rate: LearningRate = None,
    schedule: ScheduleOption = None,
    warmup: Warmup = None,
    decay: Decay = None,
    optimizer: OptimizerOption = None,
    weight_decay: WeightDecay = None,
    betas: Betas = None,
    max_grad_norm: MaxGradNorm = None,
    seed: TrainSeed = None,
    bf16: Bf16 = None,
    gradient_checkpointing: GradientCheckpointing = None,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: LoraDropout = None,
    eval_steps: EvalSteps = None,
    save_steps: SaveSteps = None,
    save_limit: SaveLimit = None,
    log_steps: LogSteps = None,
    as_json: AsJson = False,
) -> None:
    """Teach a model to read passages that do not see each other.

    \b
    A line of --data is a JSON object:
      passages, question and answers   a question over passages
      passages and questions           several questions about the same passages
      blocks and response              a prompt that is cut already
      messages                         a conversation

    Options change single settings of the --preset. --output loads with transformers and with blockrag, and holds the
    log, a plot and a model card beside the weights. A run that was stopped goes on with --resume.

    Several GPUs: accelerate launch -m blockrag finetune ..., see docs/guide/fine-tuning.md.
    """  # noqa: D301 (the command line needs the character itself: it keeps the lines behind it apart)
    given = {
        "variants": variants,
        "block_prefix": block_prefix,
        "max_tokens": max_tokens,
        "pack": pack,
        "order": order,
        "max_gap": max_gap,
        "prompt_weight": prompt_weight,
        "reduction": reduction,
        "epochs": epochs,
        "steps": steps,
        "batch_rows": batch_rows,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "schedule": schedule,
        "warmup": warmup,
        "decay": decay,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "betas": betas,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "bf16": bf16,
        "gradient_checkpointing": gradient_checkpointing,
        "lora_rank": lora_rank,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "eval_steps": eval_steps,
        "save_steps": save_steps,
        "save_limit": save_limit,
        "log_steps": log_steps,
    }
    # Under a launcher every process runs this; the first one speaks for all.
    with reporting(as_json, silent=os.environ.get("RANK", "0") != "0") as out:
        name = model_name(model)
        if deepspeed is not None and not deepspeed.is_file():
            raise InputError(f"there is no file {str(deepspeed)!r}; pass a DeepSpeed file of JSON as --deepspeed")
        settings = _settings(preset, given)
        chosen = None if template is None else _template(template)
        too_long: TooLong = "skip" if skip_too_long else "error"
        quiet_transformers()
        if dry_run:
            from blockrag.finetune.plan import plan

            processes = int(os.environ.get("WORLD_SIZE", "1"))
            with out.working(f"reading {', '.join(path.name for path in data)} ..."):
                planned = plan(
                    name,
                    data,
                    settings,
                    template=chosen,
                    too_long=too_long,
                    device=device,
                    dtype=dtype,
                    processes=processes,
                )
            _show_plan(out, planned, settings)
            return
        from blockrag.finetune.run import finetune as run

        with _told_how_to_resume(output):
            done = run(
                name,
                data,
                output,
                settings,
                eval_data=eval_data or (),
                eval_limit=eval_limit,
                template=chosen,
                resume=resume,
                too_long=too_long,
                device=device,
                dtype=dtype,
                save_dtype=save_dtype,
                distributed_config=deepspeed,
                progress=out.note,
            )
        _show(out, done)


def presets(as_json: AsJson = False) -> None:
    """Show the recipes of `blockrag finetune --preset`: where each is from, and the settings they differ in."""
    with reporting(as_json) as out:
        from blockrag.finetune.settings import PRESETS

        settings = {name: preset.to_dict() for name, (_, preset) in PRESETS.items()}
        for name, (about, _) in PRESETS.items():
            out.show(f"{name:8} {about}")
        out.show("", _columns("", *settings))
        for setting in next(iter(settings.values())):
            values = [_shown(preset[setting]) for preset in settings.values()]
            if len(set(values)) > 1:
                out.show(_columns(f"--{setting.replace('_', '-')}", *values))
        out.result({name: {"about": PRESETS[name][0], "settings": preset} for name, preset in settings.items()})


def _settings(preset: Preset, given: Mapping[str, object]) -> FinetuneSettings:
    """The preset with what was given in place of its own.

    Raises:
        InputError: A value is out of range.
    """
    from blockrag.finetune.settings import PRESETS

    changes: dict[str, Any] = {
        name: value.value if isinstance(value, Enum) else value for name, value in given.items() if value is not None
    }
    return replace(PRESETS[preset.value][1], **changes)


def _template(name: str) -> PromptTemplate:
    """A named template, or that of a file.

    Raises:
        InputError: There is none of this name, or the file holds none.
    """
    import json

    from blockrag.prompt import TEMPLATES, PromptTemplate

    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--template {name!r} is neither a file nor one of {', '.join(TEMPLATES)}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); write what PromptTemplate.to_dict gives") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} holds {type(value).__name__}, no object; write what PromptTemplate.to_dict gives")
    # A model's block_attention.json holds its template among other facts.
    return PromptTemplate.from_dict(value.get("template") or value)


@contextmanager
def _told_how_to_resume(output: Path) -> Iterator[None]:
    """What Ctrl-C leaves, and how to go on from it."""
    try:
        yield
    except KeyboardInterrupt:
        from blockrag.finetune.resuming import last_checkpoint

        kept = last_checkpoint(output)
        raise KeyboardInterrupt(
            f"interrupted; {kept.name} is kept: add --resume to the same command to go on from it"
            if kept is not None
            else "interrupted before the first checkpoint, nothing is kept; --save-steps writes them more often"
        ) from None


def _show_plan(out: Output, planned: Plan, settings: FinetuneSettings) -> None:
    memory = planned.memory
    share = planned.tokens / (planned.rows * settings.max_tokens)
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "AdamW": memory.optimizer,
        "activations": memory.activations,
        "logits": memory.logits,
    }
    facts = {
        "data": f"{planned.samples:,} samples with {planned.questions:,} questions"
        + (f"; {planned.skipped:,} lines had something left out" if planned.skipped else ""),
        "rows": f"{planned.rows:,} ({settings.variants}), {planned.tokens:,} tokens"
        + (f", {100 * share:.0f} % full" if settings.pack else ""),
        "longest": f"{planned.longest_row:,} tokens to a row; {planned.max_blocks} blocks, "
        f"{planned.max_positions:,} positions to a sample",
        "sharing": f"{planned.tokens_apart:,} tokens if every question had its passages to itself, "
        f"{planned.saving:.1f} times as many",
        "steps": f"{planned.steps:,} of {planned.rows_per_step:,} rows",
        "training": f"{planned.trained:,} of {planned.parameters:,} parameters",
        "memory": f"{size(memory.total)}: " + ", ".join(f"{name} {size(value)}" for name, value in parts.items()),
        "": "an estimate, on one device; FSDP2 and ZeRO-3 share out weights, gradients and AdamW",
    }
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for label, value in facts.items():
        table.add_row(Text(label, style="dim"), Text(clean(value)))
    out.show(table)
    out.result(
        {
            **asdict(planned),
            "saving": planned.saving,
            "memory": {**asdict(memory), "total": memory.total},
            "settings": settings.to_dict(),
        }
    )


def _show(out: Output, done: Finetuned) -> None:
    from blockrag.finetune.progress import duration, evaluation_line

    evaluations = [entry for entry in done.history if "eval_full_exact_match" in entry]
    skipped = f", {done.skipped:,} lines had something left out" if done.skipped else ""
    out.show(f"{done.path}: {done.steps:,} steps over {done.samples:,} samples in {duration(done.seconds)}{skipped}")
    if evaluations:
        out.show(evaluation_line(evaluations[-1]))
    out.result(
        {
            "path": str(done.path),
            "steps": done.steps,
            "samples": done.samples,
            "skipped": done.skipped,
            "seconds": done.seconds,
            "evaluations": _evaluations(evaluations),
        }
    )


def _evaluations(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The evaluations, with the step each was made at, without the names' common beginning."""
    return [
        {name.removeprefix("eval_"): value for name, value in entry.items() if name == "step" or "eval_" in name}
        for entry in entries
    ]


def _columns(name: str, *values: str) -> str:
    """A line of a table that is not cut off in a narrow terminal."""
    return f"{name:25}" + "".join(f"{value:10}" for value in values).rstrip()


def _shown(value: object) -> str:
    if value is None:
        return "default"
    if value == "":
        return "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
