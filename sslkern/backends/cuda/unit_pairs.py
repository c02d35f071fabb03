"""`unit_pairs` in one kernel each way."""

import torch
from torch import Tensor

from sslkern.backends import cuda


def unit_pairs_fwd(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    N, D = x.shape
    z = x.new_empty((2 * N, D))
    norm = x.new_empty(2 * N, dtype=torch.float32) if normalize else None
    cosine = x.new_empty(N, dtype=torch.float32)
    tensors = x.contiguous(), y.contiguous(), z, norm, cosine
    cuda._cuda.unit_pairs_fwd(cuda.CODES[x.dtype], N, D, *tensors, *cuda.place(x))
    return z, norm, cosine


def unit_pairs_bwd(
    z: Tensor, norm: Tensor | None, pull: Tensor, da: Tensor | None, db: Tensor | None, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    N, D = pull.shape[0], z.shape[1]
    dx, dy = (z.new_empty((N, D)) if need else None for need in (need_x, need_y))
    da, db = (du.contiguous() if need else None for du, need in ((da, need_x), (db, need_y)))
    cuda._cuda.unit_pairs_bwd(cuda.CODES[z.dtype], N, D, z, norm, pull, da, db, dx, dy, *cuda.place(z))
    return dx, dy
