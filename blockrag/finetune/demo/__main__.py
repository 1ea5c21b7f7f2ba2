"""`python -m blockrag.finetune.demo`: make the models of some seeds, and measure them."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from blockrag.finetune.demo.recipe import make
from blockrag.finetune.demo.release import release
from blockrag.finetune.demo.table import table

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Make and measure; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m blockrag.finetune.demo",
        description="Make the demo model of each seed, and write the table of what block fine-tuning gives.",
    )
    parser.add_argument("--out", type=Path, required=True, help="directory for the models and the table")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="one model each")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the steps to make, for trying out")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16, where the processor has it")
    parser.add_argument("--threads", type=int, default=1, help="threads of each computation")
    parser.add_argument("--no-table", action="store_true", help="make the models alone")
    parser.add_argument("--release", type=Path, help="directory to write the first seed's model to, as it ships")
    chosen = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(chosen.threads)
    for seed in chosen.seeds:
        make(chosen.out / f"seed-{seed}", seed, scale=chosen.scale, bf16=chosen.bf16)
    if not chosen.no_table:
        found = table(chosen.out, chosen.seeds)
        (chosen.out / "table.md").write_text(found, "utf-8")
        print(found)  # noqa: T201 (the result of the command)
        if chosen.release is not None:
            options = " --bf16" if chosen.bf16 else ""
            command = f"python -m blockrag.finetune.demo --out DIR --seeds {' '.join(map(str, chosen.seeds))}{options}"
            release(chosen.out, chosen.seeds[0], chosen.release, command, found)


if __name__ == "__main__":
    main()
