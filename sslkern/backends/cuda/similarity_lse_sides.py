"""What kernels of the backward of `similarity_lse` on Hopper read of log-sum-exps and of what arrived for them:
kernels/similarity_lse_sides.cu."""

from typing import NamedTuple

import torch
from torch import Tensor

from .launch import THREADS, WARP, Call

PAST = 4  # as in kernels/sides.h


class Columns(NamedTuple):
    """Of tiles of so many columns."""

    near: Tensor  # [tiles, width + PAST], for one exponential of both sides
    apart: Tensor  # [tiles, 3, width], for two

    @classmethod
    def of(
        cls, M: int, width: int, col: Tensor | None, h: Tensor | None, bias: Tensor | None, itself: bool,
        fold: Tensor | None, device: torch.device,
    ) -> "Columns":  # fmt: skip
        """col, h: [M] fp32 without gaps, or None where only rows count; bias: [M] of the columns in s_ij, or None."""
        tiles = -(-M // width)
        columns = cls(_new(device, tiles, width + PAST), _new(device, tiles, 3, width))
        addresses = *addresses_of(col, h, bias), itself, *addresses_of(fold, *columns)
        call = Call("similarity_lse_sides", device)
        call.launch("sides_columns", -(-tiles // (THREADS // WARP)), M, tiles, width, *addresses)
        return columns


def fold_of(q: Tensor, row: Tensor | None, g: Tensor | None, col: Tensor | None, h: Tensor | None) -> Tensor | None:
    """[2]: by what weights are multiplied on their way through fp16, and the inverse; None of other types."""
    if q.dtype != torch.float16:
        return None
    fold, sizes = _new(q.device, 2), [0 if lse is None else len(lse) for lse in (row, col)]
    call = Call("similarity_lse_sides", q.device)
    call.launch("sides_fold", 1, sizes[0], *addresses_of(row, g), sizes[1], *addresses_of(col, h, fold))
    return fold


def addresses_of(*tensors: Tensor | None) -> tuple[int, ...]:
    """Of fp32 numbers without gaps, 0 of None."""
    return tuple(0 if x is None else x.data_ptr() for x in tensors)


def _new(device: torch.device, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=device)
