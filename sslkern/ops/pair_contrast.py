"""`pair_contrast`: the losses of pairs against `similarity_lse` negatives, as one autograd node for eager code.

A loss of 32 rows spends its time between the kernels: normalisation, positives and softplus come to twenty autograd
nodes. Here they are one. Compiled code does not come here; there the same formulas are traced and fused.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import load, resolve

EPS = 1e-12  # rows shorter than this are divided by it
_HALF = (torch.float16, torch.bfloat16)


def pair_contrast(
    x: Tensor, y: Tensor, scale: float | Tensor, ids: Tensor, mode: str, normalize: bool, best: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """softplus(negatives_i - positive_i), with positive_i = scale * <x_i, y_i>.

    Args:
        x, y: [N, D], normalised first where `normalize` says so.
        scale: a float or a 0-d tensor.
        ids: int64 [N]; pairs of rows with equal ids are not contrasted.
        mode: "views": the negatives of a row of x or y are rows of both (NT-Xent); "one_way": rows of y for each of x;
            "two_way": also rows of x for each of y.
        best: also return the largest negative score.

    Returns:
        losses [2, N], those of x first ("one_way": [1, N]); positive [N] and best, of the shape of losses, both without
        gradient, or None unless `best`. All in fp32 (fp64).
    """
    scale_tensor, scale = (scale, 1.0) if isinstance(scale, Tensor) else (None, scale)
    return _PairContrast.apply(x, y, scale_tensor, scale, ids, mode, normalize, best, resolve("similarity_lse", x))


class _PairContrast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, scale_tensor, scale, ids, mode, normalize, best, backend):
        N, norm = x.shape[0], None
        z = torch.cat((x, y))
        if normalize:
            wide = z.float() if z.dtype in _HALF else z
            norm = torch.linalg.vector_norm(wide, dim=1, keepdim=True).clamp_min_(EPS)
            z = wide.div_(norm).to(z.dtype)
        a, b = z[:N], z[N:]
        views = mode == "views"
        q, k, ids = (z, None, ids.repeat(2)) if views else (a, b, ids)
        problem = (scale_tensor, scale, ids, None if views else ids, False, None, None)
        row, col, top = load(backend, "similarity_lse").similarity_lse_fwd(q, k, *problem, mode == "two_way", best)
        cosine = _dots(a, b)
        positive = cosine * (scale if scale_tensor is None else scale_tensor)
        negatives = row.view(-1, N) if col is None else torch.stack((row, col))
        gap = negatives - positive
        ctx.save_for_backward(z, norm, scale_tensor, ids, negatives, gap, cosine)
        ctx.scale, ctx.views, ctx.backend = scale, views, backend
        losses = torch.nn.functional.softplus(gap, threshold=40)
        if not best:
            return losses, None, None
        top = top.view(-1, N)
        ctx.mark_non_differentiable(positive, top)
        return losses, positive, top

    @staticmethod
    @once_differentiable
    def backward(ctx, g, *_):
        z, norm, scale_tensor, ids, negatives, gap, cosine = ctx.saved_tensors
        need_x, need_y, need_scale, *_ = ctx.needs_input_grad
        N = cosine.shape[0]
        a, b = z[:N], z[N:]
        weight = torch.sigmoid(gap).mul_(g).masked_fill_(gap == -torch.inf, 0)  # d loss / d negatives
        problem = (scale_tensor, ctx.scale, ids, None if ctx.views else ids, False, None, None)
        backward = load(ctx.backend, "similarity_lse").similarity_lse_bwd
        if ctx.views:
            dz, _, dscale, _ = backward(
                z, None, negatives.view(-1), None, weight.view(-1), None, *problem, True, False, need_scale, False
            )
            da, db = dz[:N], dz[N:]
        else:
            col, h = (negatives[1], weight[1]) if len(negatives) == 2 else (None, None)
            da, db, dscale, _ = backward(
                a, b, negatives[0], col, weight[0], h, *problem, need_x, need_y, need_scale, False
            )
        toward = weight.sum(0)  # - d loss / d positive
        if need_scale:
            dscale = (dscale - torch.dot(toward, cosine)).to(scale_tensor.dtype)
        pull = (toward * (ctx.scale if scale_tensor is None else scale_tensor)).unsqueeze(1)
        sides = (need_x, da, a, b, slice(None, N)), (need_y, db, b, a, slice(N, None))
        dx, dy = (
            _normalize_bwd(grad.addcmul_(pull, other, value=-1), own, norm, part).to(z.dtype) if need else None
            for need, grad, own, other, part in sides
        )
        return dx, dy, dscale if need_scale else None, None, None, None, None, None, None


def _dots(a: Tensor, b: Tensor) -> Tensor:
    return (a.float() * b.float() if a.dtype in _HALF else a * b).sum(1)


def _normalize_bwd(grad: Tensor, unit: Tensor, norm: Tensor | None, part: slice) -> Tensor:
    """Through u = x / |x|: dx = (du - u <u, du>) / |x|."""
    if norm is None:
        return grad
    return grad.addcmul_(unit, _dots(grad, unit).unsqueeze(1), value=-1).div_(norm[part])
