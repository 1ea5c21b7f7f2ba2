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
        run_tokens: Tokens of the whole run, padding left out. The time left is what those to come would take at the
            pace of those since this process began, evaluations and checkpoints included.
    """

    def __init__(self, say: Callable[[str], None], run_tokens: float) -> None:
        self._say = say
        self._run_tokens = run_tokens
        self._began = 0.0
        self._first_tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Called by the Trainer in front of the first step."""
        self._began, self._first_tokens = time.perf_counter(), state.num_input_tokens_seen
        if state.is_world_process_zero and state.global_step:
            self._say(f"going on behind step {state.global_step:,} of {state.max_steps:,}")

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer with every line of its log."""
        logs: Mapping[str, float] = kwargs["logs"]
        if not state.is_world_process_zero:
            return
        if "loss" in logs:
            self._say(self._step_line(state, logs))
        elif line := evaluation_line(logs):
            self._say(f"step {state.global_step:,}: {line}")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Called by the Trainer behind every checkpoint."""
        if state.is_world_process_zero:
            self._say(f"step {state.global_step:,}: checkpoint written")

    def _step_line(self, state: TrainerState, logs: Mapping[str, float]) -> str:
        seen = state.num_input_tokens_seen
        seconds = max(1e-9, time.perf_counter() - self._began)
        pace = (seen - self._first_tokens) / seconds
        left = max(0.0, self._run_tokens - seen) / pace if pace else 0.0
        return (
            f"step {state.global_step:,} of {state.max_steps:,}: loss {logs['loss']:.4f}, "
            f"learning rate {logs['learning_rate']:.2e}, "
            f"{pace:,.0f} tokens/s, {duration(left)} left"
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
