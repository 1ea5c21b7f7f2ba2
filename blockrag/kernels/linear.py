"""Linear layers on few rows, compiled for the processor it runs on: what a question, or a decoded token, is to a model.

Owns the description of the product that `linear.c` reads, and says which products it may be given. Knows no models.
Where there is no library (`blockrag.kernels.build`) it takes nothing, and the caller asks torch.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from blockrag.kernels.build import library

__all__ = ["multiply", "takes"]

# Up to here it was measured against oneDNN, at 1.1 to 1.9 times its rate; far beyond, both are at the processor's.
_MOST_ROWS: Final = 128


class _Linear(ctypes.Structure):
    """`struct linear` of linear.c."""

    _fields_ = (
        ("input", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


def takes(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether `multiply` computes this: float32 in host memory, few rows, no gradients, and AVX-512 to do it with.

    It was measured on an AMD processor, where it is faster than torch's libraries; on Intel's nobody has measured it.
    """
    compiled = library()
    if compiled is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    rows = states.numel() // max(1, states.shape[-1])
    return (
        0 < rows <= _MOST_ROWS
        and compiled.blockrag_linear_pays(torch.get_num_threads())
        and all(
            tensor is None or (tensor.dtype is torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous())
            for tensor in (states, weight, bias)
        )
    )


def multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Product `states weight^T + bias` on torch's threads, which do not change it; only for what `takes` takes.

    Args:
        states: Shape (..., in_features).
        weight: Shape (out_features, in_features), as `torch.nn.Linear` has it.
        bias: Shape (out_features,), or None.

    Returns:
        Float32, shape (..., out_features).

    Raises:
        ValueError: The shapes do not fit each other.
    """
    out_features, in_features = weight.shape
    if states.shape[-1] != in_features or (bias is not None and bias.shape != (out_features,)):
        raise ValueError(f"states of shape {tuple(states.shape)} and weights of shape {tuple(weight.shape)} do not fit")
    compiled = library()
    if compiled is None:
        raise AssertionError("takes() takes nothing where there is no library")
    output = torch.empty(*states.shape[:-1], out_features)
    problem = _Linear(
        input=states.data_ptr(),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        output=output.data_ptr(),
        rows=states.numel() // in_features,
        in_features=in_features,
        out_features=out_features,
        threads=torch.get_num_threads(),
    )
    address = ctypes.byref(problem)
    compiled.blockrag_linear_scratch.restype = ctypes.c_int64
    # From torch's allocator, which raises where there is no memory; the C code allocates nothing.
    scratch = torch.empty(compiled.blockrag_linear_scratch(address))
    problem.scratch = scratch.data_ptr()
    compiled.blockrag_linear(address)
    return output
