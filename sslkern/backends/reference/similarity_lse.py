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
from ...common.tensors import wide
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
    many, few = (max(1, BLOCK // (N * M)), N) if N * M <= BLOCK else (1, max(1, BLOCK // M))
    buffer = q.new_empty(min(many, G) * few * M)
    k_ids = q_ids if itself else k_ids
    equal = _EqualPairs.find(q_ids, k_ids) if q_ids is not None and not same else None
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
                s.masked_fill_(row_ids != col_ids if same else row_ids == col_ids, -math.inf)
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
        begin, end = self.ends[start - 1] if start else 0, self.ends[stop - 1]
        return self.position[begin:end] - start * M


def grouped(problem: Problem) -> Problem:
    """With a group dimension everywhere, and features in the type of the sums."""
    q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit = problem
    q, k = wide(q), None if k is None else wide(k)
    vectors = q, k, q_ids, k_ids, k_bias, q_limit
    if q.ndim == 2:
        vectors = (None if x is None else x.unsqueeze(0) for x in vectors)
    q, k, q_ids, k_ids, k_bias, q_limit = vectors
    return Problem(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit)


def _shift(top: Tensor) -> Tensor:
    """What to subtract before the exponential: the maximum, but 0 where it is infinite (inf - inf is NaN)."""
    return top.masked_fill(top.isinf(), 0)


def similarity_lse_fwd(problem: Problem, columns: bool, best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], col [G, M] or None, best [G, N + M or N] or None, and no scores: it does not keep them."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, (G, N, M, _) = problem.q, problem.sizes
    row, row_top = q.new_full((G, N), -math.inf), q.new_full((G, N), -math.inf)
    col_top, col_sum = q.new_full((G, M), -math.inf), q.new_zeros(G, M)
    for groups, rows, s in blocks(problem):
        top = s.amax(2)
        row_top[groups, rows] = top
        if columns:  # merged online: what is summed so far moves to the new maximum
            old, new = col_top[groups], torch.maximum(col_top[groups], s.amax(1))
            shift = _shift(new)
            part = torch.exp(s - shift[:, None]).sum(1)
            col_sum[groups] = col_sum[groups] * torch.exp(old - shift) + part
            col_top[groups] = new
        shift = _shift(top)
        row[groups, rows] = s.sub_(shift[..., None]).exp_().sum(2).log_().add_(shift)
    col = col_sum.log_().add_(_shift(col_top)) if columns else None
    best = cat((row_top, col_top), 1) if best and columns else row_top if best else None
    return tuple(x[0] if groupless and x is not None else x for x in (row, col, best, None))


def similarity_lse_frozen_fwd(problem: Problem, best: bool) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], mean [G, N, D] = sum_j softmax_ij k_j (0 for an empty row), best [G, N] or None."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, k = problem.q, problem.k
    row, top = q.new_full(q.shape[:2], -math.inf), q.new_full(q.shape[:2], -math.inf)
    mean = torch.zeros_like(q)
    for groups, rows, s in blocks(problem):
        top[groups, rows] = s.amax(2)
        shift = _shift(top[groups, rows])
        total = s.sub_(shift[..., None]).exp_().sum(2)
        mean[groups, rows].baddbmm_(s, k[groups])
        mean[groups, rows].div_(total.masked_fill(total == 0, 1)[..., None])
        row[groups, rows] = total.log_().add_(shift)
    return tuple(x[0] if groupless and x is not None else x for x in (row, mean, top if best else None))


def similarity_lse_bwd(
    problem: Problem, row, col, g, h, kept, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor | None, ...]:
    """Returns dq [G, N, D], dk [G, M, D], dscale [], dbias [G, M], None where not needed; k=None: all of dZ in dq."""
    groupless, problem = problem.q.ndim == 2, grouped(problem)
    q, k, keys, scale = problem.q, problem.k, problem.keys, problem.full_scale
    if groupless:
        row, col, g, h = (None if x is None else x.unsqueeze(0) for x in (row, col, g, h))
    row, g = _without_empty(row, g)
    col, h = _without_empty(col, h)
    # Without bias and limits S of q with itself is symmetric: (W + W^T) needs the values of row i and of row j only.
    symmetric = k is None and problem.k_bias is None and problem.q_limit is None
    if symmetric:
        col, h = row, g

    dq = torch.zeros_like(q) if need_q or need_scale and not need_k else None
    dk = (dq if not symmetric else None) if k is None else torch.zeros_like(k) if need_k else None
    dbias = keys.new_zeros(keys.shape[:2]) if need_bias else None
    q_factor, k_factor = (finite(q), finite(keys)) if need_scale else (q, keys)
    spare = None
    for groups, rows, s in blocks(problem):
        if h is not None:
            spare = torch.empty_like(s) if spare is None or spare.shape != s.shape else spare
            torch.sub(s, col[groups, None], out=spare).exp_().mul_(h[groups, None])
        if g is not None:
            s.sub_(row[groups, rows, None]).exp_().mul_(g[groups, rows, None])
        w = spare if g is None else s if h is None else s.add_(spare)
        if dq is not None:
            dq[groups, rows].baddbmm_(w, k_factor[groups])
        if dk is not None:
            dk[groups].baddbmm_(w.transpose(1, 2), q_factor[groups, rows])
        if dbias is not None:
            dbias[groups] += w.sum(1)

    dscale = None
    if need_scale:  # <Q, W K>, of which <Z, (W + W^T) Z> is twice
        dscale = torch.sum(dq * q_factor) if dq is not None else torch.sum(dk * k_factor)
        dscale = dscale / 2 if k is None else dscale
        spread_nonfinite(dq, keys)
        spread_nonfinite(dk, q)
    dq = dq.mul_(scale) if need_q else None
    dk = dk.mul_(scale) if need_k and k is not None else None
    dq, dk, dbias = (x[0] if groupless and x is not None else x for x in (dq, dk, dbias))
    return dq, dk, dscale, dbias


def finite(x: Tensor) -> Tensor:
    """x with 0 for what is not finite, a factor of weights that are then NaN, or 0 of what is left out: that has no
    part in the gradient of the scale."""
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
