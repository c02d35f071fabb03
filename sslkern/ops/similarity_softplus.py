"""`similarity_softplus`: a weighted sum of softplus over the pairs of a similarity matrix that is never stored.

With s_ij = scale * <q_i, k_j> + k_bias_j over the pairs that count, and t_ij = sign (s_ij + bias_i):

    row_i = sum_j softplus(t_ij)      total = sum_i w_i row_i      W_ij = w_i sign sigmoid(t_ij)
    dQ = scale W K      dK = scale W^T Q      dscale = <Q, W K>      dbias_i = sum_j W_ij      dk_bias_j = sum_i W_ij

W needs nothing but s and the weights, so the forward accumulates the gradients of total while it has a tile of S: three
passes in all, and the backward multiplies them by the upstream gradient. It keeps no features, so that they may be
overwritten before. Gradients of the rows, with upstream values of their own, are those of the total with these as
weights: only then S is computed again.
"""

from typing import Any

import torch
from torch import Tensor

from ..backends import load, resolve
from ..backends.problem import Problem, keys_of, tensors_of
from ..common.arguments import check_flags, describe
from ..common.node import Node, Operator, once, outside_autograd
from ..common.sums import total as sum_of_all
from ..common.tensors import accumulator, needed, transformed
from .problem import FIELDS, SCHEMA, checked_problem, checked_sign, empty_gradients, gradients_of, options, per_row


def similarity_softplus(
    q: Tensor,
    k: Tensor | None = None,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    weights: Tensor | None = None,
    *,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    k_bias: Tensor | None = None,
    q_limit: Tensor | None = None,
    sign: int = 1,
    rows: bool = False,
) -> Tensor:
    """`sum_i weights_i sum_j softplus(sign * (s_ij + bias_i))` of `s = scale * q @ k.T + k_bias`.

    S is never stored: memory is O((N + M) D). Features are used as they are, not normalised. Sums run in fp32 (fp64 for
    fp64 input); terms keep their relative accuracy however small they are. N = 0 and M = 0 are legal; a row with no
    pair left adds 0 and gets exactly zero gradient. A score of -inf counts as left out.

    Args:
        q: [N, D] or [G, N, D], fp32, bf16, fp16 or fp64. G problems are independent.
        k: [M, D] or [G, M, D], the type of q. None: the rows of q with each other, and one gradient.
        scale: a number, or a 0-d tensor that receives a gradient. Zero and negative are exact.
        bias: a number, a 0-d tensor, or [N] or [G, N] of each row; tensors receive a gradient.
        weights: [N] or [G, N], with gradient. Default: 1.
        q_ids, k_ids: int64 [N] and [M], or with a leading G. For k=None q_ids serves both sides.
        pairs: "different" leaves out the pairs with equal ids, "same" all others.
        k_bias: [M] or [G, M], added to the scores of a column, with gradient; -inf takes the column out.
        q_limit: [N] or [G, N], pairs with s_ij > q_limit_i are left out (bias is no part of s).
        sign: 1, or -1 for `softplus(-(s_ij + bias_i))`.
        rows: return the sum of each row, without weights. Costs one more pass over S in the backward.

    Returns:
        0-d or [G], with `rows` [N] or [G, N], in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for by name cannot run this.
        NotImplementedError: on a second derivative.

    Example:
        >>> q, k = torch.randn(8, 16), torch.randn(9, 16)
        >>> total = sslkern.ops.similarity_softplus(q, k, 2.0, -1.0)
        >>> torch.allclose(total, torch.nn.functional.softplus(2 * q @ k.T - 1).sum())
        True
    """
    problem = checked_problem(q, k, scale, q_ids, k_ids, pairs, k_bias, q_limit)
    check_flags(rows=rows)
    sign = checked_sign(sign)
    if rows and weights is not None:
        raise ValueError("weights must be None with rows=True: multiply the rows that come back")
    if weights is not None and not isinstance(weights, Tensor):
        raise ValueError(f"weights must be a tensor {list(q.shape[:-1])}, not {describe(weights)}")
    bias, weights = per_row("bias", bias, q), per_row("weights", weights, q)
    backend = resolve("similarity_softplus", q, **options(problem))
    inputs = (q, k, problem.scale_tensor, bias, problem.k_bias)
    if transformed():
        needs, learns = tuple(x is not None for x in inputs), True
    else:
        learning = torch.is_grad_enabled()
        needs = tuple(learning and x is not None and x.requires_grad for x in inputs)
        learns = any(needs) or (learning and weights is not None and weights.requires_grad)
    if rows:
        return _rows.way(learns, *tensors_of(problem), bias)(*problem, bias, sign, backend)
    call = _total.way(learns, *tensors_of(problem), bias, weights)
    return call(*problem, bias, weights, sign, *needs, backend)[0]


# ---- the total, with its gradients -----------------------------------------------------------------------------------


def _forward(*inputs: Any) -> tuple[Tensor | None, ...]:
    problem, rest, backend = Problem(*inputs[:FIELDS]), inputs[FIELDS:-1], inputs[-1]
    return load(backend, "similarity_softplus").similarity_softplus_fwd(problem, *rest)


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *_, need_q, need_k, need_scale, need_bias, need_k_bias, _ = inputs
    problem = Problem(*inputs[:FIELDS])
    q, keys = problem.q, keys_of(problem)
    groups, rows, columns = q.shape[:-2], q.shape[:-1], keys.shape[:-1]
    shapes = (need_q, q.shape), (need_k, keys.shape), (need_scale, groups), (need_bias, rows), (need_k_bias, columns)
    return empty_gradients(q, (True, groups), (True, rows), *shapes)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor | None, ...]) -> None:
    q, _, _, ctx.scale, *_ = inputs
    weights = inputs[FIELDS + 1]
    total, row, *grads = outputs
    if weights is None:  # whose gradient the rows are
        row = None
    ctx.save_for_backward(total, row, *grads)
    ctx.dtype = q.dtype


def _backward(ctx: Any, g: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 18
    total, row, dq, dk, dscale, dbias, dk_bias = ctx.saved_tensors
    need_q, need_k, need_scale, *_ = ctx.needs_input_grad
    need_k_bias, _, need_bias, need_weights = ctx.needs_input_grad[7:11]
    with outside_autograd():
        of_rows, of_features = g.unsqueeze(-1), g.unsqueeze(-1).unsqueeze(-1)
        dweights = None
        if need_q:
            dq = (of_features * dq).to(ctx.dtype)
        if need_k:
            dk = (of_features * dk).to(ctx.dtype)
        if need_scale:
            dscale = sum_of_all(g * dscale) * ctx.scale
        if need_k_bias:
            dk_bias = of_rows * dk_bias
        if need_bias:
            dbias = of_rows * dbias
        if need_weights:
            dweights = of_rows * row
    needs = need_q, need_k, need_scale, need_k_bias, need_bias
    dq, dk, dscale, dk_bias, dbias = needed(needs, dq, dk, dscale, dk_bias, dbias)
    dq, dk, dscale, dk_bias, dbias, dweights = once((g, total), dq, dk, dscale, dk_bias, dbias, dweights)
    return dq, dk, dscale, *(None,) * 4, dk_bias, None, dbias, dweights, *(None,) * 7


_sums = Operator(
    f"similarity_softplus({SCHEMA}, Tensor? bias, Tensor? weights, float sign, bool need_q, bool need_k,"
    " bool need_scale, bool need_bias, bool need_k_bias, str backend) -> (Tensor total, Tensor row, Tensor dq,"
    " Tensor dk, Tensor dscale, Tensor dbias, Tensor dk_bias)",
    _forward,
    _fake,
)
_total = Node(_sums, _save, _backward, outputs=1)


# ---- the rows: what their gradients weigh is known in the backward only ----------------------------------------------


def _rows_forward(*inputs: Any) -> Tensor:
    *problem, bias, sign, backend = inputs
    forward = load(backend, "similarity_softplus").similarity_softplus_fwd
    return forward(Problem(*problem), bias, None, sign, *(False,) * 5)[1]


def _rows_fake(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape[:-1], dtype=accumulator(q))


def _rows_save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *problem, bias, ctx.sign, ctx.backend = inputs
    problem = Problem(*problem)
    ctx.scale, ctx.same = problem.scale, problem.same
    ctx.save_for_backward(*tensors_of(problem), bias)


def _rows_backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, bias = ctx.saved_tensors
    problem = Problem.of(tensors, ctx.scale, ctx.same)
    needs = need_q, need_k, need_scale, need_bias, need_k_bias = [ctx.needs_input_grad[i] for i in (0, 1, 2, 9, 7)]
    with outside_autograd():
        inputs = *problem, bias, g, ctx.sign, *needs, ctx.backend
        _, _, dq, dk, dscale, dbias, dk_bias = _sums.way_back(ctx, g)(*inputs)
        if need_scale:
            dscale = sum_of_all(dscale)
        dq, dk, dscale = gradients_of(problem, dq, dk, dscale, need_q, need_k, need_scale)
        dk_bias, dbias = needed((need_k_bias, need_bias), dk_bias, dbias)
    dq, dk, dscale, dk_bias, dbias = once((g, *tensors, bias), dq, dk, dscale, dk_bias, dbias)
    return dq, dk, dscale, *(None,) * 4, dk_bias, None, dbias, None, None


_rows = Node(
    Operator(
        f"similarity_softplus_rows({SCHEMA}, Tensor? bias, float sign, str backend) -> Tensor",
        _rows_forward,
        _rows_fake,
    ),
    _rows_save,
    _rows_backward,
)
