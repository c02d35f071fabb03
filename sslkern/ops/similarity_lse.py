"""`similarity_lse`: log-sum-exp over the rows (and columns) of a similarity matrix that is never stored.

With s_ij = scale * <q_i, k_j> + bias_j over the pairs that are kept, and g = dL/drow, h = dL/dcol:

    row_i = log sum_j exp(s_ij)                     col_j = log sum_i exp(s_ij)
    W_ij  = g_i exp(s_ij - row_i) + h_j exp(s_ij - col_j)
    dQ = scale W K      dK = scale W^T Q      dscale = <Q, W K>      dbias_j = sum_i W_ij

Of q with itself: dZ = scale (W + W^T) Z, dscale = <Z, W Z>. Backends provide the two sides of this,
`similarity_lse_fwd` and `similarity_lse_bwd`. Where only the rows are asked for and the keys need no gradient,
`similarity_lse_frozen_fwd` also accumulates mean_i = sum_j exp(s_ij - row_i) k_j, and the derivative is elementwise:

    dQ_i = scale g_i mean_i      dscale = sum_i g_i <q_i, mean_i>

It keeps no keys, so that a queue may be overwritten between forward and backward.
"""

import math

import torch
from torch import Tensor

from ..backends import kept_rows, load, resolve
from ..backends.reference.join import autocast_active, cat
from ..backends.reference.sums import total
from ._arguments import FLOATS, check_choice, check_dense, check_devices, check_flags, describe
from ._library import Once, define, differentiable, library, no_second_derivative, transformed
from ._numbers import check_finite, constant
from .logsumexp import logsumexp

_PROBLEM = "Tensor? scale_tensor, float scale, Tensor? q_ids, Tensor? k_ids, bool same, Tensor? k_bias, Tensor? q_limit"


def similarity_lse(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    k_bias: Tensor | None = None,
    q_limit: Tensor | None = None,
    columns: bool = False,
    best: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Log-sum-exp of the rows, and optionally of the columns, of `s = scale * q @ k.T + k_bias`.

    S is never stored: memory is O(N + M). (In the backward on a GPU, of more than 256 features, a strip of its rows is,
    a few times the size of the gradients.) Features are used as they are, not normalised. Sums run in fp32 (fp64 for
    fp64 input). N = 0 and M = 0 are legal; a row with no pair left gives -inf and gets exactly zero gradient.

    Args:
        q: [N, D] or [G, N, D], fp32, bf16, fp16 or fp64. G problems are independent.
        k: [M, D] or [G, M, D], the type of q. None: q with itself without the self pairs, and one gradient.
        scale: a number, or a 0-d tensor that receives a gradient. Zero and negative are exact.
        q_ids, k_ids: int64 [N] and [M], or with a leading G. For k=None q_ids serves both sides.
        pairs: "different" leaves out the pairs with equal ids, "same" keeps only those.
        k_bias: [M] or [G, M], added to the scores of a column (a log weight, with gradient); -inf takes the column out.
        q_limit: [N] or [G, N], pairs with s_ij > q_limit_i are left out.
        columns: also return the log-sum-exp of the columns, from the same pass.
        best: also return the largest score kept per row (and per column), without gradient.

    Returns:
        row [N] or [G, N] in fp32 (fp64); then with `columns` col [M] or [G, M]; then with `best` [.., N], with
        `columns` [.., N + M] (rows first). A tuple where there is more than one.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for by name cannot run this.
        NotImplementedError: on a second derivative.

    Example:
        >>> z = torch.nn.functional.normalize(torch.randn(8, 16), dim=-1)
        >>> row = sslkern.ops.similarity_lse(z, scale=2.0)  # over all others
        >>> torch.allclose(row, (2 * z @ z.T).fill_diagonal_(-torch.inf).logsumexp(1), atol=1e-5)
        True
    """
    _check(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit)
    check_flags(columns=columns, best=best)
    if columns and k is None:
        raise ValueError("columns=True needs k: for q with itself the columns are the rows")
    scale_tensor, scale, q_ids, k_ids, k_bias, q_limit = _uniform(q, k, scale, q_ids, k_ids, k_bias, q_limit)
    problem = (q, k, scale_tensor, scale, q_ids, k_ids, pairs == "same", k_bias, q_limit)
    backend = resolve("similarity_lse", q)
    keys_learn = (k is not None and k.requires_grad) or (k_bias is not None and k_bias.requires_grad) or transformed()
    learns = keys_learn or q.requires_grad or (scale_tensor is not None and scale_tensor.requires_grad)
    learns = learns and torch.is_grad_enabled()
    frozen = learns and not (columns or keys_learn or k is None)
    # The formula keeps its keys, and compiled code may overwrite a queue before its backward without noticing.
    if (
        torch.compiler.is_compiling()
        and not frozen
        and small(q, q.shape[:-1].numel(), (q if k is None else k).shape[-2])
    ):
        return _dense(*problem, columns, best)
    if frozen:
        row, _, top = _frozen(*problem, best, backend, learns=True)
        return (row, top) if best else row
    groups, M = q.shape[:-2].numel(), (q if k is None else k).shape[-2]
    kept = kept_rows(backend, q.shape[-2], M, q.shape[-1], groups, itself=k is None)
    row, col, top, _ = _lse(*problem, columns, best, kept if learns else 0, backend, learns=learns)
    if columns:
        return (row, col, top) if best else (row, col)
    return (row, top) if best else row


def similarity_lse_bwd(
    q: Tensor,
    k: Tensor | None,
    row: Tensor | None,
    col: Tensor | None,
    g: Tensor | None,
    h: Tensor | None,
    scale: float | Tensor = 1.0,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    k_bias: Tensor | None = None,
    q_limit: Tensor | None = None,
    need_q: bool = True,
    need_k: bool = True,
    need_scale: bool = False,
    need_bias: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradient of `similarity_lse` on one block of S, given the *global* log-sum-exps of its rows and columns.

    Summed over the blocks that S is cut into, the results are the gradients of the whole; nothing here is recorded
    for autograd.

    Args:
        q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit: the block, as in `similarity_lse`.
        row, g: [N] or [G, N] fp32, the global log-sum-exp of each row and dL/drow; both None: rows do not count.
        col, h: [M] or [G, M] fp32, the same for columns. Must be None for k=None.
        need_q, need_k, need_scale, need_bias: what to compute.

    Returns:
        dq [.., N, D], dk [.., M, D], dscale 0-d, dbias [.., M], in fp32 (fp64), None where not needed. For k=None dq
        holds the whole gradient and dk is None.

    Example:
        >>> q, k = torch.randn(4, 8), torch.randn(6, 8)
        >>> row = sslkern.ops.similarity_lse(q, k)
        >>> dq, dk, _, _ = sslkern.ops.similarity_lse_bwd(q, k, row, None, torch.ones(4), None)
    """
    _check(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit)
    check_flags(need_q=need_q, need_k=need_k, need_scale=need_scale, need_bias=need_bias)
    if (row is None) != (g is None) or (col is None) != (h is None) or (row is None and col is None):
        raise ValueError("row and g (and likewise col and h) go together, and one of the two pairs must be given")
    if k is None and col is not None:
        raise ValueError("col and h must be None for k=None: the rows of q with itself are its columns")
    rows, cols = q.shape[:-1], (q if k is None else k).shape[:-1]
    for name, x, shape in (("row", row, rows), ("g", g, rows), ("col", col, cols), ("h", h, cols)):
        if x is None:
            continue
        check_dense(name, x)
        if not isinstance(x, Tensor) or x.shape != shape:
            raise ValueError(f"{name} must be a tensor {list(shape)}, not {describe(x)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
    check_devices("q", q, row=row, g=g, col=col, h=h)
    scale_tensor, scale, q_ids, k_ids, k_bias, q_limit = _uniform(q, k, scale, q_ids, k_ids, k_bias, q_limit)
    row, col, g, h = (None if x is None else x.to(_accumulator(q)) for x in (row, col, g, h))
    needs = (need_q, need_k and k is not None, need_scale, need_bias and k_bias is not None)
    with torch.no_grad():
        grads = torch.ops.sslkern.similarity_lse_bwd.default(
            q, k, row, col, g, h, scale_tensor, scale, q_ids, k_ids, pairs == "same", k_bias, q_limit, None, *needs,
            resolve("similarity_lse", q),
        )  # fmt: skip
    return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit) -> None:
    check_dense("q", q)
    if not isinstance(q, Tensor) or q.ndim not in (2, 3):
        raise ValueError(f"q must be a tensor [N, D] or [G, N, D], not {describe(q)}")
    if q.dtype not in FLOATS:
        raise TypeError(f"q must be fp32, bf16, fp16 or fp64, not {q.dtype}; convert it with .float()")
    if k is None:
        keys = q
        if k_ids is not None:
            raise ValueError("k_ids must be None for k=None: q_ids serves both sides")
    else:
        keys = k
        check_dense("k", k)
        if not isinstance(k, Tensor) or k.ndim != q.ndim or k.shape[-1] != q.shape[-1] or k.shape[:-2] != q.shape[:-2]:
            wanted = (*q.shape[:-2], "M", q.shape[-1])
            raise ValueError(f"k must be a tensor {list(wanted)} to go with q {list(q.shape)}, not {describe(k)}")
        if k.dtype != q.dtype:
            raise TypeError(f"k must have the dtype of q, {q.dtype}, not {k.dtype}; convert one of them")
        if (q_ids is None) != (k_ids is None):
            raise ValueError("q_ids and k_ids go together: give both or neither")
    if isinstance(scale, Tensor):
        if scale.ndim != 0:
            raise ValueError(f"scale must be a number or a 0-d tensor, not {describe(scale)}")
        check_dense("scale", scale)
        if scale.dtype not in FLOATS:
            raise TypeError(f"scale must be floating point, not {scale.dtype}; convert it with .float()")
    else:
        check_finite("scale", scale, " or a 0-d tensor")
    check_choice("pairs", pairs, "different", "same")
    if pairs == "same" and q_ids is None:
        raise ValueError("pairs='same' needs q_ids: give the ids that pairs must share")
    vectors = ("q_ids", q_ids, q), ("k_ids", k_ids, keys), ("k_bias", k_bias, keys), ("q_limit", q_limit, q)
    for name, x, side in vectors:
        if x is None:
            continue
        check_dense(name, x)
        if not isinstance(x, Tensor) or (x.shape != side.shape[:-1] and x.shape != side.shape[-2:-1]):
            raise ValueError(f"{name} must be a tensor {list(side.shape[:-1])}, not {describe(x)}")
        if "ids" in name:
            if x.dtype != torch.int64:
                raise TypeError(f"{name} must be int64, not {x.dtype}; convert it with .long()")
        elif x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
    check_devices("q", q, k=k, scale=scale, q_ids=q_ids, k_ids=k_ids, k_bias=k_bias, q_limit=q_limit)
    if q_limit is not None and q_limit.requires_grad:
        raise ValueError("q_limit gets no gradient; pass q_limit.detach()")


def _accumulator(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def scale_parts(scale: float | Tensor, q: Tensor) -> tuple[Tensor | None, float]:
    """A 0-d tensor in the type of the accumulators, or None, and a number, whose product is the scale."""
    if isinstance(scale, Tensor):
        return scale.to(_accumulator(q)), 1.0
    return (constant(scale, q, _accumulator(q)), 1.0) if torch.compiler.is_compiling() else (None, float(scale))


def _uniform(q, k, scale, q_ids, k_ids, k_bias, q_limit):
    """scale as (tensor or None, number); the vectors with q's group dimension; floats in the accumulator's type."""
    scale_tensor, scale = scale_parts(scale, q)
    if q_ids is None and k_bias is None and q_limit is None:
        return scale_tensor, scale, q_ids, k_ids, k_bias, q_limit
    rows, cols = q.shape[:-1], (q if k is None else k).shape[:-1]
    q_ids = None if q_ids is None else q_ids.expand(rows)
    k_ids = None if k_ids is None else k_ids.expand(cols)
    k_bias = None if k_bias is None else k_bias.to(_accumulator(q)).expand(cols)
    q_limit = None if q_limit is None else q_limit.to(_accumulator(q)).expand(rows)
    return scale_tensor, scale, q_ids, k_ids, k_bias, q_limit


# ---- small problems in compiled code: the formula itself, which the compiler fuses with its surroundings -------------


def small(q: Tensor, rows: int, columns: int) -> bool:
    """Whether so few scores are better left to the compiler, on the device of q."""
    if autocast_active(q.device.type):
        return False  # it would round the products to 16 bits, forward and backward
    return rows * columns <= 2**16


def _dense(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit, columns, best):
    wide = _accumulator(q)
    keys, k_ids = (q, q_ids) if k is None else (k, k_ids)
    s = (q @ keys.mT).to(wide) * (scale if scale_tensor is None else scale * scale_tensor)
    if k_bias is not None:
        s = s + k_bias.unsqueeze(-2)
    left_out = None
    if k is None:
        left_out = torch.eye(s.shape[-1], dtype=torch.bool, device=s.device)
    if q_ids is not None:
        equal = q_ids.unsqueeze(-1) == k_ids.unsqueeze(-2)
        equal = ~equal if same else equal
        left_out = equal if left_out is None else left_out | equal
    if k_bias is not None:
        out = (k_bias == -math.inf).unsqueeze(-2)
        left_out = out if left_out is None else left_out | out
    if q_limit is not None:
        out = s > q_limit.unsqueeze(-1)
        left_out = out if left_out is None else left_out | out
    if left_out is not None:
        s = s.masked_fill(left_out, -math.inf)
    sides = (-1, -2) if columns else (-1,)
    out = [logsumexp(s, dim) for dim in sides]
    if best:
        out.append(cat([s.amax(dim) for dim in sides], -1).detach())
    return out[0] if len(out) == 1 else tuple(out)


# ---- similarity_lse --------------------------------------------------------------------------------------------------


def _kernel(*args):
    *args, backend = args
    row, *rest = load(backend, "similarity_lse").similarity_lse_fwd(*args)
    return row, *(_or_empty(x, row) for x in rest)


def _fake(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit, columns, best, keep, backend):
    row, N, M = q.new_empty(q.shape[:-1], dtype=_accumulator(q)), q.shape[-2], (q if k is None else k).shape[-2]
    col = row.new_empty((*q.shape[:-2], M) if columns else 0)
    top = row.new_empty((*q.shape[:-2], N + M if columns else N) if best else 0)
    kept = row.new_empty((*q.shape[:-2], keep, M) if keep else 0)
    return row, col, top, kept


def _or_empty(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _setup(ctx, inputs, output) -> None:
    q, k, scale_tensor, ctx.scale, q_ids, k_ids, ctx.same, k_bias, q_limit, ctx.columns, _, keep, ctx.backend = inputs
    row, col, top, kept = output
    ctx.save_for_backward(q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit, row, col, kept if keep else None)
    ctx.mark_non_differentiable(top, kept)
    ctx.set_materialize_grads(False)


def _backward(ctx, g, h, *_):
    q, k, scale_tensor, q_ids, k_ids, k_bias, q_limit, row, col, kept = ctx.saved_tensors
    need_q, need_k, need_scale, _, _, _, _, need_bias, *_ = ctx.needs_input_grad
    h = h if ctx.columns else None
    if g is None and h is None:
        return (None,) * 13
    dq, dk, dscale, dbias = torch.ops.sslkern.similarity_lse_bwd.default(
        q, k, None if g is None else row, None if h is None else col, g, h, scale_tensor, ctx.scale,
        q_ids, k_ids, ctx.same, k_bias, q_limit, kept, need_q, need_k, need_scale, need_bias, ctx.backend,
    )  # fmt: skip
    dq = dq.to(q.dtype) if need_q else None
    dk = dk.to(q.dtype) if need_k else None
    dscale = dscale * ctx.scale if need_scale else None
    return dq, dk, dscale, None, None, None, None, dbias if need_bias else None, *(None,) * 5


define(
    f"similarity_lse(Tensor q, Tensor? k, {_PROBLEM}, bool columns, bool best, int keep, str backend)"
    " -> (Tensor row, Tensor col, Tensor best, Tensor kept)",
    _kernel,
    _fake,
)
_lse = differentiable("similarity_lse", _setup, _backward)


# ---- its derivative --------------------------------------------------------------------------------------------------


def _bwd_kernel(q, *args):
    *args, backend = args
    grads = load(backend, "similarity_lse").similarity_lse_bwd(q, *args)
    return tuple(q.new_empty(0, dtype=_accumulator(q)) if grad is None else grad for grad in grads)


def _bwd_fake(q, k, *args):
    *_, need_q, need_k, need_scale, need_bias, _ = args
    keys = q if k is None else k
    shapes = (need_q, q.shape), (need_k, keys.shape), (need_scale, ()), (need_bias, keys.shape[:-1])
    return tuple(q.new_empty(shape if need else 0, dtype=_accumulator(q)) for need, shape in shapes)


define(
    f"similarity_lse_bwd(Tensor q, Tensor? k, Tensor? row, Tensor? col, Tensor? g, Tensor? h, {_PROBLEM},"
    " Tensor? kept, bool need_q, bool need_k, bool need_scale, bool need_bias, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    _bwd_kernel,
    _bwd_fake,
)
torch.library.register_autograd("sslkern::similarity_lse_bwd", no_second_derivative, lib=library)


# ---- rows only, with keys that need no gradient ----------------------------------------------------------------------


def _frozen_kernel(*args):
    *problem, best, backend = args
    row, mean, top = load(backend, "similarity_lse").similarity_lse_frozen_fwd(*problem, best)
    return row, mean, _or_empty(top, row)


def _frozen_fake(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit, best, backend):
    row, mean = q.new_empty(q.shape[:-1], dtype=_accumulator(q)), torch.empty_like(q, dtype=_accumulator(q))
    return row, mean.contiguous(), row.new_empty(q.shape[:-1] if best else 0)


def _frozen_setup(ctx, inputs, output) -> None:
    q, _, scale_tensor, ctx.scale, *_ = inputs
    row, mean, top = output
    ctx.save_for_backward(q, scale_tensor, row, mean)
    ctx.mark_non_differentiable(mean, top)
    ctx.set_materialize_grads(False)


def _frozen_backward(ctx, g, *_):
    if g is None:
        return (None,) * 11
    q, scale_tensor, row, mean = ctx.saved_tensors
    with torch.no_grad():
        weighted = g.masked_fill(row == -math.inf, 0).unsqueeze(-1) * mean
        dq = (weighted * (ctx.scale if scale_tensor is None else ctx.scale * scale_tensor)).to(q.dtype)
        dscale = total(weighted * q) * ctx.scale if ctx.needs_input_grad[2] else None
    if torch.is_grad_enabled():  # create_graph=True
        dq, dscale = Once.apply(q, dq, dscale)
    return dq, None, dscale, *(None,) * 8


define(
    f"similarity_lse_frozen(Tensor q, Tensor k, {_PROBLEM}, bool best, str backend)"
    " -> (Tensor row, Tensor mean, Tensor best)",
    _frozen_kernel,
    _frozen_fake,
)
_frozen = differentiable("similarity_lse_frozen", _frozen_setup, _frozen_backward)
