"""`similarity_lse` on the native kernels: this file makes tensors contiguous and allocates the results."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..reference import similarity_lse as reference

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _native(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit, kept=None):
    """The problem as the native functions take it, and (G, N, M, D)."""
    G, N, D = (1, *q.shape) if q.ndim == 2 else q.shape
    M = N if k is None else k.shape[-2]
    tensors = (None if x is None else x.contiguous() for x in (q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit))
    q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit = tensors
    sizes = (G, N, M, D)
    options = (scale, scale_tensor, q_ids, k_ids, same, k_bias, q_limit, kept, 0 if kept is None else kept.shape[-2])
    return (CODES[q.dtype], *sizes, q, k, *options), sizes


def _new(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(*shape or ((),), dtype=torch.float32)  # numbers cost half of what a tuple does


def similarity_lse_fwd(*args):
    *problem, columns, best, kept_rows = args
    q, k = problem[:2]
    groups, N, M = q.shape[:-2], q.shape[-2], (q if k is None else k).shape[-2]
    kept = _new(q, *groups, kept_rows, M) if kept_rows else None
    native, sizes = _native(*problem, kept)
    if 0 in sizes:
        return *reference.similarity_lse_fwd(*problem, columns, best, 0)[:3], kept
    row, col = _new(q, *groups, N), _new(q, *groups, M) if columns else None
    top = _new(q, *groups, N + M * columns) if best else None
    _cpu.similarity_lse_fwd(native, row, col, top, torch.get_num_threads())
    return row, col, top, kept


def similarity_lse_frozen_fwd(*args):
    *problem, best = args
    native, sizes = _native(*problem)
    if 0 in sizes:
        return reference.similarity_lse_frozen_fwd(*args)
    q = problem[0]
    row, mean, top = _new(q, *q.shape[:-1]), _new(q, *q.shape), _new(q, *q.shape[:-1]) if best else None
    _cpu.similarity_lse_frozen_fwd(native, row, mean, top, torch.get_num_threads())
    return row, mean, top


def similarity_lse_bwd(*args):
    q, k, row, col, g, h, *problem, kept, need_q, need_k, need_scale, need_bias = args
    native, sizes = _native(q, k, *problem, kept)
    if 0 in sizes:
        return reference.similarity_lse_bwd(*args)
    keys = q if k is None else k
    row, col, g, h = (None if x is None else x.contiguous() for x in (row, col, g, h))
    dq, dk = _new(q, *q.shape) if need_q else None, _new(q, *keys.shape) if need_k else None
    dscale, dbias = _new(q) if need_scale else None, _new(q, *keys.shape[:-1]) if need_bias else None
    _cpu.similarity_lse_bwd(native, row, col, g, h, dq, dk, dscale, dbias, torch.get_num_threads())
    return dq, dk, dscale, dbias
