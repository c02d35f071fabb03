"""`unit_pairs`: pairs of rows on their way into a loss and back, in one kernel each way.

Floor: forward x and y read once, z written once; backward z, da and db read once, dx and dy written once.
Where a row fits in a tile the compiler merges the loads of both loops; else the second finds it in the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chips
from .rows import aligned, length, load, store, tile


@triton.jit(do_not_specialize=["N"])
def unit_pairs_fwd_kernel(
    x, y,  # [N, D]
    z,  # [2 N, D]
    norm,  # fp32 [2 N], None: rows stay as long as they are
    cosine,  # fp32 [N]
    N, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * R + tl.arange(0, R)
    inside = i < N
    if norm is not None:
        a_squares, b_squares = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
        for d0 in range(0, D, BD):
            a, b = load(x, i, d0, inside, D, BD), load(y, i, d0, inside, D, BD)
            a_squares += tl.sum(a * a, 1)
            b_squares += tl.sum(b * b, 1)
        a_norm, b_norm = length(a_squares), length(b_squares)
        if z.dtype.element_ty == tl.float16:  # rows of zeros: divided by EPS, their gradients would be infinite
            a_norm = tl.where(a_squares == 0, float("inf"), a_norm)
            b_norm = tl.where(b_squares == 0, float("inf"), b_norm)
    dots = tl.zeros((R,), tl.float32)
    for d0 in range(0, D, BD):
        a, b = load(x, i, d0, inside, D, BD), load(y, i, d0, inside, D, BD)
        if norm is not None:
            a, b = tl.div_rn(a, a_norm[:, None]), tl.div_rn(b, b_norm[:, None])
        a, b = a.to(z.dtype.element_ty), b.to(z.dtype.element_ty)
        store(z, i, d0, inside, a, D, BD)
        store(z, N + i, d0, inside, b, D, BD)
        dots += tl.sum(a.to(tl.float32) * b.to(tl.float32), 1)
    tl.store(cosine + i, dots, mask=inside)
    if norm is not None:
        tl.store(norm + i, a_norm, mask=inside)
        tl.store(norm + N + i, b_norm, mask=inside)


def unit_pairs_fwd(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    N, D = x.shape
    z = x.new_empty((2 * N, D))
    norm = x.new_empty(2 * N, dtype=torch.float32) if normalize else None
    cosine = x.new_empty(N, dtype=torch.float32)
    sizes = tile(D)
    with chips.on(x.device):
        unit_pairs_fwd_kernel[(triton.cdiv(N, sizes["R"]),)](
            x=aligned(x), y=aligned(y), z=z, norm=norm, cosine=cosine, N=N, **sizes
        )
    return z, norm, cosine


@triton.jit(do_not_specialize=["N"])
def unit_pairs_bwd_kernel(
    z,  # [2 N, D]
    norm,  # fp32 [2 N] or None
    pull,  # fp32 [N]
    da, db,  # [N, D] each, or None
    dx, dy,  # [N, D] each, or None
    N, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """du = da - pull b, and through the normalisation dx = (du - u <u, du>) / |x| with u = a; the same for y."""
    i = tl.program_id(0) * R + tl.arange(0, R)
    inside = i < N
    toward = tl.load(pull + i, mask=inside, other=0.0)[:, None]
    if norm is not None:
        a_along, b_along = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
        for d0 in range(0, D, BD):
            a, b = load(z, i, d0, inside, D, BD), load(z, N + i, d0, inside, D, BD)
            if dx is not None:
                a_along += tl.sum(a * (load(da, i, d0, inside, D, BD) - toward * b), 1)
            if dy is not None:
                b_along += tl.sum(b * (load(db, i, d0, inside, D, BD) - toward * a), 1)
        a_norm = tl.load(norm + i, mask=inside, other=1.0)[:, None]
        b_norm = tl.load(norm + N + i, mask=inside, other=1.0)[:, None]
    for d0 in range(0, D, BD):
        a, b = load(z, i, d0, inside, D, BD), load(z, N + i, d0, inside, D, BD)
        if dx is not None:
            a_grad = load(da, i, d0, inside, D, BD) - toward * b
            if norm is not None:
                a_grad = tl.div_rn(a_grad - a * a_along[:, None], a_norm)
        if dy is not None:
            b_grad = load(db, i, d0, inside, D, BD) - toward * a
            if norm is not None:
                b_grad = tl.div_rn(b_grad - b * b_along[:, None], b_norm)
        if dx is not None:  # loads come before stores, past which the compiler moves none
            store(dx, i, d0, inside, a_grad, D, BD)
        if dy is not None:
            store(dy, i, d0, inside, b_grad, D, BD)


def unit_pairs_bwd(
    z: Tensor, norm: Tensor | None, pull: Tensor, da: Tensor | None, db: Tensor | None, need_x: bool, need_y: bool
) -> tuple[Tensor | None, Tensor | None]:
    N, D = pull.shape[0], z.shape[1]
    dx, dy = (z.new_empty((N, D)) if need else None for need in (need_x, need_y))
    da, db = (aligned(du) if need else None for du, need in ((da, need_x), (db, need_y)))
    sizes = tile(D)
    with chips.on(z.device):
        unit_pairs_bwd_kernel[(triton.cdiv(N, sizes["R"]),)](
            z=z, norm=norm, pull=pull, da=da, db=db, dx=dx, dy=dy, N=N, **sizes
        )
    return dx, dy
