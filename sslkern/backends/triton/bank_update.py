"""`bank_update_` in one kernel; in three where the batch is large.

Floor: of the rows that are named, the old and the new read once, the old written once.

Of equal indices the last counts. In a small batch each program looks through the later indices itself. In a large one
two kernels before it leave in last[j], for each row j that is named, the largest i that names it, whatever the order
in which they run; the rest of `last` is neither read nor written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.bank_update import bank_update_ as reference
from ..reference.sampled_similarity import check_index
from . import DTYPES, INTERPRETED, chips
from .rows import aligned, length, load, row_of, store, tile

FEW = 32 if INTERPRETED else 4096  # names, which to compare with each other costs less than two kernels
BLOCK = 128  # names at a time


@triton.jit(do_not_specialize=["M", "B"], debug=True)
def bank_update_forget_kernel(
    index,  # int64 [B]
    last,  # int64 [M]
    M, B, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j, inside = row_of(index, i, i < B, M)
    tl.store(last + j, -1, mask=inside)


@triton.jit(do_not_specialize=["M", "B"], debug=True)
def bank_update_claim_kernel(
    index,  # int64 [B]
    last,  # int64 [M]
    M, B, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    j, inside = row_of(index, i, i < B, M)
    tl.atomic_max(last + j, i, mask=inside)


@triton.jit(do_not_specialize=["M", "B", "momentum"], debug=True)
def bank_update_kernel(
    bank,  # [M, D]
    index,  # int64 [B]
    x,  # [B, D]
    momentum,
    last,  # int64 [M], or None
    M, B, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    j, inside = row_of(index, i, i < B, M)
    if last is not None:
        inside &= tl.load(last + j, mask=inside, other=-1) == i
    else:
        again = tl.zeros((R,), tl.int32)
        for first in range(tl.program_id(0) * R, B, BLOCK):
            later = first + tl.arange(0, BLOCK)
            same = tl.load(index + later, mask=later < B, other=-1)[None, :] == j[:, None]
            again |= tl.max((same & (later[None, :] > i[:, None])).to(tl.int32), 1)
        inside &= again == 0
    # The others touch no row: who writes one is alone with it, and reads it before.
    squares = tl.zeros((R,), tl.float32)
    for d0 in range(0, D, BD):
        old, new = load(bank, j, d0, inside, D, BD), load(x, i, d0, inside, D, BD)
        moved = momentum * old + (1 - momentum) * new
        squares += tl.sum(moved * moved, 1)
    norm = length(squares)[:, None]
    for d0 in range(0, D, BD):
        old, new = load(bank, j, d0, inside, D, BD), load(x, i, d0, inside, D, BD)
        moved = momentum * old + (1 - momentum) * new
        store(bank, j, d0, inside, tl.div_rn(moved, norm), D, BD)


def bank_update_(bank: Tensor, index: Tensor, x: Tensor, momentum: float) -> None:
    if not bank.is_contiguous() or x.dtype not in DTYPES:
        return reference(bank, index, x, momentum)
    check_index(index, bank)
    (M, D), B = bank.shape, x.shape[0]
    index, last, sizes = index.contiguous(), None, tile(D)
    with chips.on(bank.device):
        if B > FEW:
            last = torch.empty(M, dtype=torch.int64, device=bank.device)
            for kernel in (bank_update_forget_kernel, bank_update_claim_kernel):
                kernel[(triton.cdiv(B, BLOCK),)](index=index, last=last, M=M, B=B, BLOCK=BLOCK, sanitize_overflow=False)
        bank_update_kernel[(triton.cdiv(B, sizes["R"]),)](
            bank=bank, index=index, x=aligned(x), momentum=momentum, last=last, M=M, B=B, BLOCK=BLOCK,
            sanitize_overflow=False, **sizes,
        )  # fmt: skip
    if not bank.is_inference():  # autograd does not see what kernels write
        torch.autograd.graph.increment_version(bank)
