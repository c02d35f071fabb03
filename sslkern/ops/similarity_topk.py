"""`similarity_topk`: the n best of each row of a similarity matrix that is never stored.

With s_ij = scale * <q_i, k_j> over the pairs that count, j = index_it the key in place t, and g = dL/dvalues:

    values_it = s_ij
    dq_i = scale sum_t g_it k_j      dk_j = scale sum_it g_it q_i      dscale = sum_it g_it <q_i, k_j>

Those are sums of few weighted rows in a fixed order, `embedding_bag`, which does not gather [N, n, D].
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import load, resolve
from ..backends.problem import Problem, tensors_of
from ..common.node import Node, Operator
from ..common.numbers import check_size
from ..common.sums import total
from ..common.tensors import accumulator
from .problem import SCHEMA, checked_problem, options


def similarity_topk(
    q: Tensor,
    k: Tensor | None,
    n: int,
    *,
    scale: float | Tensor = 1.0,
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    pairs: str = "different",
    q_limit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The n largest of each row of `s = scale * q @ k.T`, and where they stand.

    S is never stored: memory is O(N n). Features are used as they are, not normalised. Of equal scores the one with
    the lower index comes first. A score that is NaN or -inf counts as left out.

    Args:
        q: [N, D] or [G, N, D], fp32, bf16, fp16 or fp64. G problems are independent.
        k: [M, D] or [G, M, D], the type of q. None: the rows of q with each other, and one gradient.
        n: how many, 1 or more.
        scale: a number, or a 0-d tensor that receives a gradient.
        q_ids, k_ids: int64 [N] and [M], or with a leading G. For k=None q_ids serves both sides.
        pairs: "different" leaves out the pairs with equal ids, "same" all others.
        q_limit: [N] or [G, N], pairs with s_ij > q_limit_i are left out.

    Returns:
        values [N, n] or [G, N, n] in fp32 (fp64), descending, and indices int64 of the same shape, without gradient.
        Where a row has fewer than n pairs left (always, if n > M) the rest is -inf and -1, and gets no gradient.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: the backend asked for by name cannot run this.

    Example:
        Hard negatives: the 16 most similar keys of other classes, without those closer than 95 % of the positive, which
        may be of the same class without saying so.

        >>> z, labels = torch.nn.functional.normalize(torch.randn(512, 64), dim=1), torch.arange(512) // 2
        >>> positive = (z * z.view(-1, 2, 64).flip(1).reshape(-1, 64)).sum(1)
        >>> value, index = sslkern.ops.similarity_topk(z, None, 16, q_ids=labels, q_limit=0.95 * positive.abs())
        >>> negatives = z[index]  # [512, 16, 64], for info_nce(query, key, negatives)
    """
    problem = checked_problem(q, k, scale, q_ids, k_ids, pairs, None, q_limit)
    n = check_size("n", n)
    if n >= 2**31:
        raise ValueError(f"n must be below 2**31, as that many are returned for each row, not {n}")
    backend = resolve("similarity_topk", q, n=n, **options(problem))
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, problem.scale_tensor))
    return _topk.way(learns, *tensors_of(problem))(*problem, n, backend)


def _forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    *problem, n, backend = inputs
    return load(backend, "similarity_topk").similarity_topk_fwd(Problem(*problem), n)


def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    q, n = inputs[0], inputs[-2]
    values = q.new_empty((*q.shape[:-1], n), dtype=accumulator(q))
    return values, torch.empty_like(values, dtype=torch.int64)


def _save(ctx: Any, inputs: tuple[Any, ...], outputs: tuple[Tensor, ...]) -> None:
    q, k, scale_tensor, ctx.scale, *_ = inputs
    ctx.save_for_backward(q, k, scale_tensor, outputs[1])


def _backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    q, k, scale_tensor, index = ctx.saved_tensors
    need_q, need_k, need_scale, *_ = ctx.needs_input_grad
    keys = q if k is None else k
    # All groups as one problem: keys are numbered through.
    rows, columns = (x.flatten(0, -2).to(accumulator(q)) for x in (q, keys))
    left_out = index < 0
    if q.ndim == 3 and keys.shape[-2] > 0:
        first = torch.arange(0, columns.shape[0], keys.shape[-2], device=q.device)
        index = (index + first.view(-1, 1, 1)).masked_fill(left_out, -1)
    index = index.view(-1, index.shape[-1])
    left_out, g = left_out.view(index.shape), g.masked_fill(left_out, 0).reshape(index.shape)

    scale = ctx.scale if scale_tensor is None else ctx.scale * scale_tensor
    dq = dk = dscale = None
    if need_q or need_scale:
        by_row = sum_by_row(g, index, left_out, columns)
    if need_k or (need_q and k is None):
        by_key = sum_by_key(g, index, left_out, rows, columns)
    if need_scale:
        dscale = total(by_row * rows) * ctx.scale
    if need_q:
        dq = by_row if k is not None else by_row + by_key
        dq = (dq * scale).view(q.shape).to(q.dtype)
    if need_k:
        dk = (by_key * scale).view(keys.shape).to(q.dtype)
    return dq, dk, dscale, *(None,) * 8


def sum_by_row(g: Tensor, index: Tensor, left_out: Tensor, keys: Tensor) -> Tensor:
    """sum_t g_it keys[index_it] [N, D]."""
    if index.shape[0] == 0 or keys.numel() == 0:
        return keys.new_zeros(index.shape[0], keys.shape[1])
    # What is left out, weight 0, points at the first key of its row, so that no NaN of another row comes in.
    index = torch.where(left_out, index[:, :1].clamp(min=0), index)
    return F.embedding_bag(index, keys, per_sample_weights=g, mode="sum").masked_fill(left_out[:, :1], 0)


def sum_by_key(g: Tensor, index: Tensor, left_out: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
    """sum_it g_it rows_i over the i, t with index_it = j [M, D]."""
    M, n = keys.shape[0], index.shape[1]
    if rows.numel() == 0 or M == 0:
        return torch.zeros_like(keys)
    key, order = index.masked_fill(left_out, M).view(-1).sort(stable=True)
    starts = torch.searchsorted(key, torch.arange(M + 1, device=key.device))  # the last bag is what is left out
    return F.embedding_bag(order // n, rows, starts, per_sample_weights=g.view(-1)[order], mode="sum")[:M]


_topk = Node(
    Operator(
        f"similarity_topk({SCHEMA}, SymInt n, str backend) -> (Tensor values, Tensor indices)",
        _forward,
        _fake,
    ),
    _save,
    _backward,
    outputs=1,
)
