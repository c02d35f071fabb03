"""`bank_update_` in one kernel; in three where the batch is large."""

import torch
from torch import Tensor

from ..reference.bank_update import bank_update_ as reference
from ..reference.sampled_similarity import check_index
from . import NAMES
from .launch import THREADS, Call, at_most, teams, width

FEW_UPDATES = 1024  # of which each row looks itself whether a later one has its index


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float) -> None:
    if not bank.is_contiguous() or x.dtype not in NAMES:
        return reference(bank, index, x, momentum)
    check_index(index, bank)
    index, x, types = index.contiguous(), x.contiguous(), (bank.dtype, x.dtype)
    (M, D), B = bank.shape, x.shape[0]
    call = Call("bank_update", bank.device, *types)
    to = call.address("bank", bank, bank.dtype, M * D)
    names = call.address("index", index, torch.int64, B)
    source = call.address("x", x, x.dtype, B * D)
    if B == 0:
        return
    last = torch.empty(M, dtype=torch.int64, device=bank.device) if B > FEW_UPDATES else None
    latest = call.address("last", last, torch.int64, M)
    if last is not None:
        blocks = at_most((B + THREADS - 1) // THREADS)
        call.launch("forget", blocks, M, B, names, latest)
        call.launch("claim", blocks, B, names, latest)
    shared = teams(D, width(*types), THREADS, to, source)
    call.launch("update<{0}, {1}>", shared.blocks(B), *shared, M, B, to, names, source, momentum, latest)
    if not bank.is_inference():  # the kernel's write is invisible to autograd otherwise
        torch.autograd.graph.increment_version(bank)
