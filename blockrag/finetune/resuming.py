"""Whether a run may go on in a directory: its last whole checkpoint, and what it was begun with.

Beside the checkpoints stands `run.json`, which says what the run is: its data, settings, template and model. Going on
with others would give a model that nobody can make again and whose card is wrong, so that it is refused, by name.
What changes no number of a step may change: how often a run saves, logs and evaluates, recomputed activations, how the
rows of a step are cut into forwards and processes. A run may also be made longer, as that is asked for; not shorter.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blockrag.errors import InputError
from blockrag.finetune.saving import CHECKPOINTS, PARTIAL
from blockrag.finetune.settings import FinetuneSettings

if TYPE_CHECKING:
    from blockrag.prompt import PromptTemplate

__all__ = ["RUN_FILE", "RunIdentity", "checkpoint_of", "last_checkpoint", "record", "require_same"]

RUN_FILE = "run.json"
_FORMAT = 1
# Steps and rows of a step are counted whichever way they were asked for, and the template holds the prefix.
_FREE = frozenset(
    (
        *("steps", "epochs", "batch_rows", "accumulate", "block_prefix", "gradient_checkpointing"),
        *("eval_steps", "save_steps", "save_limit", "log_steps"),
    )
)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """What a run is.

    Args:
        steps: Optimizer steps in all.
        rows_per_step: Rows of one, over all forwards and processes.
        settings: Those that shape what a step computes; see `of`.
        template: The template that is trained, as `PromptTemplate.to_dict` gives it.
        weights: `hash_tensors` of the model that the run began with; under ZeRO-3, of the weights' names alone.
        tokenizer: `hash_tokenizer` of its tokenizer.
        dtype: Of the weights while training.
        data: Data files by `saving.data_file`, in order.
        eval_data: Files that are scored while training.
        eval_limit: Most lines of them.
    """

    steps: int
    rows_per_step: int
    settings: Mapping[str, Any]
    template: Mapping[str, Any]
    weights: str
    tokenizer: str
    dtype: str
    data: Sequence[Mapping[str, Any]]
    eval_data: Sequence[Mapping[str, Any]]
    eval_limit: int

    @classmethod
    def of(cls, settings: FinetuneSettings, template: PromptTemplate, **others: Any) -> RunIdentity:
        """The identity of a run with these settings and this template; all else as above."""
        shaping = {name: value for name, value in settings.to_dict().items() if name not in _FREE}
        return cls(settings=shaping, template=template.to_dict(), **others)

    def differences(self, begun: RunIdentity) -> list[str]:
        """What differs from a run as it was begun, each as words; the steps are not looked at."""
        found = [
            f"{name} (was {_short(old)}, is {_short(new)})"
            for name, old, new in (
                *_pairs(begun.settings, self.settings),
                ("rows per step", begun.rows_per_step, self.rows_per_step),
                ("dtype", begun.dtype, self.dtype),
            )
            if old != new
        ]
        # A dtype of their own gives other bytes for the same weights.
        if begun.weights != self.weights and begun.dtype == self.dtype:
            found.append("weights of the model")
        if begun.tokenizer != self.tokenizer:
            found.append("tokenizer")
        fields = [name for name, old, new in _pairs(begun.template, self.template) if old != new]
        if fields:
            found.append(f"template ({', '.join(fields)})")
        for name, old_files, new_files in (
            ("data", begun.data, self.data),
            ("eval-data", begun.eval_data, self.eval_data),
        ):
            if _contents(old_files) != _contents(new_files):
                found.append(f"{name} (was {_listed(old_files)}, is {_listed(new_files)})")
        if begun.eval_limit != self.eval_limit and self.eval_data:
            found.append(f"eval-limit (was {begun.eval_limit}, is {self.eval_limit})")
        return found


def last_checkpoint(out: Path) -> Path | None:
    """The last whole checkpoint of a run, None if there is none.

    Args:
        out: The run's directory, which need not exist.
    """
    whole = [path for path in (out / CHECKPOINTS).glob("checkpoint-*") if _step_of(path) is not None]
    return max((path for path in whole if _is_whole(path)), key=lambda path: _step_of(path) or 0, default=None)


def checkpoint_of(out: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from, None to begin.

    Raises:
        InputError: There is something else in the directory or a run, and `resume` is off; or nothing, and it is on.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{str(out)!r} is a file; pass a directory to write the model to")
    found = last_checkpoint(out)
    if resume:
        if found is None:
            raise InputError(f"there is no checkpoint in {str(out / CHECKPOINTS)!r} to resume from; leave --resume out")
        return found
    if found is not None or (out / "config.json").exists():
        raise InputError(f"{str(out)!r} holds a run already; pass --resume to go on with it, or another --output")
    others = (
        sorted(path.name for path in out.iterdir() if path.name not in (CHECKPOINTS, PARTIAL)) if out.exists() else ()
    )
    if others:
        raise InputError(
            f"{str(out)!r} holds other files ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}), which the "
            "model's could replace; pass a new or empty directory as --output"
        )
    return None


def require_same(out: Path, now: RunIdentity) -> int:
    """Refuse to go on with a run as another one.

    Args:
        out: The run's directory.
        now: What it would go on as.

    Returns:
        Steps that the run was to take before.

    Raises:
        InputError: It was begun as another one, names what differs; it would become shorter; or nothing says what it
            was begun with.
    """
    path = out / CHECKPOINTS / RUN_FILE
    try:
        found = json.loads(path.read_text("utf-8"))
        if found.pop("format") != _FORMAT:
            raise ValueError("another format")
        begun = RunIdentity(**found)
        differences = now.differences(begun)
        steps = int(begun.steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{str(path)!r} does not say what the run was begun with ({error}); pass another --output to begin anew"
        ) from error
    if differences:
        raise InputError(
            f"{str(out)!r} was begun with other {', '.join(differences)}; pass what it was begun with, or another "
            "--output to begin anew"
        )
    if now.steps < steps:
        raise InputError(
            f"{str(out)!r} was begun for {steps:,} steps, and these options give {now.steps:,}; pass the --steps or "
            "--epochs it was begun with, or more to make it longer"
        )
    return steps


def record(out: Path, identity: RunIdentity) -> None:
    """Write down what a run is, before its first checkpoint and whenever it goes on."""
    path = out / CHECKPOINTS / RUN_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{RUN_FILE}{PARTIAL}")
    partial.write_text(
        json.dumps({"format": _FORMAT, **asdict(identity)}, indent=1, ensure_ascii=False) + "\n", "utf-8"
    )
    partial.replace(path)


def _step_of(checkpoint: Path) -> int | None:
    """The step in a checkpoint's name; None for a directory of another's making ("checkpoint-400-copy")."""
    step = checkpoint.name.removeprefix("checkpoint-")
    return int(step) if step.isascii() and step.isdecimal() else None


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end; its state is what the Trainer writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_bytes())
    except (OSError, ValueError):
        return False
    return True


def _pairs(begun: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, begun.get(name), now.get(name)) for name in sorted({*begun, *now})]


def _contents(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """What files hold; what they are called does not matter."""
    return [file["sha256"] for file in files]


def _listed(files: Sequence[Mapping[str, Any]]) -> str:
    return ", ".join(f"{file['name']} {file['sha256'][:8]}" for file in files) or "none"


def _short(value: object) -> str:
    return f"{value!r:.40}"
