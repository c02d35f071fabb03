"""The losses of pairs from the log-sum-exps of their negatives: one kernel each way, as it is launches that a small
batch waits for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import hardware
from .tiles import INF, full_scale, softplus_and_sigmoid

BLOCK = 256


@triton.jit(do_not_specialize=["N"])
def _forward(first, second, cosine, scale_tensor, scale, losses, positive, gap, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    p = tl.load(cosine + i, mask=inside) * full_scale(scale, scale_tensor)
    tl.store(positive + i, p, mask=inside)
    for side in tl.static_range(1 if second is None else 2):
        negatives = first if side == 0 else second
        # Equal ids leave the positive out of its row: the difference has no cancellation when the loss is tiny.
        n = tl.load(negatives + i, mask=inside)
        t = tl.where(tl.maximum(n, p) == INF, float("nan"), n - p)  # NaN where one of them is +inf, as in cross-entropy
        value, _ = softplus_and_sigmoid(t)
        tl.store(gap + side * N + i, t, mask=inside)
        tl.store(losses + side * N + i, value, mask=inside)


def pair_losses_fwd(
    row: Tensor, col: Tensor | None, cosine: Tensor, scale_tensor: Tensor | None, scale: float, bounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N = len(cosine)
    second = col if len(row) == N else row[N:]
    losses, gap = (row.new_empty((1 if second is None else 2, N)) for _ in range(2))
    positive = torch.empty_like(cosine)
    if N:
        with hardware.on(row.device):
            _forward[(triton.cdiv(N, BLOCK),)](
                row, second, cosine, scale_tensor, scale, losses, positive, gap, N, BLOCK=BLOCK, num_warps=4
            )
    return losses, positive, gap


@triton.jit(do_not_specialize=["N", "g_side", "g_row"])
def _backward(
    gap, g, g_side, g_row, scale_tensor, scale, weight, toward, pull, N, SIDES: tl.constexpr, BLOCK: tl.constexpr
):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    total = tl.zeros((BLOCK,), tl.float32)
    for side in tl.static_range(SIDES):
        t = tl.load(gap + side * N + i, mask=inside)
        _, slope = softplus_and_sigmoid(t)
        w = slope * tl.load(g + side * g_side + i.to(tl.int64) * g_row, mask=inside)
        w = tl.where(t == -INF, 0.0, w)  # a row without negatives has none, whatever g is
        tl.store(weight + side * N + i, w, mask=inside)
        total += w
    tl.store(toward + i, total, mask=inside)
    tl.store(pull + i, total * full_scale(scale, scale_tensor), mask=inside)


def pair_losses_bwd(gap: Tensor, g: Tensor, scale_tensor: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    SIDES, N = gap.shape
    weight, toward, pull = torch.empty_like(gap), gap.new_empty(N), gap.new_empty(N)
    if N:
        with hardware.on(gap.device):
            _backward[(triton.cdiv(N, BLOCK),)](
                gap, g, *g.stride(), scale_tensor, scale, weight, toward, pull, N, SIDES=SIDES, BLOCK=BLOCK, num_warps=4
            )
    return weight, toward, pull
