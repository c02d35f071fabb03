"""Small problems in compiled code: the formula itself, which the compiler fuses with its surroundings."""

import functools
import math
import operator
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..backends.problem import Problem, full_scale_of, sizes_of
from ..common.autocast import autocast_active, cat, stack
from ..common.node import Node, library, once
from ..common.rows import dots, unit
from ..common.sums import mean, pair_loss, times, total
from ..common.tensors import TensorOrTuple, accumulator, wide
from .logsumexp import logsumexp

_SIDES = {"views": (1,), "one_way": (1,), "two_way": (1, 0)}  # the dimensions of the scores that are summed over


def is_small(problem: Problem) -> bool:
    """Whether so few scores are better left to the compiler, on the device of q."""
    G, N, M, _ = sizes_of(problem)
    return few(problem.q, G * N, M)


def few(x: Tensor, rows: int, columns: int) -> bool:
    if autocast_active(x.device.type):
        return False  # it would round the products to 16 bits, forward and backward
    return rows * columns <= 2**16


def dense(problem: Problem, columns: bool, need_best: bool) -> TensorOrTuple:
    """What `similarity_lse` returns."""
    q, k, _, _, q_ids, k_ids, same, k_bias, q_limit = problem
    keys = q if k is None else k
    s = wide(q @ keys.mT) * full_scale_of(problem)
    if k_bias is not None:
        s = s + k_bias.unsqueeze(-2)
    left_out = []
    if k is None:
        left_out.append(torch.eye(s.shape[-1], dtype=torch.bool, device=s.device))
        k_ids = q_ids
    if q_ids is not None and k_ids is not None:
        equal = q_ids.unsqueeze(-1) == k_ids.unsqueeze(-2)
        left_out.append(~equal if same else equal)
    if k_bias is not None:
        left_out.append((k_bias == -math.inf).unsqueeze(-2))
    if q_limit is not None:
        left_out.append(s > q_limit.unsqueeze(-1))
    if left_out:
        s = s.masked_fill(functools.reduce(operator.or_, left_out), -math.inf)
    dims = (-1, -2) if columns else (-1,)
    out = [logsumexp(s, dim) for dim in dims]
    if need_best:
        out.append(cat([s.amax(dim) for dim in dims], -1).detach())
    return out[0] if len(out) == 1 else tuple(out)


def _dense_contrast(
    x: Tensor, y: Tensor, scale: Tensor, ids: Tensor | None, mode: str, normalize: bool, need_best: bool,
    reduction: str = "none",
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What `pair_contrast` returns, of a scale that is a tensor; best: empty unless `need_best`."""
    scale = scale.to(accumulator(x))
    if _suits(x, ids):
        if normalize:
            x, y = unit(x), unit(y)
        losses, positive, best, *_ = _by_hand.way(True, x, y, scale)(x, y, scale, mode, need_best)
    else:
        losses, positive, best = _left_to_the_compiler(x, y, scale, ids, mode, normalize, need_best)
    if best is None:
        best = losses.new_empty(0)
    return reduced(losses, mode, reduction), positive, best


def reduced(losses: Tensor, mode: str, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "mean":
        return mean(losses)
    if mode == "two_way":
        losses = losses.mean(0)
    return total(losses)


def _left_to_the_compiler(
    x: Tensor, y: Tensor, scale: Tensor, ids: Tensor | None, mode: str, normalize: bool, need_best: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    N = x.shape[0]
    if normalize:
        x, y = unit(x), unit(y)
    positive = times(dots(x, y), scale)
    q, k = x, y
    if mode == "views":
        q = k = cat((x, y))
        ids = ids if ids is None else ids.repeat(2)
    if ids is None:
        row = torch.arange(q.shape[0], device=q.device)
        apart = row.unsqueeze(1) - row
        left_out = (apart == 0) | (apart.abs() == N)
    else:
        left_out = ids.unsqueeze(1) == ids
    s = (wide(q @ k.mT) * scale).masked_fill(left_out, -math.inf)
    over = torch.logsumexp if ids is None and N > 1 else logsumexp  # then every row has a negative
    sides = _SIDES[mode]
    negatives = [half for side in sides for half in over(s, side).view(-1, N)]
    best = None
    if need_best:
        best = stack([s.amax(side) for side in sides]).view(-1, N).detach()
    # Stacked before the softplus, the inductor of torch 2.13 computes gradients that are wrong (with a scale tensor).
    return stack([pair_loss(side, positive) for side in negatives]), positive.detach(), best


# ---- with a derivative by hand, of at least two rows that all differ -------------------------------------------------


def _suits(x: Tensor, ids: Tensor | None) -> bool:
    """On a GPU this form is no faster, and fp16 may not hold its W."""
    return ids is None and x.shape[0] > 1 and x.device.type == "cpu" and x.dtype != torch.float16


# With share_i = sigmoid(negatives_i - positive_i), that of the negatives, the derivative of a sum of losses with
# weights g by the scores that count, and by the positives, is
#
#     W_ij = g_i share_i exp(s_ij - negatives_i)      (and the same of the columns)      W_ii = - g_i share_i
#
# in which no exponential is above 1, however large the scores and their rounding. The positives take the place of the
# diagonal, and W that of S in the products. S stays in the type of the features: scaled within each pass, it is read in
# half the bytes where that is bf16. Left to itself the compiler spends a mask in each pass over S, a division per
# score, and two passes on the derivative of a diagonal; and of two views, whose S is symmetric, W + W^T takes one
# product instead of two.


def _contrast(x: Tensor, y: Tensor, scale: Tensor, mode: str, need_best: bool) -> tuple[Tensor | None, ...]:
    N = x.shape[0]
    q, k = x, y
    if mode == "views":
        q = k = cat((x, y))
    s, positive = q @ k.mT, dots(x, y) * scale
    scale = _nonzero(scale)
    s.diagonal().copy_(-math.inf / scale)
    if mode == "views":
        for part in (s[:N, N:], s[N:, :N]):
            part.diagonal().copy_(-math.inf / scale)
    scores = wide(s) * scale
    sides = _SIDES[mode]
    negatives = [half for side in sides for half in scores.logsumexp(side).view(-1, N)]
    # The compiler stores what is stacked: else the backward would compute the share of the negatives for each score.
    saved = stack(negatives + [torch.sigmoid(side - positive) for side in negatives])
    losses = pair_loss(saved[: len(negatives)], positive)
    best = None
    if need_best:
        best = stack([scores.amax(side) for side in sides]).view(-1, N)
    return losses, positive, best, s, saved


def _nonzero(scale: Tensor) -> Tensor:
    """scale, by which an infinite score is still one."""
    return scale.masked_fill(scale == 0, torch.finfo(scale.dtype).tiny)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    x, y, scale, ctx.mode, _ = inputs
    ctx.save_for_backward(x, y, scale, *outputs[3:])


def _backward(ctx: Any, g: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    x, y, scale, s, saved = ctx.saved_tensors
    N, dtype = x.shape[0], x.dtype
    negatives, share = saved.chunk(2)
    weight = g * share
    diagonal = -weight.sum(0)
    # With its factors in this order it is not the product of the forward, which would be stored beside s.
    scores = torch.mul(_nonzero(scale), wide(s))
    if ctx.mode == "views":
        z, weight, negatives = cat((x, y)), weight.view(-1), negatives.view(-1)
        # Rounded, s_ij may be above s_ji, whose negatives_j these are.
        w = weight.unsqueeze(1) * (scores - negatives.unsqueeze(1)).exp()
        w = (w + weight * (scores - negatives).clamp(max=0).exp()).to(dtype)
        for part in (w[:N, N:], w[N:, :N]):
            part.diagonal().copy_(diagonal)
        dz = wide(w @ z)
        dx, dy = (dz * scale).to(dtype).split(N)
        dscale = (dz * z).sum() / 2
    else:
        w = weight[0].unsqueeze(1) * (scores - negatives[0].unsqueeze(1)).exp()
        if ctx.mode == "two_way":
            w = w + weight[1] * (scores - negatives[1]).exp()
        w = w.to(dtype)
        w.diagonal().copy_(diagonal)
        dx, dy = wide(w @ y), wide(w.mT @ x)
        dscale = (dx * x).sum()
        dx, dy = (dx * scale).to(dtype), (dy * scale).to(dtype)
    return *once((g, x, y, scale), dx, dy, dscale), None, None


_by_hand = Node(_contrast, _save, _backward, name="different_rows", outputs=1)


# One operator, which the compiler takes apart only after it has looked through the code around it: each function that
# it looked into would be guarded in every call. Compiled code is stored on disk under the names of its operators, so
# the name of this one changes with the formulas above.
_NAME = f"dense_contrast_{zlib.crc32(Path(__file__).read_bytes()):08x}"
library.define(
    f"{_NAME}(Tensor x, Tensor y, Tensor scale, Tensor? ids, str mode, bool normalize, bool need_best,"
    " str reduction='none') -> (Tensor losses, Tensor positive, Tensor best)"
)
library.impl(_NAME, _dense_contrast, "CompositeImplicitAutograd")
dense_contrast = getattr(torch.ops.sslkern, _NAME).default
