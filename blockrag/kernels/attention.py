"""Attention of few queries over many tokens, compiled for the processor it runs on.

Owns the description of the problem that `attention.c` reads, and says which problems it may be given. Knows neither
models nor caches. Where there is no library (`blockrag.kernels.build`) it takes nothing, and the caller asks torch.
"""

from __future__ import annotations

import ctypes
from typing import Final

import torch

from blockrag.kernels.build import library

__all__ = ["attend", "takes", "usable"]

_Strides: Final = ctypes.c_int64 * 3


class _Attention(ctypes.Structure):
    """`struct attention` of attention.c."""

    _fields_ = (
        ("query", ctypes.c_void_p),
        ("key", ctypes.c_void_p),
        ("value", ctypes.c_void_p),
        ("mask", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("scratch", ctypes.c_void_p),
        ("query_strides", _Strides),
        ("key_strides", _Strides),
        ("value_strides", _Strides),
        ("mask_strides", _Strides),
        ("batch", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("kv_heads", ctypes.c_int64),
        ("queries", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("causal", ctypes.c_int32),
        ("threads", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


def usable() -> bool:
    """Whether there is a compiled kernel, and a faster one than torch's.

    Measured with vectors of eight floats and more it is faster for every number of queries and tokens, in decoding and
    in prefill; with vectors of four (SSE, NEON) it is not.
    """
    compiled = library()
    return compiled is not None and bool(compiled.blockrag_attention_pays(torch.get_num_threads()))


def takes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None) -> bool:
    """Whether `attend` computes this: float32 in host memory, rows contiguous, no gradients, nothing empty."""
    if not usable() or torch.compiler.is_compiling():
        return False
    if mask is not None and (mask.dtype != torch.bool or not _readable(mask)):
        return False
    grad = torch.is_grad_enabled()
    return all(
        tensor.dtype == torch.float32 and _readable(tensor) and not (grad and tensor.requires_grad)
        for tensor in (query, key, value)
    )


def _readable(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.numel() > 0 and (tensor.stride(-1) == 1 or tensor.shape[-1] == 1)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    scale: float,
    causal: bool = False,
) -> torch.Tensor:
    """softmax(scale * query key^T) value, on torch's threads; only for what `takes` takes.

    Args:
        query: Shape (batch, heads, queries, dim).
        key: Shape (batch, kv_heads, tokens, dim); `heads` is a multiple of `kv_heads`, and query head h attends to
            key head h // (heads / kv_heads).
        value: Shape (batch, kv_heads, tokens, value_dim).
        mask: Bool, (batch or 1, heads or 1, queries or 1, tokens); True where a query sees a token. A query that sees
            nothing gets zeros, as from torch.
        scale: Factor on the scores, above 0.
        causal: The last query sees every token, the one before it all but the last, and so on.

    Returns:
        Float32, shape (batch, queries, heads, value_dim), contiguous. The number of threads changes it by rounding,
        their timing does not.

    Raises:
        ValueError: The shapes do not fit each other, or the scale is not above 0.
    """
    batch, heads, queries, dim = query.shape
    _, kv_heads, tokens, value_dim = value.shape
    if key.shape != (batch, kv_heads, tokens, dim) or value.shape[0] != batch or heads % kv_heads:
        shapes = [tuple(tensor.shape) for tensor in (query, key, value)]
        raise ValueError(f"query, key and value of shapes {shapes} do not fit each other")
    if causal and queries > tokens:
        raise ValueError(f"{queries} queries cannot be the last of {tokens} tokens; pass causal=False")
    if not scale > 0:
        raise ValueError(f"scale is {scale}; it must be above 0")
    compiled = library()
    if compiled is None:
        raise AssertionError("takes() takes nothing where there is no library")
    output = torch.empty(batch, queries, heads, value_dim)
    seen = None if mask is None else mask.expand(batch, heads, queries, tokens)
    problem = _Attention(
        query=query.data_ptr(),
        key=key.data_ptr(),
        value=value.data_ptr(),
        mask=None if seen is None else seen.data_ptr(),
        output=output.data_ptr(),
        query_strides=_Strides(*query.stride()[:3]),
        key_strides=_Strides(*key.stride()[:3]),
        value_strides=_Strides(*value.stride()[:3]),
        mask_strides=_Strides() if seen is None else _Strides(*seen.stride()[:3]),
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        tokens=tokens,
        dim=dim,
        value_dim=value_dim,
        causal=causal,
        threads=torch.get_num_threads(),
        scale=scale,
    )
    address = ctypes.byref(problem)
    compiled.blockrag_attention_scratch.restype = ctypes.c_int64
    # From torch's allocator, which raises where there is no memory; the C code allocates nothing.
    scratch = torch.empty(compiled.blockrag_attention_scratch(address))
    problem.scratch = scratch.data_ptr()
    compiled.blockrag_attention(address)
    return output
