"""`similarity_lse` in plain torch, one block of rows of S = scale * q k^T + k_bias at a time.

S lives in one reused buffer that fits the cache. Forward and backward obtain it from the same `blocks`, so they
agree to the bit on which pairs a limit leaves out. Products write into tensors that exist (out=, in place): those
autocast leaves alone.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ...common.autocast import cat
from ...common.tensors import map_given, needed, wide
from ..problem import Problem

BLOCK = 2**20  # elements of S held at a time


def blocks(problem: Problem) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields (groups, rows, s): s [groups, rows, M] holds scaled similarities, -inf where a pair is left out.

    The caller may overwrite s, which is reused. Several groups share a block while all of their rows fit. problem: of
    `grouped`.
    """
    q, _, _, _, q_ids, k_ids, same, k_bias, q_limit = problem
    itself, k, scale = problem.k is None, problem.keys, problem.full_scale
    G, N, M, _ = problem.sizes
    if 0 in (G, N, M):
        return
    many, few = max(1, BLOCK // (N * M)), min(N, max(1, BLOCK // M))  # groups and rows of a block
    buffer = q.new_empty(min(many, G) * few * M)
    if itself:
        k_ids = q_ids
    equal = None
    if q_ids is not None and not same:
        equal = _EqualPairs.find(q_ids, k_ids)
    for groups in (slice(i, min(i + many, G)) for i in range(0, G, many)):
        for rows in (slice(i, min(i + few, N)) for i in range(0, N, few)):
            a = q[groups, rows]
            s = buffer[: a.shape[0] * a.shape[1] * M].view(a.shape[0], a.shape[1], M)
            # The products are scaled, not the features, which may overflow where these do not.
            if isinstance(scale, Tensor):
                torch.bmm(a, k[groups].transpose(1, 2), out=s).mul_(scale)
            else:
                torch.baddbmm(s, a, k[groups].transpose(1, 2), beta=0, alpha=scale, out=s)
            if k_bias is not None:
                bias = k_bias[groups, None]
                s.add_(bias).masked_fill_(bias == -math.inf, -math.inf)
            if q_limit is not None:
                s.masked_fill_(s > q_limit[groups, rows, None], -math.inf)
            if itself:
                s.diagonal(rows.start, 1, 2).fill_(-math.inf)
            if equal is not None:
                s.view(-1).index_fill_(0, equal.within(groups.start * N + rows.start, s), -math.inf)
            elif q_ids is not None:
                row_ids, col_ids = q_ids[groups, rows, None], k_ids[groups, None]
                left_out = torch.ne if same else torch.eq
                s.masked_fill_(left_out(row_ids, col_ids), -math.inf)
            yield groups, rows, s


class _EqualPairs:
    """The few pairs of equal ids as a list, which spares two sweeps over S."""

    def __init__(self, position: Tensor, ends: Tensor):
        self.position = position  # in S flattened, ascending by row
        self.ends = ends  # [G N], where in the list the pairs of each row end

    @classmethod
    def find(cls, q_ids: Tensor, k_ids: Tensor) -> "_EqualPairs | None":
        """None where they are many, or on a device where counting them would make the host wait."""
        G, N, M = *q_ids.shape, k_ids.shape[1]
        if q_ids.device.type != "cpu":
            return None
        k_sorted, order = k_ids.sort(1)
        first = torch.searchsorted(k_sorted, q_ids.contiguous())
        count = (torch.searchsorted(k_sorted, q_ids.contiguous(), right=True) - first).view(-1)
        ends = count.cumsum(0)
        total = int(ends[-1])
        if total > 4 * G * (N + M):
            return None
        row = torch.repeat_interleave(count, output_size=total)
        nth = torch.arange(total, device=row.device) - (ends - count)[row] + first.view(-1)[row]
        return cls(row * M + order.view(-1)[row // N * M + nth], ends)

    def within(self, start: int, s: Tensor) -> Tensor:
        """Positions in the block s [groups, rows, M] whose first row is `start` of all G N."""
        stop, M = start + s.shape[0] * s.shape[1], s.shape[2]
        begin = self.ends[start - 1] if start > 0 else 0
        return self.position[begin : self.ends[stop - 1]] - start * M


def grouped(problem: Problem) -> Problem:
    """With a group dimension everywhere, and features in the type of the sums."""
    q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit = problem
    q, k = map_given(wide, q, k)
    if q.ndim == 2:
        q, k, q_ids, k_ids, k_bias, q_limit = with_group(q, k, q_ids, k_ids, k_bias, q_limit)
    return Problem(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit)


def with_group(*tensors: Tensor | None) -> list[Tensor | None]:
    """With a group dimension."""
    return map_given(lambda x: x.unsqueeze(0), *tensors)


def without_group(*tensors: Tensor | None) -> list[Tensor | None]:
    """Without the group dimension."""
    return map_given(lambda x: x[0], *tensors)


def _shift(best: Tensor) -> Tensor:
    """What to subtract before the exponential: the best score, but 0 where it is infinite (inf - inf is NaN)."""
    return best.masked_fill(best.isinf(), 0)


def similarity_lse_fwd(problem: Problem, columns: bool, need_best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], col [G, M] or None, best [G, N + M or N] or None, and no scores: it does not keep them."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, (G, N, M, _) = problem.q, problem.sizes
    row, best = q.new_full((G, N), -math.inf), q.new_full((G, N), -math.inf)
    col_best, col_sum = q.new_full((G, M), -math.inf), q.new_zeros(G, M)
    for groups, rows, s in blocks(problem):
        best[groups, rows] = s.amax(2)
        if columns:  # merged online: what is summed so far moves to the new maximum
            old, new = col_best[groups], torch.maximum(col_best[groups], s.amax(1))
            shift = _shift(new)
            part = torch.exp(s - shift[:, None]).sum(1)
            col_sum[groups] = col_sum[groups] * torch.exp(old - shift) + part
            col_best[groups] = new
        shift = _shift(best[groups, rows])
        row[groups, rows] = s.sub_(shift[..., None]).exp_().sum(2).log_().add_(shift)
    col = None
    if columns:
        col = col_sum.log_().add_(_shift(col_best))
        best = cat((best, col_best), 1)
    if groupless:
        row, col, best = without_group(row, col, best)
    return row, col, best if need_best else None, None


def similarity_lse_frozen_fwd(problem: Problem, need_best: bool) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], mean [G, N, D] = sum_j softmax_ij k_j (0 for an empty row), best [G, N] or None."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, k = problem.q, problem.k
    row, best = q.new_full(q.shape[:2], -math.inf), q.new_full(q.shape[:2], -math.inf)
    mean = torch.zeros_like(q)
    for groups, rows, s in blocks(problem):
        best[groups, rows] = s.amax(2)
        shift = _shift(best[groups, rows])
        total = s.sub_(shift[..., None]).exp_().sum(2)
        mean[groups, rows].baddbmm_(s, k[groups])
        mean[groups, rows].div_(total.masked_fill(total == 0, 1)[..., None])
        row[groups, rows] = total.log_().add_(shift)
    if groupless:
        row, mean, best = without_group(row, mean, best)
    return row, mean, best if need_best else None


def similarity_lse_bwd(
    problem: Problem, row: Tensor | None, col: Tensor | None, g: Tensor | None, h: Tensor | None, kept: Tensor | None,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dq [G, N, D], dk [G, M, D], dscale [], dbias [G, M], None where not needed; k=None: all of dZ in dq."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    k, scale = problem.k, problem.full_scale
    if groupless:
        row, col, g, h = with_group(row, col, g, h)
    row, g = _without_empty(row, g)
    col, h = _without_empty(col, h)
    # S of rows with each other is symmetric without bias and limits: W + W^T needs the values of rows i and j only.
    symmetric = k is None and problem.k_bias is None and problem.q_limit is None
    if symmetric:
        col, h = row, g

    sums, q_factor, k_factor = sums_for(problem, need_q, need_k, need_scale, need_bias)
    dq, dk, dbias = sums
    if symmetric:
        dk = None
    spare = None
    for groups, rows, s in blocks(problem):
        if h is not None:
            if spare is None or spare.shape != s.shape:
                spare = torch.empty_like(s)
            w = torch.sub(s, col[groups, None], out=spare).exp_().mul_(h[groups, None])
        if g is not None:
            s.sub_(row[groups, rows, None]).exp_().mul_(g[groups, rows, None])
            w = s if h is None else s.add_(spare)
        if dq is not None:
            dq[groups, rows].baddbmm_(w, k_factor[groups])
        if dk is not None:
            dk[groups].baddbmm_(w.transpose(1, 2), q_factor[groups, rows])
        if dbias is not None:
            dbias[groups] += w.sum(1)

    dscale = None
    if need_scale:
        dscale = torch.sum(products_for_scale(problem, dq, dk, q_factor, k_factor))
        if k is None:  # <Z, (W + W^T) Z> is twice as much
            dscale = dscale / 2
    dq, dk = needed((need_q, need_k and k is not None), dq, dk)
    dq, dk = map_given(lambda x: x.mul_(scale), dq, dk)
    if groupless:
        dq, dk, dbias = without_group(dq, dk, dbias)
    return dq, dk, dscale, dbias


def sums_for(
    problem: Problem, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
    """Zeros for dq, dk and dbias to be summed into, None where they are not needed, and the factors of W in dq and dk.

    The gradient of the scale is that of q or k times its factor, so one of them is made for it. For k=None dk is dq.
    """
    q, k, keys = problem.q, problem.k, problem.keys
    dq = dk = dbias = None
    if need_q or (need_scale and not need_k):
        dq = torch.zeros_like(q)
    if k is None:
        dk = dq
    elif need_k:
        dk = torch.zeros_like(k)
    if need_bias:
        dbias = keys.new_zeros(keys.shape[:2])
    if need_scale:
        return (dq, dk, dbias), finite(q), finite(keys)
    return (dq, dk, dbias), q, keys


def products_for_scale(
    problem: Problem, dq: Tensor | None, dk: Tensor | None, q_factor: Tensor, k_factor: Tensor
) -> Tensor:
    """What sums to <Q, W K>, from dq or dk, which then become NaN where infinite features of the other side have it."""
    products = dk * k_factor if dq is None else dq * q_factor
    spread_nonfinite(dq, problem.keys)
    spread_nonfinite(dk, problem.q)
    return products


def finite(x: Tensor) -> Tensor:
    """x with 0 for what is not finite: the weights it is multiplied by are NaN then, or 0 of pairs that are left out,
    which have no part in the gradient of the scale."""
    return x.nan_to_num(0, 0, 0)


def spread_nonfinite(grad: Tensor | None, factor: Tensor) -> None:
    """Makes a gradient of features, summed over finite(factor), NaN where 0 * inf has it."""
    if grad is not None:
        grad.add_((factor * 0).sum(1, keepdim=True))


def _without_empty(lse: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Rows with nothing left get weight exp(-inf - inf) * 0 = 0, whatever gradient arrived."""
    if lse is None or grad is None:
        return None, None
    empty = lse == -math.inf
    return lse.masked_fill(empty, math.inf), grad.masked_fill(empty, 0)
