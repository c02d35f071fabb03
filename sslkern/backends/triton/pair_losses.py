"""The losses of pairs from the log-sum-exps of their negatives: one kernel each way, as it is launches that a small
batch waits for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chips
from .tiles import full_scale, softplus_and_sigmoid

BLOCK = 256


@triton.jit(do_not_specialize=["N"])
def pair_losses_fwd_kernel(
    first, second,  # [N] each, the log-sum-exps of the negatives; None: one way
    cosine,  # [N]
    scale_tensor,  # []
    scale,
    losses, positive, gap,  # [SIDES, N], [N], [SIDES, N]
    N, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    p = tl.load(cosine + i, mask=inside) * full_scale(scale, scale_tensor)
    tl.store(positive + i, p, mask=inside)
    for side in tl.static_range(1 if second is None else 2):
        negatives = first if side == 0 else second
        # Equal ids leave the positive out of its row: the difference has no cancellation when the loss is tiny.
        n = tl.load(negatives + i, mask=inside)
        # NaN where one of them is +inf, as in cross-entropy
        t = tl.where(tl.maximum(n, p) == float("inf"), float("nan"), n - p)
        value, _ = softplus_and_sigmoid(t)
        tl.store(gap + side * N + i, t, mask=inside)
        tl.store(losses + side * N + i, value, mask=inside)


def pair_losses_fwd(
    row: Tensor, col: Tensor | None, cosine: Tensor, scale_tensor: Tensor | None, scale: float, bounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    N = len(cosine)
    second = col if len(row) == N else row[N:]
    sides = 1 if second is None else 2
    losses, gap, positive = row.new_empty((sides, N)), row.new_empty((sides, N)), torch.empty_like(cosine)
    if N:
        with chips.on(row.device):
            pair_losses_fwd_kernel[(triton.cdiv(N, BLOCK),)](
                first=row, second=second, cosine=cosine, scale_tensor=scale_tensor, scale=scale,
                losses=losses, positive=positive, gap=gap, N=N, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return losses, positive, gap


@triton.jit(do_not_specialize=["N", "g_side", "g_row"])
def pair_losses_bwd_kernel(
    gap,  # [SIDES, N]
    g, g_side, g_row,  # [SIDES, N], with these strides
    scale_tensor,  # []
    scale,
    weight, toward, pull,  # [SIDES, N], [N], [N]
    N, SIDES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    total = tl.zeros((BLOCK,), tl.float32)
    for side in tl.static_range(SIDES):
        t = tl.load(gap + side * N + i, mask=inside)
        _, slope = softplus_and_sigmoid(t)
        w = slope * tl.load(g + side * g_side + i.to(tl.int64) * g_row, mask=inside)
        w = tl.where(t == float("-inf"), 0.0, w)  # a row without negatives has none, whatever g is
        tl.store(weight + side * N + i, w, mask=inside)
        total += w
    tl.store(toward + i, total, mask=inside)
    tl.store(pull + i, total * full_scale(scale, scale_tensor), mask=inside)


def pair_losses_bwd(gap: Tensor, g: Tensor, scale_tensor: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    SIDES, N = gap.shape
    weight, toward, pull = torch.empty_like(gap), gap.new_empty(N), gap.new_empty(N)
    if N:
        g_side, g_row = g.stride()
        with chips.on(gap.device):
            pair_losses_bwd_kernel[(triton.cdiv(N, BLOCK),)](
                gap=gap, g=g, g_side=g_side, g_row=g_row, scale_tensor=scale_tensor, scale=scale,
                weight=weight, toward=toward, pull=pull, N=N, SIDES=SIDES, BLOCK=BLOCK, num_warps=4,
            )  # fmt: skip
    return weight, toward, pull
