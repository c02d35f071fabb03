"""`similarity_topk` on the native kernels."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..problem import Problem
from ..reference import similarity_topk as reference
from ._native import native, new


def similarity_topk_fwd(problem: Problem, n: int) -> tuple[Tensor, Tensor]:
    sizes = problem.sizes
    if 0 in sizes:
        return reference.similarity_topk_fwd(problem, n)
    values = new(problem.q, *problem.q.shape[:-1], n)
    indices = values.new_empty(values.shape, dtype=torch.int64)
    _cpu.similarity_topk(native(problem, sizes), n, values, indices, torch.get_num_threads())
    return values, indices
