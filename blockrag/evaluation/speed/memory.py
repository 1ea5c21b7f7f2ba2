"""Peak memory of prebuilding, of composing, and of answering, in a fresh process: what they need above the model.

The resident set is read before and its peak after each step (Linux: /proc/self/clear_refs, proc(5)), so the figures
have everything in them that a step touches: states, activations, encoded bytes, temporaries. A fresh process because
memory that an allocator kept from earlier work would hide what a step needs.
"""

from __future__ import annotations

import gc
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils.logging import disable_progress_bar

from blockrag.errors import BlockRAGError, InputError
from blockrag.evaluation.speed.frame import Frame, Progress
from blockrag.evaluation.speed.prompts import PromptSettings, random_prompt
from blockrag.evaluation.speed.shapes import Subject, SubjectSpec
from blockrag.model.sampling import GenerationOptions
from blockrag.rope import angle_table
from blockrag.stores import DiskStore, MemoryStore

if TYPE_CHECKING:
    from blockrag.prompt import SegmentedPrompt
    from blockrag.stores.protocol import BlockStore

__all__ = ["MemorySettings", "measure_memory"]

_CLEAR = Path("/proc/self/clear_refs")
# glibc then returns every larger piece at once, so that the resident set is what is in use.
_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True, slots=True, kw_only=True)
class MemorySettings:
    """What to measure.

    Args:
        length: Tokens of the whole prompt; its cache should be large beside the model's temporaries.
        new_tokens: Tokens of the answer.
        query_tokens: Tokens of the query.
        block_tokens: Least and most tokens of a passage.
        seed: Of the prompt.

    Raises:
        InputError: A number is not possible.
    """

    length: int = 8192
    new_tokens: int = 8
    query_tokens: int = 50
    block_tokens: tuple[int, int] = (128, 256)
    seed: int = 0

    def __post_init__(self) -> None:
        if self.length <= self.query_tokens or self.new_tokens < 1:
            raise InputError(
                f"length {self.length} must exceed the query's {self.query_tokens} tokens, and new tokens "
                f"{self.new_tokens} be at least 1"
            )
        # What JSON makes of a tuple, when the settings come from another process.
        object.__setattr__(self, "block_tokens", tuple(self.block_tokens))
        _ = self.prompts

    @property
    def prompts(self) -> PromptSettings:
        """What the prompt looks like."""
        return PromptSettings(query_tokens=self.query_tokens, block_tokens=self.block_tokens, seed=self.seed)


def measure_memory(
    spec: SubjectSpec,
    settings: MemorySettings,
    *,
    threads: int | None = None,
    note: str = "",
    progress: Progress = lambda line: None,
) -> dict[str, Any]:
    """Peaks of the steps, measured in a process of their own.

    Args:
        spec: The model; on a CPU.
        settings: What to measure.
        threads: To compute with; by default as many as torch chooses.
        note: Kept with the result.
        progress: Told what is going on.

    Returns:
        The result; see docs/benchmarks.md for its keys.

    Raises:
        InputError: This system does not tell peaks, the model is not on a CPU, or it cannot place the prompt.
        RuntimeError: The process failed.
    """
    if not _CLEAR.exists():
        raise InputError("memory is measured on Linux only: it needs /proc/self/clear_refs (proc(5))")
    if spec.device not in ("cpu", "auto"):
        raise InputError(f"device {spec.device!r}: host memory is measured; use --device cpu")
    progress("memory: starting a process of its own ...")
    order = {
        "spec": {**asdict(spec), "device": "cpu"},
        "settings": asdict(settings),
        "threads": threads,
        "note": note,
    }
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=json.dumps(order),
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, **_ENVIRONMENT},
    )
    if done.returncode:
        raise RuntimeError(f"the measuring process ended with {done.returncode}; its messages are above")
    answer = json.loads(done.stdout.splitlines()[-1])
    if "refused" in answer:
        raise InputError(answer["refused"])
    result: dict[str, Any] = answer["result"]
    for warning in result["warnings"]:
        progress(f"warning: {warning}")
    return result


def _measure(subject: Subject, settings: MemorySettings, note: str) -> dict[str, Any]:
    subject.profile.room_after(settings.length + settings.new_tokens)
    frame = Frame("memory", subject, settings, note, lambda line: None)
    frame.open()
    prompt = random_prompt(subject.model, settings.length, settings.prompts)
    _ = subject.model.fingerprint
    _warm_up(subject, prompt)
    steps: dict[str, int] = {}
    with tempfile.TemporaryDirectory(prefix="blockrag-bench-") as directory, closing(DiskStore(directory)) as disk:
        steps["prebuild to disk"] = _peak(lambda: subject.model.materialize(prompt.local_blocks, disk))
        at_rest = disk.stats().bytes
        for name, store in (("disk", disk), ("memory", _copied(disk))):
            steps[f"compose from {name}"] = _peak(_composing(subject, prompt, store))
            steps[f"compose from {name} and answer"] = _peak(_answering(subject, prompt, store, settings.new_tokens))
    tokens = prompt.num_tokens - settings.query_tokens
    cache_bytes = subject.cache_bytes(tokens)
    rates = frame.close()
    return frame.result(
        rates,
        prompt_tokens=prompt.num_tokens,
        blocks=len(prompt.local_blocks),
        bytes_at_rest=at_rest,
        cache_bytes=cache_bytes,
        weight_bytes=sum(parameter.nbytes for parameter in subject.model.model.parameters()),
        steps=[{"step": step, "peak_bytes": peak, "over_cache": peak / cache_bytes} for step, peak in steps.items()],
    )


def _warm_up(subject: Subject, prompt: SegmentedPrompt) -> None:
    """What is computed once per process and kept: angles, threads, compiled code."""
    for regime in subject.profile.regimes:
        for rope in regime.ropes:
            for spec in (rope.keys, rope.values):
                if spec.kind != "none":
                    angle_table(spec, prompt.num_tokens, subject.model.model.device)
    store = MemoryStore()
    for _ in range(2):
        subject.model.start(store=store).extend((*prompt.local_blocks[:2], prompt.blocks[-1]), room=1)


def _composing(subject: Subject, prompt: SegmentedPrompt, store: BlockStore) -> Callable[[], None]:
    # A model of its own: another one's reserve of buffers would hide what the cache takes.
    model = subject.again().model

    def compose() -> None:
        running = model.start(store=store)
        running.extend(prompt.local_blocks, room=1)
        running.close()

    return compose


def _answering(subject: Subject, prompt: SegmentedPrompt, store: BlockStore, new_tokens: int) -> Callable[[], None]:
    model = subject.again().model
    options = GenerationOptions(max_new_tokens=new_tokens, ignore_eos=True)
    return lambda: _finish(model.stream(prompt, options, store=store))


def _finish(stream: Any) -> None:
    stream.finish()


def _copied(disk: DiskStore) -> MemoryStore:
    memory = MemoryStore()
    for key, data in disk.get_many(list(disk.keys())):
        if data is not None:
            memory.put(key, data)
    return memory


def _peak(step: Callable[[], object]) -> int:
    """Bytes by which the resident set rises above what it was before a step."""
    gc.collect()
    # Sets VmHWM, the peak, back to the present resident set.
    _CLEAR.write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    if found is None:
        raise InputError(f"/proc/self/status has no {name}; this kernel does not tell it")
    return int(found[1]) * 1024


def _main() -> None:
    """The process of its own: an order on standard input, the result on standard output."""
    order = json.loads(sys.stdin.read())
    disable_progress_bar()
    if order["threads"] is not None:
        torch.set_num_threads(order["threads"])
    try:
        subject = SubjectSpec(**order["spec"]).load()
        answer: dict[str, Any] = {"result": _measure(subject, MemorySettings(**order["settings"]), order["note"])}
    except BlockRAGError as error:
        answer = {"refused": str(error)}
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main()
