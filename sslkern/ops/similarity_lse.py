"""`similarity_lse`: log-sum-exp over the rows (and columns) of a similarity matrix that is never stored.

With s_ij = scale * <q_i, k_j> + bias_j over the pairs that count, and g = dL/drow, h = dL/dcol:

    row_i = log sum_j exp(s_ij)                     col_j = log sum_i exp(s_ij)
    W_ij  = g_i exp(s_ij - row_i) + h_j exp(s_ij - col_j)
    dQ = scale W K      dK = scale W^T Q      dscale = <Q, W K>      dbias_j = sum_i W_ij

Of the rows of Z with each other: dZ = scale (W + W^T) Z, dscale = <Z, W Z>. Backends provide the two sides of this,
`similarity_lse_fwd` and `similarity_lse_bwd`. Where only the rows are asked for and the keys need no gradient,
`similarity_lse_frozen_fwd` also accumulates mean_i = sum_j exp(s_ij - row_i) k_j, and the derivative is elementwise:

    dQ_i = scale g_i mean_i      dscale = sum_i g_i <q_i, mean_i>

It keeps no keys, so that a queue may be overwritten between forward and backward.
"""

import math
from typing import Any

import torch
from torch import Tensor

from ..backends import load, resolve, rows_to_keep
from ..backends.problem import Problem, keys_of, sizes_of, tensors_of
from ..common.arguments import FLOATS, check_dense, check_devices, check_flags, describe
from ..common.node import Node, Operator, once, outside_autograd
from ..common.sums import total
from ..common.tensors import TensorOrTuple, accumulator, map_given, needed, transformed
from ._dense import dense, is_small
from .problem import SCHEMA, checked_problem, empty_gradients, gradients_of, options


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
) -> TensorOrTuple:
    """Log-sum-exp of the rows, and optionally of the columns, of `s = scale * q @ k.T + k_bias`.

    S is never stored: memory is O(N + M). (In the backward on a GPU, of more than 256 features, a strip of its rows is,
    a few times the size of the gradients.) Features are used as they are, not normalised. Sums run in fp32 (fp64 for
    fp64 input). N = 0 and M = 0 are legal; a row with no pair left gives -inf and gets exactly zero gradient.

    Args:
        q: [N, D] or [G, N, D], fp32, bf16, fp16 or fp64. G problems are independent.
        k: [M, D] or [G, M, D], the type of q. None: the rows of q with each other, and one gradient.
        scale: a number, or a 0-d tensor that receives a gradient. Zero and negative are exact.
        q_ids, k_ids: int64 [N] and [M], or with a leading G. For k=None q_ids serves both sides.
        pairs: "different" leaves out the pairs with equal ids, "same" all others.
        k_bias: [M] or [G, M], added to the scores of a column (a log weight, with gradient); -inf takes the column out.
        q_limit: [N] or [G, N], pairs with s_ij > q_limit_i are left out.
        columns: also return the log-sum-exp of the columns, from the same pass.
        best: also return the best score of each row (and column), the largest that counts, without gradient.

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
    problem = checked_problem(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit)
    check_flags(columns=columns, best=best)
    if columns and k is None:
        raise ValueError("columns=True needs k: without it the columns are the rows")
    scale_tensor = problem.scale_tensor
    keys_learn = (k is not None and k.requires_grad) or (k_bias is not None and k_bias.requires_grad) or transformed()
    learns = keys_learn or q.requires_grad or (scale_tensor is not None and scale_tensor.requires_grad)
    learns = learns and torch.is_grad_enabled()
    # Keys that do not learn are not kept: a queue may be overwritten before the backward.
    frozen = learns and not (columns or keys_learn or k is None)
    backend = resolve("similarity_lse", q, frozen=frozen, **options(problem))
    if torch.compiler.is_compiling() and not frozen and is_small(problem):
        return dense(problem, columns, best)
    if frozen:
        row, _, best_scores = _frozen.way(True, *tensors_of(problem))(*problem, best, backend)
    else:
        G, N, M, D = sizes_of(problem)
        kept_rows = rows_to_keep(backend, N, M, D, G, itself=k is None) if learns else 0
        row, col, best_scores, _ = _lse.way(learns, *tensors_of(problem))(*problem, columns, best, kept_rows, backend)
    if columns and best:
        return row, col, best_scores
    if columns:
        return row, col
    if best:
        return row, best_scores
    return row


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
    problem = checked_problem(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit)
    check_flags(need_q=need_q, need_k=need_k, need_scale=need_scale, need_bias=need_bias)
    if (row is None) != (g is None) or (col is None) != (h is None) or (row is None and col is None):
        raise ValueError("row and g (and likewise col and h) go together, and one of the two pairs must be given")
    if k is None and col is not None:
        raise ValueError("col and h must be None for k=None: the columns are the rows")
    rows, cols = q.shape[:-1], keys_of(problem).shape[:-1]
    for name, x, shape in (("row", row, rows), ("g", g, rows), ("col", col, cols), ("h", h, cols)):
        if x is None:
            continue
        check_dense(name, x)
        if not isinstance(x, Tensor) or x.shape != shape:
            raise ValueError(f"{name} must be a tensor {list(shape)}, not {describe(x)}")
        if x.dtype not in FLOATS:
            raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
    check_devices("q", q, row=row, g=g, col=col, h=h)
    row, col, g, h = map_given(lambda x: x.to(accumulator(q)), row, col, g, h)
    needs = (need_q, need_k and k is not None, need_scale, need_bias and k_bias is not None)
    backend = resolve("similarity_lse", q, **options(problem))
    with torch.no_grad():
        grads = _gradients.way(*tensors_of(problem), row, col, g, h)(*problem, row, col, g, h, None, *needs, backend)
    dq, dk, dscale, dbias = needed(needs, *grads)
    return dq, dk, dscale, dbias


# ---- the log-sum-exps ------------------------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, columns, need_best, kept_rows, backend = inputs
    return load(backend, "similarity_lse").similarity_lse_fwd(Problem(*problem), columns, need_best, kept_rows)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *problem, columns, need_best, kept_rows, _ = inputs
    problem = Problem(*problem)
    q, groups, (_, N, M, _) = problem.q, problem.q.shape[:-2], sizes_of(problem)
    (row,) = empty_gradients(q, (True, (*groups, N)))
    ends = N + M if columns else N
    shapes = (columns, (*groups, M)), (need_best, (*groups, ends)), (kept_rows, (*groups, kept_rows, M))
    return row, *empty_gradients(q, *shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    *problem, ctx.columns, _, kept_rows, ctx.backend = inputs
    row, col, _, kept = outputs
    problem = Problem(*problem)
    ctx.scale, ctx.same = problem.scale, problem.same
    if not ctx.columns:
        col = None
    if kept_rows == 0:
        kept = None
    ctx.save_for_backward(*tensors_of(problem), row, col, kept)


def _backward(ctx: Any, g: Tensor | None, h: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if not ctx.columns:
        h = None
    if g is None and h is None:
        return (None,) * 13
    *tensors, row, col, kept = ctx.saved_tensors
    problem = Problem.of(tensors, ctx.scale, ctx.same)
    need_q, need_k, need_scale, _, _, _, _, need_bias, *_ = ctx.needs_input_grad
    if g is None:
        row = None
    if h is None:
        col = None
    with outside_autograd():
        inputs = *problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias, ctx.backend
        dq, dk, dscale, dbias = _gradients.way_back(ctx, g, h)(*inputs)
        dq, dk, dscale = gradients_of(problem, dq, dk, dscale, need_q, need_k, need_scale)
    if not need_bias:
        dbias = None
    dq, dk, dscale, dbias = once((g, h, *tensors), dq, dk, dscale, dbias)
    return dq, dk, dscale, None, None, None, None, dbias, *(None,) * 5


def _gradients_of(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias, backend = inputs
    needs = need_q, need_k, need_scale, need_bias
    return load(backend, "similarity_lse").similarity_lse_bwd(Problem(*problem), row, col, g, h, kept, *needs)


def _gradients_fake(*inputs: Any) -> tuple[Tensor, ...]:
    *problem, _, _, _, _, _, need_q, need_k, need_scale, need_bias, _ = inputs
    q, keys = inputs[0], keys_of(Problem(*problem))
    return empty_gradients(q, (need_q, q.shape), (need_k, keys.shape), (need_scale, ()), (need_bias, keys.shape[:-1]))


_lse = Node(
    Operator(
        f"similarity_lse({SCHEMA}, bool columns, bool need_best, int kept_rows, str backend)"
        " -> (Tensor row, Tensor col, Tensor best, Tensor kept)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=2,
)
_gradients = Operator(
    f"similarity_lse_bwd({SCHEMA}, Tensor? row, Tensor? col, Tensor? g, Tensor? h, Tensor? kept,"
    " bool need_q, bool need_k, bool need_scale, bool need_bias, str backend)"
    " -> (Tensor dq, Tensor dk, Tensor dscale, Tensor dbias)",
    _gradients_of,
    _gradients_fake,
)


# ---- rows only, with keys that need no gradient ----------------------------------------------------------------------


def frozen_gradient(g: Tensor, mean: Tensor) -> Tensor:
    """g_i mean_i [.., N, D], the gradient of scale * q; its dot product with q is the gradient of the scale."""
    return g.unsqueeze(-1) * mean


def _frozen_forward(*inputs: Any) -> tuple[Tensor | None, ...]:
    *problem, need_best, backend = inputs
    return load(backend, "similarity_lse").similarity_lse_frozen_fwd(Problem(*problem), need_best)


def _frozen_fake(*inputs: Any) -> tuple[Tensor, ...]:
    q, *_, need_best, _ = inputs
    rows = q.shape[:-1]
    return empty_gradients(q, (True, rows), (True, q.shape), (need_best, rows))


def frozen_save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    q, _, scale_tensor, ctx.scale, *_ = inputs
    row, mean, _ = outputs
    ctx.save_for_backward(q, scale_tensor, row, mean)


def frozen_backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    q, scale_tensor, row, mean = ctx.saved_tensors
    with outside_autograd():
        weighted = frozen_gradient(g.masked_fill(row == -math.inf, 0), mean)
        scale = ctx.scale if scale_tensor is None else ctx.scale * scale_tensor
        dq, dscale = (weighted * scale).to(q.dtype), None
        if ctx.needs_input_grad[2]:
            dscale = total(weighted * q) * ctx.scale
    dq, dscale = once((g, q, scale_tensor), dq, dscale)
    return dq, None, dscale, *(None,) * 8


_frozen = Node(
    Operator(
        f"similarity_lse_frozen({SCHEMA}, bool need_best, str backend) -> (Tensor row, Tensor mean, Tensor best)",
        _frozen_forward,
        _frozen_fake,
    ),
    frozen_save,
    frozen_backward,
    outputs=1,
)
