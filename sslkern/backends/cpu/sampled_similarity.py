"""`sampled_similarity` on the native kernels, in one of two ways: see csrc/cpu/kernels/sampled_similarity.cpp."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..problem import Problem
from ..reference import sampled_similarity as reference
from ._native import native, new, new_needed


def streams(N: int, M: int, K: int) -> bool:
    """Whether all N M scores are computed and N K of them picked, which is cheaper than reading N K rows of the bank.

    Reading the bank for a product costs as much as multiplying it with some 50 queries; a named row costs as much as 8
    products with rows of the stream. Measured with banks of 10,000 to 1,280,000 rows (bench_sampled_similarity.py).
    """
    return M * (50 + N) <= 8 * N * K


def sampled_similarity_fwd(q: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    problem, K = Problem(q, bank), index.shape[-1]
    sizes = problem.sizes
    if 0 in sizes or K == 0:
        return reference.sampled_similarity_fwd(q, bank, index)
    out = new(q, *index.shape)
    way = streams(*sizes[1:3], K)
    within = _cpu.sampled_similarity_fwd(
        native(problem, sizes), K, index.contiguous(), way, out, torch.get_num_threads()
    )
    if not within:
        reference.outside(index, bank)
    return out


def sampled_similarity_bwd(
    q: Tensor, bank: Tensor, index: Tensor, g: Tensor, need_q: bool, need_bank: bool
) -> tuple[Tensor | None, Tensor | None]:
    problem, K = Problem(q, bank), index.shape[-1]
    sizes = problem.sizes
    if 0 in sizes or K == 0:
        return reference.sampled_similarity_bwd(q, bank, index, g, need_q, need_bank)
    way = streams(*sizes[1:3], K)
    dq, dbank = new_needed(q, (need_q, q.shape), (need_bank and way, bank.shape))
    if dq is not None or dbank is not None:
        args = K, index.contiguous(), way, g.contiguous(), dq, dbank, torch.get_num_threads()
        if not _cpu.sampled_similarity_bwd(native(problem, sizes), *args):
            reference.outside(index, bank)
    if need_bank and not way:
        if dq is None:  # no kernel has looked at the index
            reference.check_index(index, bank)
        dbank = reference.sum_by_key(q, bank, index, g)
    return dq, dbank
