"""`sampled_similarity` on kernels that read the bank where it is named; the gradient of the bank on torch's own."""

import torch
from torch import Tensor

from sslkern.backends import cuda

from ..reference import sampled_similarity as reference


def sampled_similarity_fwd(q: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    sizes = _sizes(q, bank, index)
    if 0 in sizes:
        return reference.sampled_similarity_fwd(q, bank, index)
    reference.check_index(index, bank)
    out = q.new_empty(index.shape, dtype=torch.float32)
    tensors = q.contiguous(), bank.contiguous(), index.contiguous(), out
    cuda._cuda.sampled_similarity_fwd(cuda.CODES[q.dtype], *sizes, *tensors, *cuda.place(q))
    return out


def sampled_similarity_bwd(q, bank, index, g, need_q: bool, need_bank: bool) -> tuple[Tensor | None, Tensor | None]:
    G, N, _, D, K = sizes = _sizes(q, bank, index)
    if 0 in sizes:
        return reference.sampled_similarity_bwd(q, bank, index, g, need_q, need_bank)
    reference.check_index(index, bank)
    dq = None
    if need_q:
        dq, parts = q.new_empty(q.shape, dtype=torch.float32), cuda._cuda.sampled_similarity_parts(G * N, D, K)
        sums = q.new_empty((G * N, parts, D), dtype=torch.float32) if parts > 1 else None
        tensors = bank.contiguous(), index.contiguous(), g.contiguous(), dq, sums
        cuda._cuda.sampled_similarity_bwd(cuda.CODES[q.dtype], *sizes, *tensors, *cuda.place(q))
    return dq, reference.sum_by_key(q, bank, index, g) if need_bank else None


def _sizes(q, bank, index):
    """Groups, queries, rows of the bank, features, names."""
    return q.shape[0] if q.ndim == 3 else 1, q.shape[-2], bank.shape[-2], q.shape[-1], index.shape[-1]
