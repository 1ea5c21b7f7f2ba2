"""What a benchmark says about where it ran: hardware, versions, commit, and the rates the hardware reaches.

The rates are measured in the run itself, because a shared or throttled machine does not reach its data sheet. Host
names and paths are left out: they say nothing that helps to repeat a measurement.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = [
    "Rates",
    "commit",
    "describe_machine",
    "load_average",
    "measure_rates",
    "synchronize",
    "versions",
]

_ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, slots=True)
class Rates:
    """What the device reaches with the threads the benchmark uses.

    Args:
        copy_bytes_per_s: Bytes copied per second, each of them read once and written once.
        matrix_flops_per_s: Floating-point operations per second of a large matrix product, a multiplication and an
            addition being two.
        upload_bytes_per_s: Bytes per second from pinned host memory to a GPU; None on a CPU.
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float
    upload_bytes_per_s: float | None = None


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """The fastest of many short copies and matrix products.

    On a CPU each takes a millisecond or two, so that on a busy machine some of them run without interruption: a rate
    that other work has slowed down would give a bound that is none. The copies go through 256 MiB (a GPU: 2 GiB) in
    pieces, so that no cache holds them.
    """
    on_gpu = device != "cpu"
    source = torch.ones((1 << 31 if on_gpu else 1 << 28) // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    pieces = source.numel() // ((1 << 28 if on_gpu else 1 << 23) // 4)
    copies = [partial(to.copy_, of) for to, of in zip(target.chunk(pieces), source.chunk(pieces), strict=True)]
    copy_s = _fastest([*copies, *copies], device)
    size = 8192 if on_gpu else 512
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = partial(torch.mm, left, right, out=torch.empty_like(left))
    upload_bytes_per_s = None
    if on_gpu:
        piece = target.chunk(pieces)[0]
        upload_s = _fastest([partial(piece.copy_, torch.empty(piece.shape, pin_memory=True))] * 10, device)
        upload_bytes_per_s = piece.numel() * 4 / upload_s
    product_s = _fastest([product] * (20 if on_gpu else 400), device)
    return Rates(
        copy_bytes_per_s=source.numel() * 4 / pieces / copy_s,
        matrix_flops_per_s=2 * size**3 / product_s,
        upload_bytes_per_s=upload_bytes_per_s,
    )


def _fastest(actions: Sequence[Callable[[], object]], device: str) -> float:
    """Seconds of the fastest action."""
    times = []
    for action in actions:
        synchronize(device)
        started = time.perf_counter()
        action()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)


def synchronize(device: str) -> None:
    """Wait for the device; a CPU never lags behind."""
    if device != "cpu":
        torch.cuda.synchronize()


def describe_machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads, and the GPU where one is used."""
    described = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device != "cpu":
        described["gpu"] = torch.cuda.get_device_name()
    return described


def versions() -> dict[str, str]:
    """Versions of what does the work."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def commit() -> dict[str, Any]:
    """The commit of this working tree, and whether `blockrag/` or `benchmarks/*.py` differ from it."""
    head = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", "blockrag", "benchmarks/*.py")
    return {"commit": head or "unknown", "modified": bool(changed)}


def load_average() -> float | None:
    """Runnable processes averaged over the last minute, this one included; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
