"""`bank_update_` in one kernel; in three where the batch is large."""

import torch
from torch import Tensor

from sslkern.backends import cuda

from ..reference.bank_update import bank_update_ as reference
from ..reference.sampled_similarity import check_index


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float) -> None:
    if not bank.is_contiguous() or x.dtype not in cuda.CODES:
        return reference(bank, index, x, momentum)
    check_index(index, bank)
    sizes, codes = (*bank.shape, x.shape[0]), (cuda.CODES[bank.dtype], cuda.CODES[x.dtype])
    few = x.shape[0] <= cuda._cuda.FEW_UPDATES
    last = None if few else torch.empty(bank.shape[0], dtype=torch.int64, device=bank.device)
    tensors = bank, index.contiguous(), x.contiguous()
    cuda._cuda.bank_update_(*codes, *sizes, *tensors, momentum, last, *cuda.place(bank))
    if not bank.is_inference():  # the native write is invisible to autograd otherwise
        torch.autograd.graph.increment_version(bank)
