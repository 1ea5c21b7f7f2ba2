"""What a result says about where it was measured: hardware, versions, commit, and the rates the hardware reaches.

The rates are measured in the run itself, before and after what they are compared with, because a shared or throttled
machine does not reach its data sheet. Host names and paths are left out: they say nothing that helps to repeat a
measurement.
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

import blockrag

__all__ = [
    "Rates",
    "busy_share",
    "busy_warning",
    "commit",
    "describe_machine",
    "filesystem_of",
    "load_average",
    "measure_rates",
    "synchronize",
    "versions",
]

# Above this share something else than a desktop's housekeeping runs.
_BUSY = 0.15
_PACKAGE = Path(blockrag.__file__).resolve().parent


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

    def best(self, other: Rates) -> Rates:
        """The higher of each rate: what the machine can reach, whatever else it did meanwhile."""
        uploads = [rates.upload_bytes_per_s for rates in (self, other) if rates.upload_bytes_per_s is not None]
        return Rates(
            copy_bytes_per_s=max(self.copy_bytes_per_s, other.copy_bytes_per_s),
            matrix_flops_per_s=max(self.matrix_flops_per_s, other.matrix_flops_per_s),
            upload_bytes_per_s=max(uploads, default=None),
        )


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """The fastest of many short copies and matrix products.

    On a CPU each takes a few milliseconds at most, so that on a busy machine some of them run without interruption: a
    rate that other work has slowed down would give a bound that is none. The copies go through 256 MiB (a GPU: 2 GiB)
    in pieces, so that no cache holds them.
    """
    on_gpu = device != "cpu"
    source = torch.ones((1 << 31 if on_gpu else 1 << 28) // 4, dtype=torch.float32, device=device)
    target = torch.zeros_like(source)
    pieces = source.numel() // ((1 << 28 if on_gpu else 1 << 23) // 4)
    copies = [partial(to.copy_, of) for to, of in zip(target.chunk(pieces), source.chunk(pieces), strict=True)]
    copy_s = _fastest(copies * 2, device)
    upload_bytes_per_s = None
    if on_gpu:
        piece = target.chunk(pieces)[0]
        upload_s = _fastest([partial(piece.copy_, torch.empty(piece.shape, pin_memory=True))] * 10, device)
        upload_bytes_per_s = piece.numel() * 4 / upload_s
    # Small enough to stay in a processor's cache, and large enough to use all of it: which one is faster differs.
    sizes = {8192: 20} if on_gpu else {512: 60, 1024: 10}
    return Rates(
        copy_bytes_per_s=source.numel() * 4 / pieces / copy_s,
        matrix_flops_per_s=max(_matrix_flops_per_s(size, count, device, dtype) for size, count in sizes.items()),
        upload_bytes_per_s=upload_bytes_per_s,
    )


def _matrix_flops_per_s(size: int, count: int, device: str, dtype: torch.dtype) -> float:
    """The faster of the libraries that torch multiplies with: a rate that only one of them reaches is the machine's."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    products: list[Callable[[], object]] = [partial(torch.mm, left, right, out=torch.empty_like(left))]
    if device == "cpu" and dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        # oneDNN, which torch's compiler uses for linear layers: on some processors twice as fast as torch.mm.
        packed = right.to_mkldnn()
        products.append(lambda: torch.ops.mkldnn._linear_pointwise(left, packed, None, "none", [], ""))
    return max(2 * size**3 / _fastest([product] * count, device) for product in products)


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
    """Processor, cores, threads, memory, and the GPU where one is used."""
    described = {
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
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
        "blockrag": blockrag.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
    }


def commit() -> dict[str, Any]:
    """The commit of blockrag's working tree, and whether the package differs from it; None where it is installed."""
    # An installed package may lie in somebody else's working tree, in its virtual environment for instance.
    if _git("ls-files", "--error-unmatch", "__init__.py") == "":
        return {"commit": None, "modified": None}
    return {"commit": _git("rev-parse", "HEAD"), "modified": bool(_git("status", "--porcelain", "--", "."))}


def load_average() -> float | None:
    """Runnable processes averaged over the last minute, this one included; None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def busy_share() -> float | None:
    """The share of all processor time that others take while this process waits; None where the system does not say.

    The load average would count this process's own work of the last minute.
    """
    # Threads that spin for a while after their work stop first.
    time.sleep(0.2)
    before = _processor_ticks()
    time.sleep(0.3)
    after = _processor_ticks()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return round((after[0] - before[0]) / (after[1] - before[1]), 3)


def busy_warning(share: float | None) -> str | None:
    """What to say when other work uses a good part of the machine before a measurement has begun."""
    if share is None or share < _BUSY:
        return None
    return f"other work takes {share:.0%} of this machine's processors: times will be too long"


def _processor_ticks() -> tuple[int, int] | None:
    """Ticks of all processors so far, the busy ones and all of them (proc(5), /proc/stat)."""
    try:
        fields = Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:9]
    except OSError:
        return None
    ticks = [int(field) for field in fields]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, sum(ticks)


def filesystem_of(path: Path) -> str | None:
    """The type of the file system a path is on, such as "ext4" or "tmpfs"; None where the system does not say."""
    try:
        mounts = Path("/proc/mounts").read_text("utf-8").splitlines()
    except OSError:
        return None
    resolved = path.resolve()
    best, found = -1, None
    for line in mounts:
        point, kind = line.split()[1:3]
        # The longest mount point wins, and of those on the same point the last.
        if resolved.is_relative_to(point) and len(point) >= best:
            best, found = len(point), kind
    return found


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
