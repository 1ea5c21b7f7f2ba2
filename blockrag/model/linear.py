"""Linear layers through oneDNN, where torch's default library leaves half of the processor unused.

torch multiplies float32 matrices on x86 with Intel's MKL, which runs narrower code on other makers' processors: on an
AMD EPYC with AVX-512 it measured 120 to 210 GFLOP/s where oneDNN, which torch ships as well, measured 300 to 440, over
the same weights as they lie in memory. That is every linear layer of every forward, so it is worth choosing.

The layers of a model are switched while blockrag runs a forward, and switched back behind it: nothing is copied, and
the model is left as it was. Where a layer is not plain (quantised, adapted, another dtype or device, training), or the
processor is Intel's, nothing changes.

API: `torch.ops.mkldnn._linear_pointwise`, which torch's own compiler emits for linear layers.
"""

from __future__ import annotations

import os
import platform
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.functional import linear

if TYPE_CHECKING:
    from types import TracebackType

__all__ = ["FastLinears", "onednn_is_faster"]


@lru_cache(maxsize=1)
def onednn_is_faster() -> bool:
    """Whether linear layers go through oneDNN on this machine; a fact of the processor, not of a timing.

    BLOCKRAG_CPU_KERNELS=off, which switches the compiled kernels off, keeps torch's choice here too.
    """
    return (
        os.environ.get("BLOCKRAG_CPU_KERNELS") != "off"
        and platform.machine() == "x86_64"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and _vendor() not in ("", "GenuineIntel")
    )


class FastLinears:
    """A context in which the linear layers of a model run through oneDNN.

    It may be entered again inside, but not by two threads at once.

    Args:
        model: The model. Layers that are replaced later (adapters) are not noticed, and stay as they are.
    """

    def __init__(self, model: nn.Module) -> None:
        plain = (layer for layer in model.modules() if type(layer) is nn.Linear) if onednn_is_faster() else ()
        # A layer whose forward is somebody else's already (offloading, patches) is left alone.
        self._layers = tuple(layer for layer in plain if "forward" not in vars(layer))
        self._depth = 0

    def __enter__(self) -> None:
        if self._depth == 0:
            for layer in self._layers:
                # Past nn.Module's own __setattr__, which looks for parameters and submodules.
                vars(layer)["forward"] = MethodType(_forward, layer)
        self._depth += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            for layer in self._layers:
                vars(layer).pop("forward", None)


def _forward(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
    weight = layer.weight
    if (
        states.dtype is torch.float32
        and weight.dtype is torch.float32
        and states.device.type == weight.device.type == "cpu"
        and type(weight) is nn.Parameter
        and not torch.is_grad_enabled()
        and states.numel() > 0
    ):
        result: Any = torch.ops.mkldnn._linear_pointwise.default(states, weight, layer.bias, "none", [], "")
        return result  # type: ignore[no-any-return]
    return linear(states, weight, layer.bias)


def _vendor() -> str:
    """The processor's maker as Linux names it; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "")
