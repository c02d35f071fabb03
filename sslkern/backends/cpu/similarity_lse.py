"""`similarity_lse` on the native kernels. Results are allocated line by line: a small batch feels each function."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..problem import Problem
from ..reference import similarity_lse as reference
from ._native import native, new


def similarity_lse_fwd(problem: Problem, columns: bool, need_best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    q, groups, sizes = problem.q, problem.q.shape[:-2], problem.sizes
    _, N, M, _ = sizes
    col = best = kept = None
    if columns:
        col = new(q, *groups, M)
    if need_best:
        best = new(q, *groups, N + M * columns)
    if kept_rows > 0:
        kept = new(q, *groups, kept_rows, M)
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
    row, mean, best = new(q, *q.shape[:-1]), new(q, *q.shape), None
    if need_best:
        best = torch.empty_like(row)
    _cpu.similarity_lse_frozen_fwd(native(problem, sizes), row, mean, best, torch.get_num_threads())
    return row, mean, best


def similarity_lse_bwd(
    problem: Problem, row: Tensor | None, col: Tensor | None, g: Tensor | None, h: Tensor | None, kept: Tensor | None,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    sizes = problem.sizes
    if 0 in sizes:
        return reference.similarity_lse_bwd(problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias)
    q, keys = problem.q, problem.keys
    row, col, g, h = [x if x is None else x.contiguous() for x in (row, col, g, h)]
    dq = dk = dscale = dbias = None
    if need_q:
        dq = new(q, *q.shape)
    if need_k:
        dk = new(q, *keys.shape)
    if need_scale:
        dscale = new(q)
    if need_bias:
        dbias = new(q, *keys.shape[:-1])
    threads = torch.get_num_threads()
    _cpu.similarity_lse_bwd(native(problem, sizes, kept), row, col, g, h, dq, dk, dscale, dbias, threads)
    return dq, dk, dscale, dbias
