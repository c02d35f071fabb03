"""Tiles of rows: what the kernels share that read each row once, and whose time is that of the memory."""

import triton
import triton.language as tl
from torch import Tensor

from ...common import rows
from . import INTERPRETED

EPS = tl.constexpr(rows.EPS)
# In a tile: each of 128 threads has two loads of 16 bytes under way. In the interpreter a step costs the same for all.
NUMBERS = 32768 if INTERPRETED else 2048


def tile(D: int) -> dict:
    """Rows and features of a tile; rows of more than BD features come in parts."""
    BD = min(triton.next_power_of_2(max(D, 1)), NUMBERS)
    return {"D": D, "R": min(NUMBERS // BD, 64), "BD": BD}


def aligned(x: Tensor) -> Tensor:
    """x contiguous, from a multiple of 16 bytes on: loads are wide, and sums have one order, wherever x lay."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


@triton.jit
def place(row, d0, inside, D: tl.constexpr, BD: tl.constexpr):
    """Where the features from d0 on of rows [R] stand [R, BD], and which of them are there."""
    d = d0 + tl.arange(0, BD)
    mask = inside[:, None]
    if D % BD != 0:
        mask = mask & (d < D)[None, :]
    return row.to(tl.int64)[:, None] * D + d[None, :], mask


@triton.jit
def load(x, row, d0, inside, D: tl.constexpr, BD: tl.constexpr):
    """The features from d0 on of rows [R] in fp32 [R, BD], 0 where there are none."""
    at, mask = place(row, d0, inside, D, BD)
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(x, row, d0, inside, value, D: tl.constexpr, BD: tl.constexpr):
    at, mask = place(row, d0, inside, D, BD)
    tl.store(x + at, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def length(squares):
    """The norms of rows from the sums of their squares; NaN stays."""
    norm = tl.sqrt_rn(squares)
    return tl.where(norm < EPS, EPS, norm)


@triton.jit
def row_of(index, i, inside, M):
    """index[i], which must be one of M rows, and whether it is there: outside of them nothing is read or written."""
    j = tl.load(index + i, mask=inside, other=0)
    valid = (j >= 0) & (j < M)
    tl.device_assert(valid, "index is no row of the bank", mask=inside)
    return j, inside & valid
