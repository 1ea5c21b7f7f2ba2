"""What a benchmark says about where it ran: hardware, versions, commit, and the rates the hardware reaches.

The rates are measured in the run itself, because a shared or throttled machine does not reach its data sheet. Host
names and paths are left out: they say nothing that helps to repeat a measurement.
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = [
    "Rates",
    "best_time",
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
    """

    copy_bytes_per_s: float
    matrix_flops_per_s: float


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """Best of many short copies and matrix products, so that a busy machine has quiet moments for some of them.

    A CPU copies 128 MiB and multiplies 1024 x 1024, a GPU 1 GiB and 8192 x 8192.
    """
    on_gpu = device != "cpu"
    source = torch.ones((1 << 30 if on_gpu else 1 << 27) // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    copy_s = best_time(lambda: target.copy_(source), device)
    size = 8192 if on_gpu else 1024
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    product_s = best_time(lambda: torch.mm(left, right, out=out), device)
    return Rates(copy_bytes_per_s=source.numel() * 4 / copy_s, matrix_flops_per_s=2 * size**3 / product_s)


def best_time(action: Callable[[], object], device: str, *, repeats: int = 40) -> float:
    """Seconds of the fastest of several runs: for a rate, what disturbs a run only makes it slower."""
    times = []
    for _ in range(repeats):
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
