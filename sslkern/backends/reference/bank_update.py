"""`bank_update_` in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .sampled_similarity import _check
from .unit_pairs import EPS, _wide


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float) -> None:
    """bank[index_i] = unit(momentum * bank[index_i] + (1 - momentum) * x_i); of equal indices the last counts."""
    _check(index, bank)
    # All of equal indices write what the last of them would: which one writes last then makes no difference.
    in_order, order = index.sort(stable=True)
    last = order[torch.searchsorted(in_order, index.contiguous(), right=True) - 1]
    old = _wide(bank[index])
    moved = momentum * old + (1 - momentum) * x[last].to(old.dtype)
    bank.index_copy_(0, index, F.normalize(moved, dim=1, eps=EPS).to(bank.dtype))
