"""`similarity_softplus` on the native kernels."""

import torch
from torch import Tensor

from sslkern import _cpu

from ...common.tensors import map_given
from ..problem import Problem
from ..reference.similarity_softplus import similarity_softplus_fwd as reference
from ._native import native, new_needed


def similarity_softplus_fwd(
    problem: Problem, bias: Tensor | None, weights: Tensor | None, sign: float,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    sizes = problem.sizes
    if 0 in sizes:
        return reference(problem, bias, weights, sign, need_q, need_k, need_scale, need_bias, need_k_bias)
    q, keys = problem.q, problem.keys
    groups, rows, columns = q.shape[:-2], q.shape[:-1], keys.shape[:-1]
    shapes = (need_q, q.shape), (need_k, keys.shape), (need_scale, groups), (need_bias, rows), (need_k_bias, columns)
    total, row, *grads = new_needed(q, (True, groups), (True, rows), *shapes)
    bias, weights = map_given(Tensor.contiguous, bias, weights)
    threads = torch.get_num_threads()
    _cpu.similarity_softplus(native(problem, sizes), bias, weights, sign, total, row, *grads, threads)
    return total, row, *grads
