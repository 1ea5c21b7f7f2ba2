"""What a fine-tuned directory holds, and how it comes to hold it: whole, or not loadable at all.

    config.json, model.safetensors, tokenizer files   load with plain transformers
    block_attention.json                              what blockrag reads: fine-tuned, template, most blocks and tokens
    adapter/                                          the adapters alone, where adapters were trained
    train_log.json, train.png, README.md              how it was made
    checkpoints/checkpoint-N/                         the Trainer's, to resume from and to evaluate
    checkpoints/run.json                              what the run was begun with; see `resuming`

The weights are written beside their place and moved; config.json, without which nothing loads the directory, last.
"""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

import blockrag
from blockrag.finetune.plots import plot_history
from blockrag.model.facts import BlockAttentionFacts, save_facts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainerControl, TrainerState, TrainingArguments

__all__ = ["CHECKPOINTS", "LOG_FILE", "PARTIAL", "FactsInCheckpoints", "data_file", "save_finetuned", "versions"]

CHECKPOINTS = "checkpoints"
LOG_FILE = "train_log.json"
PARTIAL = ".partial"


class FactsInCheckpoints(TrainerCallback):  # type: ignore[misc]
    """Writes the block-attention facts into every checkpoint, so that each can be evaluated as it is.

    Args:
        facts: What the finished directory will say.
    """

    def __init__(self, facts: BlockAttentionFacts) -> None:
        self._facts = facts

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Called by the Trainer behind every checkpoint."""
        if state.is_world_process_zero:
            save_facts(self._facts, Path(args.output_dir) / f"checkpoint-{state.global_step}")


def data_file(path: Path, lines: int) -> dict[str, object]:
    """What a log says of a data file: its name, not where it lay, and its SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"name": path.name, "sha256": digest.hexdigest(), "lines": lines}


def versions() -> dict[str, str]:
    """What a run depended on."""
    names = ("torch", "transformers", "accelerate", "tokenizers")
    return {"blockrag": blockrag.__version__, "python": platform.python_version()} | {n: version(n) for n in names}


def save_finetuned(
    out: Path,
    write_weights: Callable[[Path], None],
    tokenizer: PreTrainedTokenizerBase,
    facts: BlockAttentionFacts,
    log: Mapping[str, Any],
) -> None:
    """Write the finished directory; see above.

    Args:
        out: The directory; what of an earlier run is in it is replaced.
        write_weights: Writes the model, adapters merged, to a directory, and the adapters to `adapter` in it.
        tokenizer: Its tokenizer.
        facts: What blockrag will read.
        log: JSON types; see `run.finetune`.
    """
    out.mkdir(parents=True, exist_ok=True)
    partial = out / PARTIAL
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write_weights(partial)
        tokenizer.save_pretrained(partial)
        save_facts(facts, partial)
        (partial / LOG_FILE).write_text(json.dumps(log, indent=1, ensure_ascii=False) + "\n", "utf-8")
        (partial / "README.md").write_text(_card(log, facts), "utf-8")
        plot_history(log["history"], partial / "train.png")
        names = sorted(path.name for path in partial.iterdir() if path.name != "config.json")
        (out / "config.json").unlink(missing_ok=True)
        for stale in out.glob("*.safetensors*"):
            # Where the new weights are cut into several files, a whole one would be loaded in place of them.
            stale.unlink()
        for name in (*names, "config.json"):
            if (out / name).is_dir():
                shutil.rmtree(out / name)
            (partial / name).replace(out / name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _card(log: Mapping[str, Any], facts: BlockAttentionFacts) -> str:
    """A model card that says what was run; what the model is good for, its maker has to add."""
    settings = log["settings"]
    rows = [f"| {name} | {_shown(value)} |" for name, value in settings.items()]
    name, prefix = "unknown", ""
    if facts.template is not None:
        name, prefix = facts.template.name, facts.template.block_attention_prefix
    what = f"in full attention alone. Prompt template `{name}`."
    if settings["variants"] != "full":
        what = f"""for Block-Attention (arXiv 2409.15355): passages
that do not see each other, whose KV states can be stored and reused. Prompt template `{name}`, block prefix
`{prefix}`. Seen in training: up to
{facts.max_blocks} blocks and {facts.max_tokens} positions."""
    files = "\n".join(f"- {file['name']}: {file['lines']} lines, SHA-256 {file['sha256']}" for file in log["data"])
    return f"""---
tags: [block-attention, rag]
---
# {log["name"]}

{log["base"]}, fine-tuned with blockrag {log["versions"]["blockrag"]} {what}

## Data
{files}

{log["samples"]} samples, {log["tokens_seen"]:,} tokens seen in {log["steps"]} steps ({_duration(log["seconds"])}).

## Settings
| setting | value |
|---|---|
{chr(10).join(rows)}

## While training
{_evaluations(log["history"])}
"""


def _evaluations(history: Sequence[Mapping[str, Any]]) -> str:
    rows = [entry for entry in history if "eval_full_exact_match" in entry]
    if not rows:
        return "Nothing was evaluated; `blockrag eval` does it."
    lines = ["Exact match in percent on held-out questions, without generating; `train_log.json` has all of it.", ""]
    lines += ["| step | full attention | block attention |", "|---|---|---|"]
    lines += [
        f"| {entry['step']} | {entry['eval_full_exact_match']:.1f} | {entry['eval_block_exact_match']:.1f} |"
        for entry in rows
    ]
    return "\n".join(lines)


def _shown(value: object) -> str:
    return "none" if value == "" else str(value)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"
