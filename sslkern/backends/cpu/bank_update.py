"""`bank_update_` on the native kernel."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..reference.bank_update import bank_update_ as reference
from ..reference.sampled_similarity import outside
from ._native import CODES


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float) -> None:
    if not bank.is_contiguous() or x.dtype not in CODES:
        return reference(bank, index, x, momentum)
    sizes, tensors = (*bank.shape, x.shape[0]), (bank, index.contiguous(), x.contiguous())
    codes = CODES[bank.dtype], CODES[x.dtype]
    if not _cpu.bank_update_(*codes, *sizes, *tensors, momentum, torch.get_num_threads()):
        outside(index, bank)
    if not bank.is_inference():  # the native write is invisible to autograd otherwise
        torch.autograd.graph.increment_version(bank)
