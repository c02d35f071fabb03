"""`pair_contrast`: the losses of pairs against `similarity_lse` negatives, as one autograd node for eager code.

A loss of 32 rows spends its time between the kernels: normalisation, positives and softplus come to twenty autograd
nodes. Here they are one. Compiled code does not come here; there the same formulas are traced and fused.
"""

import functools

import torch
from torch import Tensor

from ..backends import keeps, load, resolve
from ._library import Once


def pair_contrast(
    x: Tensor, y: Tensor, scale: float | Tensor, ids: Tensor | None, mode: str, normalize: bool, best: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softplus(negatives_i - positive_i), with positive_i = scale * <x_i, y_i>.

    Args:
        x, y: [N, D], normalised first where `normalize` says so.
        scale: a float or a 0-d tensor.
        ids: int64 [N]; rows with equal ids are not contrasted. None: all differ.
        mode: "views": the negatives of a row of x or y are rows of both (NT-Xent); "one_way": rows of y for each of x;
            "two_way": also rows of x for each of y.
        best: also return the largest negative score.

    Returns:
        losses [2, N], those of x first ("one_way": [1, N]); positive [N] and best, of the shape of losses, both without
        gradient, or None unless `best`. All in fp32 (fp64).
    """
    views = mode == "views"
    if ids is None:
        ids = _row_numbers(x.shape[0], 1 + views, x.device)
    elif views:
        ids = ids.repeat(2)
    scale_tensor, scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    return _PairContrast.apply(x, y, scale_tensor, scale, ids, mode, normalize, best, resolve("unit_pairs", x))


@functools.lru_cache(maxsize=8)  # for a small batch making them would cost as much as a kernel
def _row_numbers(n: int, copies: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # tensors made in inference mode could not be saved for a later backward
        return torch.arange(n, device=device).repeat(copies)


class _PairContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale_tensor, scale, ids, mode, normalize, best, backend):
        N = x.shape[0]
        z, norm, cosine = load(backend, "unit_pairs").unit_pairs_fwd(x, y, normalize)
        q, k, k_ids = (z, None, None) if mode == "views" else (z[:N], z[N:], ids)
        problem = (scale_tensor, scale, ids, k_ids, False, None, None)
        keep = any(ctx.needs_input_grad) and keeps(backend, q, k)
        forward = load(backend, "similarity_lse").similarity_lse_fwd
        row, col, top, kept = forward(q, k, *problem, mode == "two_way", best, keep)
        positive = cosine * (scale if scale_tensor is None else scale_tensor)
        # Equal ids leave the positive out of its row: the difference has no cancellation when the loss is tiny.
        gap = (row.view(-1, N) if col is None else torch.stack((row, col))) - positive
        ctx.save_for_backward(x, y, z, norm, cosine, gap, row, col, scale_tensor, ids, kept)
        ctx.scale, ctx.mode, ctx.backend = scale, mode, backend
        losses = torch.nn.functional.softplus(gap, threshold=40)
        if not best:
            return losses, None, None
        top = top.view(-1, N)
        ctx.mark_non_differentiable(positive, top)
        return losses, positive, top

    @staticmethod
    def backward(ctx, g, *_):
        with torch.no_grad():
            dx, dy, dscale = _gradients(ctx, g)
        if torch.is_grad_enabled():  # create_graph=True
            x, y, *_ = ctx.saved_tensors
            dx, dy, dscale = Once.apply(x if x.requires_grad else y, dx, dy, dscale)
        return dx, dy, dscale, *(None,) * 6


def _gradients(ctx, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    _, _, z, norm, cosine, gap, row, col, scale_tensor, ids, kept = ctx.saved_tensors
    need_x, need_y, need_scale, *_ = ctx.needs_input_grad
    N, views = cosine.shape[0], ctx.mode == "views"
    # d loss / d negatives; a row without negatives (gap -inf) has none, whatever g is
    weight = torch.where(gap == -torch.inf, 0, torch.sigmoid(gap) * g)
    toward = weight.sum(0)  # - d loss / d positive
    problem = (scale_tensor, ctx.scale, ids, None if views else ids, False, None, None, kept)
    backward = load(ctx.backend, "similarity_lse").similarity_lse_bwd
    if views:
        grads = backward(z, None, row, None, weight.view(-1), None, *problem, True, False, need_scale, False)
        da, db = grads[0][:N], grads[0][N:]
    else:
        h = None if col is None else weight[1]
        grads = backward(z[:N], z[N:], row, col, weight[0], h, *problem, need_x, need_y, need_scale, False)
        da, db = grads[:2]
    dscale = (grads[2] - torch.dot(toward, cosine)).to(scale_tensor.dtype) if need_scale else None
    pull = toward * (ctx.scale if scale_tensor is None else scale_tensor)
    dx, dy = load(ctx.backend, "unit_pairs").unit_pairs_bwd(z, norm, pull, da, db, need_x, need_y)
    return dx, dy, dscale
