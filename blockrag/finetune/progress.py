"""A run's progress as lines for people, in place of the Trainer's bars and printed dictionaries."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

__all__ = ["SaysProgress", "duration", "evaluation_line"]


class SaysProgress(TrainerCallback):  # type: ignore[misc]
    """Says a line for every line of the Trainer's log, and for every checkpoint; in the first process only.

    Args:
        say: Gets each line.
        row_tokens: Tokens of a row, on average, padding left out.
    """

    def __init__(self, say: Callable[[str], None], row_tokens: float) -> None:
        self._say = say
        self._row_tokens = row_tokens
        self._began = 0.0
        self._first_step = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the Trainer in front of the first step."""
        self._began, self._first_step = time.perf_counter(), state.global_step
        if state.is_world_process_zero and state.global_step:
            self._say(f"going on behind step {state.global_step:,} of {state.max_steps:,}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer with every line of its log."""
        logs: Mapping[str, float] = kwargs["logs"]
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._say(self._step_line(args, state, logs))
        elif line := evaluation_line(logs):
            self._say(f"step {state.global_step:,}: {line}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Called by the Trainer behind every checkpoint."""
        if state.is_world_process_zero:
            self._say(f"step {state.global_step:,}: checkpoint written")

    def _step_line(self, args: TrainingArguments, state: TrainerState, logs: Mapping[str, float]) -> str:
        taken = state.global_step - self._first_step
        seconds = max(1e-9, time.perf_counter() - self._began)
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        left = (state.max_steps - state.global_step) * seconds / max(1, taken)
        return (
            f"step {state.global_step:,} of {state.max_steps:,}: loss {logs['loss']:.4f}, "
            f"learning rate {logs['learning_rate']:.2e}, "
            f"{rows * self._row_tokens * taken / seconds:,.0f} tokens/s, {duration(left)} left"
        )


def evaluation_line(logs: Mapping[str, float]) -> str:
    """What an evaluation found, in both attentions; empty if the mapping holds none.

    Args:
        logs: A line of the Trainer's log.
    """
    if "eval_full_exact_match" not in logs:
        return ""
    parts = [
        f"{mode} attention {logs[f'eval_{mode}_exact_match']:.1f} % (loss {logs[f'eval_{mode}_loss']:.3f})"
        for mode in ("full", "block")
    ]
    return f"exact match in {', '.join(parts)}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "40 s", "12 min", "3 h 05 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
