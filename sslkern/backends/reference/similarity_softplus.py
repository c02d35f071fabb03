"""`similarity_softplus` in plain torch, over the blocks of S of `similarity_lse`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..problem import Problem
from .similarity_lse import blocks, finite, grouped, spread_nonfinite


def similarity_softplus_fwd(
    problem: Problem, bias, weights, sign: float,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns total [G], row [G, N], and the gradients of total, None where not needed: dq [G, N, D], dk [G, M, D],
    dscale [G], dbias [G, N], dk_bias [G, M]; k=None: all of the gradient in dq."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, k, keys, scale = problem.q, problem.k, problem.keys, problem.full_scale
    if groupless:
        bias, weights = (None if x is None else x.unsqueeze(0) for x in (bias, weights))

    row = q.new_zeros(q.shape[:2])
    dq = torch.zeros_like(q) if need_q or need_scale and not need_k else None
    dk = dq if k is None else torch.zeros_like(k) if need_k else None
    dbias = torch.zeros_like(row) if need_bias else None
    dk_bias = q.new_zeros(keys.shape[:2]) if need_k_bias else None
    q_factor, k_factor = (finite(q), finite(keys)) if need_scale else (q, keys)
    for groups, rows, s in blocks(problem):
        if sign < 0:  # what is left out stays at -inf
            s.neg_().masked_fill_(s == math.inf, -math.inf)
        if bias is not None:  # NaN or infinite it would bring back what is left out
            left_out = s == -math.inf
            s.add_(bias[groups, rows, None], alpha=sign).masked_fill_(left_out, -math.inf)
        # not torch's own threshold of 20, where in fp64 the rest still counts
        row[groups, rows] = F.softplus(s, threshold=40).sum(2)
        if dq is None and dk is None and not need_bias and not need_k_bias:
            continue
        w = s.sigmoid_()
        if weights is not None:  # what is left out weighs 0, whatever the weight of its row
            left_out = w == 0
            w.mul_(weights[groups, rows, None]).masked_fill_(left_out, 0)
        if sign < 0:
            w.neg_()
        if dq is not None:
            dq[groups, rows] += _bmm(w, k_factor[groups])
        if dk is not None:
            dk[groups] += _bmm(w.transpose(1, 2), q_factor[groups, rows])
        if need_bias:
            dbias[groups, rows] = w.sum(2)
        if need_k_bias:
            dk_bias[groups] += w.sum(1)

    total = (row if weights is None else row * weights).sum(1)
    dscale = None
    if need_scale:  # <Q, W K>, of which <Z, (W + W^T) Z> is twice
        dscale = (dq * q_factor).sum((1, 2)) if dq is not None else (dk * k_factor).sum((1, 2))
        dscale = dscale / 2 if k is None else dscale
        spread_nonfinite(dq, keys)
        spread_nonfinite(dk, q)
    dq = dq.mul_(scale) if need_q else None
    dk = dk.mul_(scale) if need_k and k is not None else None
    out = total, row, dq, dk, dscale, dbias, dk_bias
    return tuple(x[0] if groupless and x is not None else x for x in out)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, written into a tensor that exists, which autocast leaves alone."""
    return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))
