"""Rows of features: their length, their dot products, their numbers."""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .tensors import wide

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


def row_numbers(n: int, copies: int, device: torch.device, keep: bool) -> Tensor:
    """`copies` times 0 to n - 1. keep: for the next call, as making them costs a small batch as much as a kernel; only
    for eager code that is neither traced nor transformed, as a trace would hold on to them."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        keep = False  # what a CUDA graph holds on to must be its own
    return (_row_numbers if keep else _row_numbers.__wrapped__)(n, copies, device)


@functools.lru_cache(maxsize=8)
def _row_numbers(n: int, copies: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode could not be saved for a later backward
        return torch.arange(n, device=device).repeat(copies)
