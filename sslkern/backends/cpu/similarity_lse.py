"""`similarity_lse` on the native kernels: this file allocates the results."""

import torch
from torch import Tensor

from sslkern import _cpu

from ...common.tensors import map_given
from ..problem import Problem
from ..reference import similarity_lse as reference
from ._native import native, new, new_needed


def similarity_lse_fwd(problem: Problem, columns: bool, need_best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    q, groups, sizes = problem.q, problem.q.shape[:-2], problem.sizes
    _, N, M, _ = sizes
    col, best, kept = new_needed(
        q, (columns, (*groups, M)), (need_best, (*groups, N + M * columns)), (kept_rows, (*groups, kept_rows, M))
    )
    if 0 in sizes:
        return *reference.similarity_lse_fwd(problem, columns, need_best, 0)[:3], kept
    row = new(q, *groups, N)
    _cpu.similarity_lse_fwd(native(problem, sizes, kept), row, col, best, torch.get_num_threads())
    return row, col, best, kept


def similarity_lse_frozen_fwd(problem: Problem, need_best: bool) -> tuple[Tensor | None, ...]:
    sizes = problem.sizes
    if 0 in sizes:
        return reference.similarity_lse_frozen_fwd(problem, need_best)
    q = problem.q
    row, mean, best = new_needed(q, (True, q.shape[:-1]), (True, q.shape), (need_best, q.shape[:-1]))
    _cpu.similarity_lse_frozen_fwd(native(problem, sizes), row, mean, best, torch.get_num_threads())
    return row, mean, best


def similarity_lse_bwd(
    problem: Problem, row, col, g, h, kept, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor | None, ...]:
    sizes = problem.sizes
    if 0 in sizes:
        return reference.similarity_lse_bwd(problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias)
    q, keys = problem.q, problem.keys
    row, col, g, h = map_given(Tensor.contiguous, row, col, g, h)
    shapes = (need_q, q.shape), (need_k, keys.shape), (need_scale, ()), (need_bias, keys.shape[:-1])
    dq, dk, dscale, dbias = new_needed(q, *shapes)
    threads = torch.get_num_threads()
    _cpu.similarity_lse_bwd(native(problem, sizes, kept), row, col, g, h, dq, dk, dscale, dbias, threads)
    return dq, dk, dscale, dbias
