"""`bank_update_` in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.rows import EPS
from ...common.tensors import wide
from .sampled_similarity import check_index


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float) -> None:
    """bank[index_i] = unit(momentum * bank[index_i] + (1 - momentum) * x_i); of equal indices the last counts."""
    check_index(index, bank)
    # All of equal indices write what the last of them would: which one writes last then makes no difference.
    in_order, order = index.sort(stable=True)
    last = order[torch.searchsorted(in_order, index.contiguous(), right=True) - 1]
    old = wide(bank[index])
    moved = momentum * old + (1 - momentum) * x[last].to(old.dtype)
    bank.index_copy_(0, index, F.normalize(moved, dim=1, eps=EPS).to(bank.dtype))
