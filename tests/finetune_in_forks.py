"""Run by test_finetune_processes.py in a process of its own: runs that are killed, resumed, or done by two processes.

Usage: finetune_in_forks.py PLAN, a JSON list of runs. Each has a `name`, the arguments of `finetune` (`model`, `data`,
`eval_data`, `out`, `resume`), `settings`, and optionally `processes`, and `die`: the step behind which the run is
killed, or "saving" for while the finished directory is written. Prints a JSON line for each: its name, and what its
processes ended with (the number of the signal, negative, or the exit code).

The libraries take seconds to import, so it is done once, and every run is a fork made before they are used.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from transformers import TrainerCallback

from blockrag.finetune import saving
from blockrag.finetune.run import finetune
from blockrag.finetune.settings import FinetuneSettings


def die(*arguments: object) -> None:
    """End like a power cut: nothing is flushed, closed or caught."""
    os.kill(os.getpid(), signal.SIGKILL)


class DiesBehind(TrainerCallback):
    """Dies behind a step, before it is logged or saved."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: object, state: Any, control: object, **kwargs: object) -> None:
        if state.global_step == self.step:
            die()


def run(plan: dict[str, Any], callbacks: Sequence[TrainerCallback] = ()) -> None:
    torch.set_num_threads(1)
    if plan.get("die") == "saving":
        saving.plot_history = die
    if isinstance(plan.get("die"), int):
        callbacks = [*callbacks, DiesBehind(plan["die"])]
    settings = dict(plan["settings"])
    finetune(
        plan["model"],
        [plan["data"]],
        plan["out"],
        FinetuneSettings(**settings),
        eval_data=[plan["eval_data"]] if "eval_data" in plan else [],
        resume=plan.get("resume", False),
        device="cpu",
        callbacks=callbacks,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def forked(plan: dict[str, Any]) -> list[int]:
    """What the processes of a run ended with."""
    processes, port = plan.get("processes", 1), free_port()
    children = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            if processes > 1:
                # What torchrun and accelerate launch set.
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
                os.environ |= {"LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
            try:
                run(plan)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for one in json.loads(Path(sys.argv[1]).read_text()):
        sys.stdout.write(json.dumps([one["name"], forked(one)]) + "\n")
        sys.stdout.flush()
    # What the seed decides, for a process whose hashes are others.
    from test_finetune_rows import drawn

    sys.stdout.write(json.dumps(["drawn", drawn()]) + "\n")
