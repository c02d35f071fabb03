"""`similarity_topk` on the native kernels."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..reference import similarity_topk as reference
from .similarity_lse import _native, _new


def similarity_topk_fwd(q, k, n, scale_tensor, scale, q_ids, k_ids, same, q_limit) -> tuple[Tensor, Tensor]:
    native, sizes = _native(q, k, scale_tensor, scale, q_ids, k_ids, same, None, q_limit)
    if 0 in sizes or sizes[2] >= 2**31:  # the kernel counts columns in 32 bits
        return reference.similarity_topk_fwd(q, k, n, scale_tensor, scale, q_ids, k_ids, same, q_limit)
    values = _new(q, *q.shape[:-1], n)
    indices = values.new_empty(values.shape, dtype=torch.int64)
    _cpu.similarity_topk(native, n, values, indices, torch.get_num_threads())
    return values, indices
