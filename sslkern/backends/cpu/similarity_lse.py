"""`similarity_lse` on the native kernels: this file allocates the results."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..problem import Problem
from ..reference import similarity_lse as reference
from ._native import native, new


def similarity_lse_fwd(problem: Problem, columns: bool, best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    q, groups, sizes = problem.q, problem.q.shape[:-2], problem.sizes
    _, N, M, _ = sizes
    kept = new(q, *groups, kept_rows, M) if kept_rows else None
    if 0 in sizes:
        return *reference.similarity_lse_fwd(problem, columns, best, 0)[:3], kept
    row, col = new(q, *groups, N), new(q, *groups, M) if columns else None
    top = new(q, *groups, N + M * columns) if best else None
    _cpu.similarity_lse_fwd(native(problem, sizes, kept), row, col, top, torch.get_num_threads())
    return row, col, top, kept


def similarity_lse_frozen_fwd(problem: Problem, best: bool) -> tuple[Tensor | None, ...]:
    sizes = problem.sizes
    if 0 in sizes:
        return reference.similarity_lse_frozen_fwd(problem, best)
    q = problem.q
    row, mean, top = new(q, *q.shape[:-1]), new(q, *q.shape), new(q, *q.shape[:-1]) if best else None
    _cpu.similarity_lse_frozen_fwd(native(problem, sizes), row, mean, top, torch.get_num_threads())
    return row, mean, top


def similarity_lse_bwd(
    problem: Problem, row, col, g, h, kept, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor | None, ...]:
    sizes = problem.sizes
    if 0 in sizes:
        return reference.similarity_lse_bwd(problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias)
    q, keys = problem.q, problem.keys
    row, col, g, h = (None if x is None else x.contiguous() for x in (row, col, g, h))
    dq, dk = new(q, *q.shape) if need_q else None, new(q, *keys.shape) if need_k else None
    dscale, dbias = new(q) if need_scale else None, new(q, *keys.shape[:-1]) if need_bias else None
    threads = torch.get_num_threads()
    _cpu.similarity_lse_bwd(native(problem, sizes, kept), row, col, g, h, dq, dk, dscale, dbias, threads)
    return dq, dk, dscale, dbias
