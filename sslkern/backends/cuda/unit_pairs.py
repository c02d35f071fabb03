"""`unit_pairs` in one kernel each way."""

import torch
from torch import Tensor

from .launch import THREADS, Call, teams, width

FP32 = torch.float32


def unit_pairs_fwd(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    (N, D), dtype = x.shape, x.dtype
    x, y = x.contiguous(), y.contiguous()
    z = x.new_empty((2 * N, D))
    norm = x.new_empty(2 * N, dtype=FP32) if normalize else None
    cosine = x.new_empty(N, dtype=FP32)
    call = Call("unit_pairs", x.device, dtype)
    from_x, from_y = call.address("x", x, dtype, N * D), call.address("y", y, dtype, N * D)
    to = call.address("z", z, dtype, 2 * N * D)
    norms = call.address("norm", norm, FP32, 2 * N)
    cosines = call.address("cosine", cosine, FP32, N)
    if N > 0:
        shared = teams(D, width(dtype), THREADS, from_x, from_y, to)
        call.launch("pair_forward<{0}>", shared.blocks(N), *shared, N, from_x, from_y, to, norms, cosines)
    return z, norm, cosine


def unit_pairs_bwd(
    z: Tensor, norm: Tensor | None, pull: Tensor, da: Tensor | None, db: Tensor | None, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    (N, D), dtype = (pull.shape[0], z.shape[1]), z.dtype
    dx, dy = (z.new_empty((N, D)) if need else None for need in (need_x, need_y))
    da, db = (du.contiguous() if need else None for du, need in ((da, need_x), (db, need_y)))
    call = Call("unit_pairs", z.device, dtype)
    units = call.address("z", z, dtype, 2 * N * D)
    norms, pulls = call.address("norm", norm, FP32, 2 * N), call.address("pull", pull, FP32, N)
    from_a, from_b = call.address("da", da, FP32, N * D), call.address("db", db, FP32, N * D)
    to_x, to_y = call.address("dx", dx, dtype, N * D), call.address("dy", dy, dtype, N * D)
    if N > 0 and (need_x or need_y):
        shared = teams(D, width(FP32), THREADS, units, from_a, from_b, to_x, to_y)
        call.launch("pair_backward<{0}>", shared.blocks(N), *shared, N, units, norms, pulls, from_a, from_b, to_x, to_y)
    return dx, dy
