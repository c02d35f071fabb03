"""Pairs of rows on their way into a loss and back, in plain torch."""

import torch
from torch import Tensor

from ...common.autocast import cat
from ...common.rows import EPS, dots
from ...common.tensors import wide


def unit_pairs_fwd(x: Tensor, y: Tensor, normalize: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """z [2N, D]: x over y, divided by their norms (computed in fp32 or fp64) and rounded to the type of x; norm [2N]
    or None; cosine [N] = <z_i, z_(N + i)>."""
    N, norm, z = x.shape[0], None, cat((x, y))
    if normalize:
        rows = wide(z)
        norm = torch.linalg.vector_norm(rows, dim=1)
        # A row of zeros gets a gradient divided by EPS, which in fp16 would be infinite and is 0.
        norm.masked_fill_(norm < EPS, torch.inf if z.dtype == torch.float16 else EPS)
        z = (rows / norm.unsqueeze(1)).to(z.dtype)
    return z, norm, dots(z[:N], z[N:])


def unit_pairs_bwd(
    z: Tensor, norm: Tensor | None, pull: Tensor, da: Tensor | None, db: Tensor | None, need_x: bool, need_y: bool
) -> tuple[Tensor | None, ...]:
    """dx, dy [N, D] from the gradients da, db of the halves of z, in fp32 (fp64), and -pull [N] of cosine."""
    N = pull.shape[0]
    a, b = z[:N], z[N:]
    grads: list[Tensor | None] = []
    for need, du, own, other, rows in ((need_x, da, a, b, slice(None, N)), (need_y, db, b, a, slice(N, None))):
        if not need:
            grads.append(None)
            continue
        du = du - pull.unsqueeze(1) * other
        if norm is not None:  # through u = x / |x|: dx = (du - u <u, du>) / |x|
            du = (du - own * dots(du, own).unsqueeze(1)) / norm[rows].unsqueeze(1)
        grads.append(du.to(z.dtype))
    return tuple(grads)
