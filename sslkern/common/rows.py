"""Rows of features: their length, their dot products, their numbers."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import plain, transformed, wide

EPS = 1e-12  # rows shorter than this are divided by it


def unit(x: Tensor) -> Tensor:
    """Rows of x [.., D] divided by their norm, which is computed in fp32; rounded back to the type of x.

    A row of zeros gets a gradient divided by EPS, as torch has it, which in fp16 would be infinite and is 0.
    """
    if x.dtype == torch.float16:
        norm = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
        return (x.float() / norm.masked_fill(norm < EPS, math.inf)).to(x.dtype)
    if x.dtype == torch.bfloat16:
        return F.normalize(x.float(), dim=-1, eps=EPS).to(x.dtype)
    return F.normalize(x, dim=-1, eps=EPS)


def dots(a: Tensor, b: Tensor) -> Tensor:
    """<a_i, b_i> [N] of rows a, b [N, D], in fp32 (fp64)."""
    return (wide(a) * wide(b)).sum(-1)


def row_numbers(n: int, copies: int, device: torch.device) -> Tensor:
    """`copies` times 0 to n - 1; kept, as for a small batch making them would cost as much as a kernel."""
    # What a CUDA graph, a trace or torch.func holds on to must be its own, and a fake tensor must not stay.
    fresh = torch.compiler.is_compiling() or transformed() or not plain()
    fresh = fresh or (device.type == "cuda" and torch.cuda.is_current_stream_capturing())
    return (_row_numbers.__wrapped__ if fresh else _row_numbers)(n, copies, device)


@functools.lru_cache(maxsize=8)
def _row_numbers(n: int, copies: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode could not be saved for a later backward
        return torch.arange(n, device=device).repeat(copies)
