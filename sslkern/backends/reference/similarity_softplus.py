"""`similarity_softplus` in plain torch, over the blocks of S of `similarity_lse`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.tensors import map_given, needed
from ..problem import Problem
from .similarity_lse import blocks, grouped, products_for_scale, sums_for, with_group, without_group


def similarity_softplus_fwd(
    problem: Problem, bias: Tensor | None, weights: Tensor | None, sign: float,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns total [G], row [G, N], and the gradients of total, None where not needed: dq [G, N, D], dk [G, M, D],
    dscale [G], dbias [G, N], dk_bias [G, M]; k=None: all of the gradient in dq."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, k, scale = problem.q, problem.k, problem.full_scale
    if groupless:
        bias, weights = with_group(bias, weights)

    row = q.new_zeros(q.shape[:2])
    (dq, dk, dk_bias), q_factor, k_factor = sums_for(problem, need_q, need_k, need_scale, need_k_bias)
    dbias = torch.zeros_like(row) if need_bias else None
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
    if need_scale:
        dscale = products_for_scale(problem, dq, dk, q_factor, k_factor).sum((1, 2))
        if k is None:  # <Z, (W + W^T) Z> is twice as much
            dscale = dscale / 2
    dq, dk = needed((need_q, need_k and k is not None), dq, dk)
    dq, dk = map_given(lambda x: x.mul_(scale), dq, dk)
    out = total, row, dq, dk, dscale, dbias, dk_bias
    return tuple(without_group(*out)) if groupless else out


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, written into a tensor that exists, which autocast leaves alone."""
    return torch.bmm(a, b, out=a.new_empty(a.shape[0], a.shape[1], b.shape[2]))
