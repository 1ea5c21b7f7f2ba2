"""Launched by test_finetune_sharded.py, through accelerate and in each process: runs whose weights are shared out.

Usage: accelerate launch --config_file FILE finetune_sharded.py PLAN HELD. PLAN is a JSON list of runs, see
finetune_in_forks.py, done behind each other. HELD is a directory: each process leaves what it held of every run there,
as a JSON list in a file named by the number of the process: when training began the step, all numbers of the model and
its own, and behind the run whether the directory was written.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from finetune_in_forks import run
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback


def share_out_on_cpus() -> None:
    """Have accelerate share out weights over processes on CPUs.

    It does so for every kind of accelerator, and without a word not for CPUs, though torch can. So it is told, where it
    chooses between ways of training and where devices and the process group (gloo) are there, that these are GPUs.
    """
    usual = AcceleratorState.__init__

    def told(self: AcceleratorState, *arguments: Any, **named: Any) -> None:
        found = PartialState._shared_state
        if found.get("distributed_type") is DistributedType.MULTI_CPU:
            found["distributed_type"] = DistributedType.MULTI_GPU
        usual(self, *arguments, **named)

    AcceleratorState.__init__ = told


class Held(TrainerCallback):
    """Counts the model's numbers, and those of them that this process holds, when training begins."""

    def __init__(self) -> None:
        self.found: list[dict[str, int]] = []

    def on_train_begin(
        self, args: object, state: Any, control: object, *, model: torch.nn.Module, **kwargs: object
    ) -> None:
        weights = list(model.parameters())
        own = sum((one.to_local() if isinstance(one, DTensor) else one).numel() for one in weights)
        self.found.append({"step": state.global_step, "all": sum(one.numel() for one in weights), "own": own})


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    share_out_on_cpus()
    held = Held()
    for plan in json.loads(Path(sys.argv[1]).read_text()):
        run(plan, [held])
        held.found[-1]["written"] = Path(plan["out"], "config.json").exists()
    Path(sys.argv[2], f"{os.environ['RANK']}.json").write_text(json.dumps(held.found))
    # Without ending the interpreter: beside gloo's threads torch aborts there now and then (pytorch/pytorch#179291).
    os._exit(0)
