"""`similarity_topk` in plain torch, one block of rows of S at a time."""

import math

import torch
from torch import Tensor

from ..problem import Problem
from .similarity_lse import blocks, grouped


def similarity_topk_fwd(problem: Problem, n: int) -> tuple[Tensor, Tensor]:
    """Returns values [G, N, n] and indices [G, N, n], -inf and -1 where a row has fewer."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, M = problem.q, problem.sizes[2]
    values = q.new_full((*q.shape[:2], n), -math.inf)
    indices = torch.full_like(values, -1, dtype=torch.int64)
    for groups, rows, s in blocks(problem):
        s.masked_fill_(s.isnan(), -math.inf)
        index = _topk(s, min(n, M))
        value = s.gather(2, index)
        values[groups, rows, :M] = value
        indices[groups, rows, :M] = index.masked_fill_(value == -math.inf, -1)
    if groupless:
        return values[0], indices[0]
    return values, indices


def _topk(s: Tensor, n: int) -> Tensor:
    """The places of the n largest s [.., M], which torch.topk finds in no order where they are equal."""
    if s.dtype == torch.float64:
        return s.sort(dim=-1, descending=True, stable=True).indices[..., :n]
    # Of fp32 the bits, as an integer in the order of the numbers, share 64 with the place counted from the end.
    bits = s.add_(0.0).view(torch.int32)  # -0 becomes 0, which equals it
    order = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long() << 32
    order += torch.arange(s.shape[-1] - 1, -1, -1, device=s.device)
    return s.shape[-1] - 1 - (order.topk(n).values & 0xFFFFFFFF)
