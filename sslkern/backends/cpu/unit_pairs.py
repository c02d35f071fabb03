"""`unit_pairs` on the native kernels."""

import torch
from torch import Tensor

from sslkern import _cpu

from ._native import CODES


def unit_pairs_fwd(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    N, D = x.shape
    z = x.new_empty(2 * N, D)
    norm = None
    if normalize:
        norm = x.new_empty(2 * N, dtype=torch.float32)
    cosine = x.new_empty(N, dtype=torch.float32)
    _cpu.unit_pairs_fwd(CODES[x.dtype], N, D, x.contiguous(), y.contiguous(), z, norm, cosine, torch.get_num_threads())
    return z, norm, cosine


def unit_pairs_bwd(
    z: Tensor, norm: Tensor | None, pull: Tensor, da: Tensor | None, db: Tensor | None, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    N, D = pull.shape[0], z.shape[1]
    dx, dy = [z.new_empty(N, D) if need else None for need in (need_x, need_y)]
    da, db = [du if du is None else du.contiguous() for du in (da, db)]
    _cpu.unit_pairs_bwd(CODES[z.dtype], N, D, z, norm, pull, da, db, dx, dy, torch.get_num_threads())
    return dx, dy
