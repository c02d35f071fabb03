"""`pair_contrast`: the losses of pairs against `similarity_lse` negatives, as one node of the graph.

    positive_i = scale <x_i, y_i>      loss_i = softplus(gap_i)      gap_i = negatives_i - positive_i

With g = dL/dloss, the gradient of the negatives is weight_i = g_i sigmoid(gap_i); that of the positive is -toward_i,
its sum over the sides; and that of the cosine is -pull_i, pull = scale toward. The rest is the derivatives of
`unit_pairs` and `similarity_lse`.

A loss of 32 rows spends its time between the kernels: normalisation, positives and softplus come to twenty autograd
nodes, here one, composed of the primitives `unit_pairs`, `similarity_lse` and `pair_losses`.

Where the losses are only summed up, their gradient but for one factor is known in the forward. A backend may have all
of that, for few rows that would wait for launches: `pair_contrast_fwd`, `pair_contrast_fake` and `pair_contrast_bwd`
with the arguments of the operators `small_pair_contrast` and `small_pair_contrast_bwd` but the last; what it keeps is
its own affair.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import find, load, resolve_each, rows_to_keep
from ..backends.problem import Problem
from ..common.node import Node, Operator, from_eager, once, outside_autograd, past_dispatcher_in
from ..common.rows import dots, row_numbers, unit
from ..common.sums import dot
from ..common.tensors import accumulator, transformed
from ._dense import dense_contrast, few, reduced
from .problem import scale_parts
from .queue_push import queue_push_
from .similarity_lse import frozen_gradient

PARTS = "similarity_lse", "unit_pairs", "pair_losses"


def pair_contrast(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    ids: Tensor | None,
    mode: str,
    normalize: bool,
    need_best: bool,
    bank: Tensor | None = None,
    reduction: str = "none",
    unit_bank: bool = False,
    ptr: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The losses of pairs, by the kernels or, where it does better, by the compiler.

    Args:
        x, y: [N, D], normalised first where `normalize` says so.
        scale: a float or a 0-d tensor.
        ids: int64 [N]; rows with equal ids are not contrasted. None: all differ.
        mode: "views": the negatives of a row of x or y are rows of both (NT-Xent); "one_way": rows of y for each of x;
            "two_way": also rows of x for each of y.
        need_best: also return the best of the negatives.
        bank: [M, D], the negatives of "one_way" instead, without gradient; ids must be None.
        reduction: "none", "mean", or "sum", in which both ways of "two_way" count half.
        unit_bank: the bank is normalised first, too.
        ptr: y is then pushed onto the bank, as `queue_push_` does, in the same launches where a backend can.

    Returns:
        losses [2, N], those of x first ("one_way": [1, N]), or what they are reduced to, 0-d; positive [N] and best, of
        the shape of the losses, both without gradient, or None unless `need_best`. All in fp32 (fp64).
    """
    N, views = x.shape[0], mode == "views"
    rows = 2 * N if views else N
    if bank is not None:
        if ids is not None:
            raise ValueError("ids must be None with a bank: its rows have none to compare them with")
        bank = bank.detach()
    # Keys that do not learn are not kept: a queue may be overwritten before the backward.
    frozen = mode == "one_way" and (bank is not None or not (y.requires_grad or transformed()))
    by_formula = torch.compiler.is_compiling() and not frozen and few_pairs(x, rows, ids)
    if reduction != "none" and not (by_formula and x.device.type == "cpu"):
        sizes = (1, rows, rows if bank is None else bank.shape[0], x.shape[1])
        backend = find("pair_contrast", x, sizes=sizes, bank=bank is not None, mode=mode)
        if backend is not None:
            return _whole(x, y, bank, scale, 0.0, ids, ptr, mode, normalize, unit_bank, need_best, reduction, backend)
    if by_formula:
        one = x.new_ones(())  # a number that changes is compiled once as a tensor
        scale = (one if x.dtype.itemsize > 4 else one.float()) * scale
        losses, positive, best = dense_contrast(x, y, scale, ids, mode, normalize, need_best, reduction)
        return losses, positive, best if need_best else None

    if ids is not None and views:
        ids = ids.repeat(2)
    queue = bank
    if unit_bank:
        bank = unit(bank)
    scale_tensor, scale = scale_parts(scale, x)
    of_x, of_scale = x.requires_grad, scale_tensor is not None and scale_tensor.requires_grad
    learns = torch.is_grad_enabled() and (of_x or y.requires_grad or of_scale or transformed())
    frozen = frozen and learns and (of_x or of_scale or transformed())  # the mean of the negatives is for these
    way = _node.way(learns, x, y, bank, scale_tensor, ids)
    if ids is None and bank is None:
        ids = row_numbers(N, 1 + views, x.device, keep=way in (_node.eager, _node.function))
    # Who has each part of it.
    sizes = 1, rows, rows if bank is None else bank.shape[0], x.shape[1]
    parts = resolve_each(PARTS, x, dict(sizes=sizes, frozen=frozen))
    kept_rows = rows_to_keep(parts[0], rows, rows, x.shape[1], itself=views) if learns and not frozen else 0
    losses, positive, best, *_ = way(
        x, y, bank, scale_tensor, scale, ids, mode, normalize, need_best, frozen, kept_rows, ",".join(parts)
    )
    if ptr is not None:
        queue_push_(queue, ptr, y, normalize)
    return reduced(losses, mode, reduction), positive, best if need_best else None


def few_pairs(x: Tensor, rows: int, ids: Tensor | None) -> bool:
    """Whether the losses of scores [rows, rows] are better left to the compiler. Of two views, whose scores are
    symmetric, our kernels spare half of the products."""
    if ids is not None or x.shape[0] == 1 or x.device.type != "cpu" or x.dtype == torch.float16:
        return few(x, rows, rows)
    if rows == x.shape[0]:
        most = 2**22
    else:
        most = 2**20 if x.dtype == torch.bfloat16 and x.shape[1] >= 128 else 2**18
    return rows * rows <= most and not torch.is_autocast_enabled("cpu")


# ---- the node --------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor, y: Tensor, bank: Tensor | None, scale_tensor: Tensor | None, scale: float, ids: Tensor | None, mode: str,
    normalize: bool, need_best: bool, frozen: bool, kept_rows: int, backends: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    backend, pairs, losses = backends.split(",")
    N = x.shape[0]
    z, norm, cosine = load(pairs, "unit_pairs").unit_pairs_fwd(x, y, normalize)
    if mode == "views":
        problem = Problem(z, None, scale_tensor, scale, ids)
    else:
        problem = Problem(z[:N], z[N:] if bank is None else bank, scale_tensor, scale, ids, ids)
    primitive = load(backend, "similarity_lse")
    if frozen:  # what the gradient needs of the negatives comes with the forward
        (row, kept, best), col = primitive.similarity_lse_frozen_fwd(problem, need_best), None
    else:
        row, col, best, kept = primitive.similarity_lse_fwd(problem, mode == "two_way", need_best, kept_rows)
    bounded = normalize and bank is None and scale_tensor is None and abs(scale) < 1e30  # rows of length 1, or NaN
    forward = load(losses, "pair_losses").pair_losses_fwd
    losses, positive, gap = forward(row, col, cosine, scale_tensor, scale, bounded)
    return losses, positive, best.view(-1, N) if need_best else None, z, norm, cosine, gap, row, col, kept


def _fake(
    x: Tensor, y: Tensor, bank: Tensor | None, scale_tensor: Tensor | None, scale: float, ids: Tensor | None, mode: str,
    normalize: bool, need_best: bool, frozen: bool, kept_rows: int, backends: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    (N, D), dtype = x.shape, accumulator(x)
    views, sides = mode == "views", 1 if mode == "one_way" else 2

    def new(*shape: int) -> Tensor:
        return x.new_empty(shape, dtype=dtype)

    z, norm, cosine = x.new_empty(2 * N, D), new(2 * N if normalize else 0), new(N)
    row, col = new(N * (1 + views)), new(N if mode == "two_way" else 0)
    kept = new(N, D) if frozen else new(kept_rows, N * (1 + views)) if kept_rows else new(0)
    return new(sides, N), new(N), new(sides, N) if need_best else new(0), z, norm, cosine, new(sides, N), row, col, kept


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    x, y, _, scale_tensor, ctx.scale, ids, ctx.mode, ctx.normalize, _, ctx.frozen, _, ctx.backends = inputs
    _, _, _, z, norm, cosine, gap, row, col, kept = outputs
    # What learns, to tell that its gradient has none.
    learn = [side for side in (x, y, scale_tensor) if side is not None and (side.requires_grad or transformed())]
    if not from_eager(ctx):
        norm, col, kept = _or_none(norm), _or_none(col), kept if ctx.frozen else _or_none(kept)
    saved = z, norm, cosine, gap, row, col, kept
    ctx.save_for_backward(*learn, scale_tensor, ids, *saved)


def _backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 12
    saved = ctx.saved_tensors
    if not (type(ctx) is _Context or past_dispatcher_in(ctx, g)):
        return _by_operator(ctx, g, saved)
    # Not in a function of its own: a small batch feels each call.
    *learn, scale_tensor, ids, z, norm, cosine, gap, row, col, kept = saved
    need_x, need_y, _, need_scale, *_ = ctx.needs_input_grad
    backend, pairs, losses = ctx.backends.split(",")
    N, two_way, dscale = cosine.shape[0], ctx.mode == "two_way", None
    with outside_autograd():
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
    return dx, dy, None, dscale, *(None,) * 8


def _or_none(x: Tensor | None) -> Tensor | None:
    """What an operator returned for None is empty."""
    return x if x is not None and x.numel() else None


_node = Node(
    Operator(
        "pair_contrast(Tensor x, Tensor y, Tensor? bank, Tensor? scale_tensor, float scale, Tensor? ids, str mode,"
        " bool normalize, bool need_best, bool frozen, int kept_rows, str backends) -> (Tensor losses,"
        " Tensor positive, Tensor best, Tensor z, Tensor norm, Tensor cosine, Tensor gap, Tensor row, Tensor col,"
        " Tensor kept)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=1,
)


# ---- its derivative as an operator, for compiled code ----------------------------------------------------------------


class _Context(NamedTuple):
    """What `_backward` reads of a context."""

    saved_tensors: tuple[Tensor | None, ...]
    scale: float
    mode: str
    normalize: bool
    frozen: bool
    backends: str
    needs_input_grad: tuple[bool, ...]


def _by_operator(ctx: Any, g: Tensor, saved: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    *learn, scale_tensor, ids, z, norm, cosine, gap, row, col, kept = saved
    need_x, need_y, _, need_scale, *_ = ctx.needs_input_grad
    inputs = g, z, norm, cosine, gap, row, col, kept, scale_tensor, ctx.scale, ids
    options = ctx.mode, ctx.normalize, ctx.frozen, need_x, need_y, need_scale, ctx.backends
    with outside_autograd():
        dx, dy, dscale = _gradients.way_back(ctx, g)(*inputs, *options)
    dx, dy, dscale = once((g, *learn), dx if need_x else None, dy if need_y else None, dscale if need_scale else None)
    return dx, dy, None, dscale, *(None,) * 8


def _gradients_of(
    g: Tensor, z: Tensor, norm: Tensor | None, cosine: Tensor, gap: Tensor, row: Tensor, col: Tensor | None,
    kept: Tensor | None, scale_tensor: Tensor | None, scale: float, ids: Tensor | None, *options: Any,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    mode, normalize, frozen, need_x, need_y, need_scale, backends = options
    saved, needs = (scale_tensor, ids, z, norm, cosine, gap, row, col, kept), (need_x, need_y, False, need_scale)
    dx, dy, _, dscale, *_ = _backward(_Context(saved, scale, mode, normalize, frozen, backends, needs), g)
    return dx, dy, dscale


def _gradients_fake(
    g: Tensor, z: Tensor, norm: Tensor | None, cosine: Tensor, gap: Tensor, row: Tensor, col: Tensor | None,
    kept: Tensor | None, scale_tensor: Tensor | None, scale: float, ids: Tensor | None, *options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
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


# ---- as a whole, by a backend that makes the gradient with the loss --------------------------------------------------


def pair_sigmoid(
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    bias: float | Tensor,
    ids: Tensor | None,
    normalize: bool,
    reduction: str,
) -> Tensor | None:
    """SigLIP's loss 0-d of x, y [N, D], by a backend that has all of it; else None."""
    if reduction == "none":
        return None
    backend = find("pair_contrast", x, sizes=(1, x.shape[0], *x.shape), bank=False, mode="sigmoid")
    if backend is None:
        return None
    return _whole(x, y, None, scale, bias, ids, None, "sigmoid", normalize, False, False, reduction, backend)[0]


def pair_labels(x: Tensor, scale: float | Tensor, labels: Tensor, normalize: bool, reduction: str) -> Tensor | None:
    """SupCon's loss 0-d of x [N, D] with labels int64 [N], by a backend that has all of it; else None."""
    if reduction == "none":
        return None
    backend = find("pair_contrast", x, sizes=(1, x.shape[0], *x.shape), bank=False, mode="labels")
    if backend is None:
        return None
    return _whole(x, x, None, scale, 0.0, labels, None, "labels", normalize, False, False, reduction, backend)[0]


def _whole(
    x: Tensor, y: Tensor, bank: Tensor | None, scale: float | Tensor, bias: float | Tensor, ids: Tensor | None,
    ptr: Tensor | None, mode: str, normalize: bool, unit_bank: bool, need_best: bool, reduction: str, backend: str,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    scale_tensor, scale = scale_parts(scale, x)
    bias_tensor, bias = scale_parts(bias, x) if mode == "sigmoid" else (None, 0.0)
    need_x = need_y = need_scale = need_bias = False
    if torch.is_grad_enabled():
        need_x = x.requires_grad or transformed()
        need_y = mode != "labels" and (y.requires_grad or transformed())
        need_scale = scale_tensor is not None and (scale_tensor.requires_grad or transformed())
        need_bias = bias_tensor is not None and (bias_tensor.requires_grad or transformed())
    learns = need_x or need_y or need_scale or need_bias
    way, later = _node_of_whole.way(learns, x, y, bank, scale_tensor, bias_tensor, ids, ptr), None
    # An operator that has a derivative may write nothing, so compiled code pushes by another one.
    if ptr is not None and not (way in (_node_of_whole.eager, _node_of_whole.function) and bank.is_contiguous()):
        ptr, later = None, ptr
    loss, positive, best, *_ = way(
        x, y, bank, scale_tensor, scale, bias_tensor, bias, ids, ptr, mode, normalize, unit_bank, need_best, reduction,
        need_x, need_y, need_scale, need_bias, backend,
    )  # fmt: skip
    if later is not None:
        queue_push_(bank, later, y, normalize)
    return (loss, positive, best) if need_best else (loss, None, None)


def _whole_forward(*inputs: Any) -> tuple[Tensor | None, ...]:
    return load(inputs[-1], "pair_contrast").pair_contrast_fwd(*inputs[:-1])


def _whole_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *inputs, backend = inputs
    return load(backend, "pair_contrast").pair_contrast_fake(*inputs)


def _whole_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    x, y, _, scale, _, bias = inputs[:6]
    need_x, need_y, need_scale, need_bias, ctx.backend = inputs[14:]
    ctx.dtype = x.dtype
    learn = x if need_x else None, y if need_y else None, scale if need_scale else None, bias if need_bias else None
    ctx.save_for_backward(*learn, outputs[3])


def _whole_backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 19
    x, y, scale, bias, kept = ctx.saved_tensors
    if not torch.is_grad_enabled() and past_dispatcher_in(ctx, g):  # nothing of what follows is needed
        dx, dy, dscale, dbias = _scale(g, x, y, scale, bias, kept, ctx.dtype, ctx.backend)
        return dx, dy, None, dscale, None, dbias, *(None,) * 13
    with outside_autograd():
        dx, dy, dscale, dbias = _scaled.way_back(ctx, g)(g, x, y, scale, bias, kept, ctx.dtype, ctx.backend)
    # An operator returns an empty tensor for None.
    dx, dy = None if x is None else dx, None if y is None else dy
    dscale, dbias = None if scale is None else dscale, None if bias is None else dbias
    dx, dy, dscale, dbias = once((g, x, y, scale, bias), dx, dy, dscale, dbias)
    return dx, dy, None, dscale, None, dbias, *(None,) * 13


def _scale(
    g: Tensor, x: Tensor | None, y: Tensor | None, scale_tensor: Tensor | None, bias_tensor: Tensor | None,
    kept: Tensor, dtype: torch.dtype, backend: str,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    return load(backend, "pair_contrast").pair_contrast_bwd(g, x, y, scale_tensor, bias_tensor, kept, dtype)


def _scale_fake(g: Tensor, *learn: Any) -> tuple[Tensor, ...]:
    contiguous = torch.contiguous_format
    return tuple(g.new_empty(0) if of is None else torch.empty_like(of, memory_format=contiguous) for of in learn[:4])


_node_of_whole = Node(
    Operator(
        "small_pair_contrast(Tensor x, Tensor y, Tensor? bank, Tensor? scale_tensor, float scale, Tensor? bias_tensor,"
        " float bias, Tensor? ids, Tensor? ptr, str mode, bool normalize, bool unit_bank, bool need_best,"
        " str reduction, bool need_x, bool need_y, bool need_scale, bool need_bias, str backend) ->"
        " (Tensor loss, Tensor positive, Tensor best, Tensor kept)",
        _whole_forward,
        _whole_fake,
    ),
    _whole_save,
    _whole_backward,
    outputs=1,
)
_scaled = Operator(
    "small_pair_contrast_bwd(Tensor g, Tensor? x, Tensor? y, Tensor? scale_tensor, Tensor? bias_tensor, Tensor kept,"
    " ScalarType dtype, str backend) -> (Tensor dx, Tensor dy, Tensor dscale, Tensor dbias)",
    _scale,
    _scale_fake,
)
