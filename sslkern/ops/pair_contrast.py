"""`pair_contrast`: the losses of pairs against `similarity_lse` negatives, as one node of the graph.

    positive_i = scale <x_i, y_i>      loss_i = softplus(gap_i)      gap_i = negatives_i - positive_i

With g = dL/dloss, the gradient of the negatives is weight_i = g_i sigmoid(gap_i); that of the positive is -toward_i,
its sum over the sides; and that of the cosine is -pull_i, pull = scale toward. The rest is the derivatives of
`unit_pairs` and `similarity_lse`.

A loss of 32 rows spends its time between the kernels: normalisation, positives and softplus come to twenty autograd
nodes, here one. A backend may have all of it: `pair_contrast_fwd` and `pair_contrast_fake` with the arguments of
`_forward` and `_fake` up to `frozen`, and `pair_contrast_bwd` with those of `_gradients_of` but the last; what the
outputs after `best` hold is its own affair, but for the shapes of z [2N, D] and cosine [N]. Else the loss is composed
of the primitives `unit_pairs`, `similarity_lse` and `pair_losses`.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..backends import find, kept_rows, load, offered, resolve_each
from ..backends.problem import Problem
from ..common.node import Node, Operator, from_eager, once, past_dispatcher_in
from ..common.rows import dots, row_numbers
from ..common.sums import dot
from ..common.tensors import accumulator, transformed
from ._dense import dense_contrast, few_pairs
from ._problem import scale_parts
from .similarity_lse import frozen_gradient

PARTS = "similarity_lse", "unit_pairs", "pair_losses"


def pair_contrast(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    ids: Tensor | None,
    mode: str,
    normalize: bool,
    best: bool,
    bank: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses of pairs, by the kernels or, where it does better, by the compiler.

    Args:
        x, y: [N, D], normalised first where `normalize` says so.
        scale: a float or a 0-d tensor.
        ids: int64 [N]; rows with equal ids are not contrasted. None: all differ.
        mode: "views": the negatives of a row of x or y are rows of both (NT-Xent); "one_way": rows of y for each of x;
            "two_way": also rows of x for each of y.
        best: also return the largest negative score.
        bank: [M, D], the negatives of "one_way" instead, as they are and without gradient; ids must be None.

    Returns:
        losses [2, N], those of x first ("one_way": [1, N]); positive [N] and best, of the shape of losses, both without
        gradient, or None unless `best`. All in fp32 (fp64).
    """
    N, views = x.shape[0], mode == "views"
    rows = 2 * N if views else N
    # Keys that do not learn are not kept: a queue may be overwritten before the backward.
    frozen = mode == "one_way" and (bank is not None or not (y.requires_grad or transformed()))
    if torch.compiler.is_compiling() and not frozen and few_pairs(x, rows, ids):
        return dense_contrast(x, y, scale, ids, mode, normalize, best)

    if bank is not None:
        if ids is not None:
            raise ValueError("ids must be None with a bank: its rows have none to compare them with")
        bank = bank.detach()
    elif ids is not None and views:
        ids = ids.repeat(2)
    scale_tensor, scale = scale_parts(scale, x)
    of_x, of_scale = x.requires_grad, scale_tensor is not None and scale_tensor.requires_grad
    learns = torch.is_grad_enabled() and (of_x or y.requires_grad or of_scale or transformed())
    frozen = frozen and learns and (of_x or of_scale or transformed())  # the mean of the negatives is for these
    way = _node.way(learns, x, y, bank, scale_tensor, ids)
    if ids is None and bank is None:
        ids = row_numbers(N, 1 + views, x.device, keep=way in (_node.eager, _node.function))
    sizes, backends, keep = dict(sizes=(1, rows, rows if bank is None else bank.shape[0], x.shape[1])), None, 0
    if offered("pair_contrast"):
        options = dict(mode=mode, normalize=normalize, best=best, learns=learns, bank=bank is not None)
        backends = find("pair_contrast", x, **sizes, **options)
    if backends is None:  # who has each part of it
        parts = resolve_each(PARTS, x, sizes)
        keep = kept_rows(parts[0], rows, rows, x.shape[1], itself=views) if learns and not frozen else 0
        backends = ",".join(parts)
    losses, positive, top, *_ = way(
        x, y, bank, scale_tensor, scale, ids, mode, normalize, best, learns, frozen, keep, backends
    )
    return losses, positive, top if best else None


# ---- the node --------------------------------------------------------------------------------------------------------


def _forward(x, y, bank, scale_tensor, scale, ids, mode, normalize, best, learns, frozen, keep, backends):
    whole, *parts = backends.split(",")
    if not parts:
        forward = load(whole, "pair_contrast").pair_contrast_fwd
        return forward(x, y, bank, scale_tensor, scale, ids, mode, normalize, best, learns, frozen)
    backend, (pairs, losses) = whole, parts
    N = x.shape[0]
    z, norm, cosine = load(pairs, "unit_pairs").unit_pairs_fwd(x, y, normalize)
    if mode == "views":
        problem = Problem(z, None, scale_tensor, scale, ids)
    else:
        problem = Problem(z[:N], z[N:] if bank is None else bank, scale_tensor, scale, ids, ids)
    primitive = load(backend, "similarity_lse")
    if frozen:  # what the gradient needs of the negatives comes with the forward
        (row, kept, top), col = primitive.similarity_lse_frozen_fwd(problem, best), None
    else:
        row, col, top, kept = primitive.similarity_lse_fwd(problem, mode == "two_way", best, keep)
    bounded = normalize and bank is None and scale_tensor is None and abs(scale) < 1e30  # rows of length 1, or NaN
    forward = load(losses, "pair_losses").pair_losses_fwd
    losses, positive, gap = forward(row, col, cosine, scale_tensor, scale, bounded)
    return losses, positive, top.view(-1, N) if best else None, z, norm, cosine, gap, row, col, kept


def _fake(x, y, bank, scale_tensor, scale, ids, mode, normalize, best, learns, frozen, keep, backends):
    if "," not in backends:
        fake = load(backends, "pair_contrast").pair_contrast_fake
        return fake(x, y, bank, scale_tensor, scale, ids, mode, normalize, best, learns, frozen)
    (N, D), dtype = x.shape, accumulator(x)
    views, sides = mode == "views", 1 if mode == "one_way" else 2

    def new(*shape):
        return x.new_empty(shape, dtype=dtype)

    z, norm, cosine = x.new_empty(2 * N, D), new(2 * N if normalize else 0), new(N)
    row, col = new(N * (1 + views)), new(N if mode == "two_way" else 0)
    kept = new(N, D) if frozen else new(keep, N * (1 + views)) if keep else new(0)
    return new(sides, N), new(N), new(sides, N) if best else new(0), z, norm, cosine, new(sides, N), row, col, kept


def _save(ctx, inputs, outputs) -> None:
    x, y, _, scale_tensor, ctx.scale, ids, ctx.mode, ctx.normalize, _, _, ctx.frozen, _, ctx.backends = inputs
    _, _, _, z, norm, cosine, gap, row, col, kept = outputs
    # What learns, to tell that its gradient has none.
    learn = [side for side in (x, y, scale_tensor) if side is not None and (side.requires_grad or transformed())]
    if not from_eager(ctx):
        norm, col, kept = _or_none(norm), _or_none(col), kept if ctx.frozen else _or_none(kept)
    saved = z, norm, cosine, gap, row, col, kept
    ctx.save_for_backward(*learn, scale_tensor, ids, *saved)


def _backward(ctx, g, *_):
    if g is None:
        return (None,) * 13
    saved = ctx.saved_tensors
    if "," not in ctx.backends or not (type(ctx) is _Context or past_dispatcher_in(ctx, g)):
        return _by_operator(ctx, g, saved)
    # Not in a function of its own: a small batch feels each call.
    *learn, scale_tensor, ids, z, norm, cosine, gap, row, col, kept = saved
    need_x, need_y, _, need_scale, *_ = ctx.needs_input_grad
    backend, pairs, losses = ctx.backends.split(",")
    N, two_way, dscale = cosine.shape[0], ctx.mode == "two_way", None
    with torch.no_grad():
        weight, toward, pull = load(losses, "pair_losses").pair_losses_bwd(gap, g, scale_tensor, ctx.scale)
        if ctx.frozen or ids is None:  # keys that do not learn, or a bank
            da = frozen_gradient(pull, kept) if need_x else None
            db = cosine.new_zeros(N, z.shape[1]) if need_y else None
            if need_scale:
                dscale = dot(toward, dots(z[:N], kept) - cosine)
        else:
            backward = load(backend, "similarity_lse").similarity_lse_bwd
            if ctx.mode == "views":
                problem = Problem(z, None, scale_tensor, ctx.scale, ids)
                dz, _, dscale, _ = backward(
                    problem, row, None, weight.view(-1), None, kept, True, False, need_scale, False
                )
                da, db = dz[:N], dz[N:]
            else:
                problem = Problem(z[:N], z[N:], scale_tensor, ctx.scale, ids, ids)
                col, h = (col, weight[1]) if two_way else (None, None)
                da, db, dscale, _ = backward(problem, row, col, weight[0], h, kept, need_x, need_y, need_scale, False)
            if need_scale:
                dscale = dscale - dot(toward, cosine)
        dscale = dscale.to(scale_tensor.dtype) if need_scale else None
        norm = norm if ctx.normalize else None
        dx, dy = load(pairs, "unit_pairs").unit_pairs_bwd(z, norm, pull, da, db, need_x, need_y)
    dx, dy, dscale = once((g, *learn), dx, dy, dscale)
    return dx, dy, None, dscale, *(None,) * 9


def _or_none(x: Tensor | None) -> Tensor | None:
    """What an operator returned for None is empty."""
    return x if x is not None and x.numel() else None


_node = Node(
    Operator(
        "pair_contrast(Tensor x, Tensor y, Tensor? bank, Tensor? scale_tensor, float scale, Tensor? ids, str mode,"
        " bool normalize, bool best, bool learns, bool frozen, int keep, str backends) -> (Tensor losses,"
        " Tensor positive, Tensor best, Tensor z, Tensor norm, Tensor cosine, Tensor gap, Tensor row, Tensor col,"
        " Tensor kept)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=1,
)


# ---- its derivative as an operator: for compiled code, and for a backend that has it whole ---------------------------


class _Context(NamedTuple):
    """What `_backward` reads of a context."""

    saved_tensors: tuple[Tensor | None, ...]
    scale: float
    mode: str
    normalize: bool
    frozen: bool
    backends: str
    needs_input_grad: tuple[bool, ...]


def _by_operator(ctx, g, saved):
    *learn, scale_tensor, ids, z, norm, cosine, gap, row, col, kept = saved
    need_x, need_y, _, need_scale, *_ = ctx.needs_input_grad
    inputs = g, z, norm, cosine, gap, row, col, kept, scale_tensor, ctx.scale, ids
    options = ctx.mode, ctx.normalize, ctx.frozen, need_x, need_y, need_scale, ctx.backends
    with torch.no_grad():
        dx, dy, dscale = _gradients.way_back(ctx, g)(*inputs, *options)
    dx, dy, dscale = once((g, *learn), dx if need_x else None, dy if need_y else None, dscale if need_scale else None)
    return dx, dy, None, dscale, *(None,) * 9


def _gradients_of(g, z, norm, cosine, gap, row, col, kept, scale_tensor, scale, ids, *options):
    *options, backends = options
    if "," not in backends:
        backward = load(backends, "pair_contrast").pair_contrast_bwd
        return backward(g, z, norm, cosine, gap, row, col, kept, scale_tensor, scale, ids, *options)
    mode, normalize, frozen, need_x, need_y, need_scale = options
    saved, needs = (scale_tensor, ids, z, norm, cosine, gap, row, col, kept), (need_x, need_y, False, need_scale)
    dx, dy, _, dscale, *_ = _backward(_Context(saved, scale, mode, normalize, frozen, backends, needs), g)
    return dx, dy, dscale


def _gradients_fake(g, z, norm, cosine, gap, row, col, kept, scale_tensor, scale, ids, *options):
    *_, need_x, need_y, need_scale, _ = options
    dx, dy = (z.new_empty(cosine.shape[0], z.shape[1]) if need else g.new_empty(0) for need in (need_x, need_y))
    return dx, dy, torch.empty_like(scale_tensor) if need_scale else g.new_empty(0)


_gradients = Operator(
    "pair_contrast_bwd(Tensor g, Tensor z, Tensor? norm, Tensor cosine, Tensor gap, Tensor row, Tensor? col,"
    " Tensor? kept, Tensor? scale_tensor, float scale, Tensor? ids, str mode, bool normalize, bool frozen, bool need_x,"
    " bool need_y, bool need_scale, str backends) -> (Tensor dx, Tensor dy, Tensor dscale)",
    _gradients_of,
    _gradients_fake,
)
