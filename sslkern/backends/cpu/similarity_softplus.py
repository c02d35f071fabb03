"""`similarity_softplus` on the native kernels."""

import torch

from sslkern import _cpu

from ..reference.similarity_softplus import similarity_softplus_fwd as reference
from .similarity_lse import _native, _new


def similarity_softplus_fwd(*args):
    *problem, bias, weights, sign, need_q, need_k, need_scale, need_bias, need_k_bias = args
    native, sizes = _native(*problem)
    if 0 in sizes:
        return reference(*args)
    q, keys = problem[0], problem[0] if problem[1] is None else problem[1]
    groups, rows, columns = q.shape[:-2], q.shape[:-1], keys.shape[:-1]
    shapes = (need_q, q.shape), (need_k, keys.shape), (need_scale, groups), (need_bias, rows), (need_k_bias, columns)
    total, row, *grads = _new(q, *groups), _new(q, *rows), *(_new(q, *s) if need else None for need, s in shapes)
    bias, weights = (None if x is None else x.contiguous() for x in (bias, weights))
    _cpu.similarity_softplus(native, bias, weights, sign, total, row, *grads, torch.get_num_threads())
    return total, row, *grads
