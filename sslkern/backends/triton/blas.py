"""Products by BLAS, for a strip of rows of S at a time (backends/strips.py).

A kernel writes the weights w_ij of a strip, for some 8 bytes for each score in 16 bits. For features in true fp32,
where no matrix units help a kernel, S is such a product as well, and the kernels read it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import strips
from ..strips import Strip
from .launch import allocator
from .tiles import Side


class Sums(NamedTuple):
    """Log-sum-exps of rows and columns, and the best score of each, None where not asked for."""

    row: Tensor | None
    row_best: Tensor | None
    col: Tensor | None
    col_best: Tensor | None


def sums_of_strips(
    sums: Callable[..., Sums], q: Tensor, keys: Tensor, q_side: Side, k_side: Side, itself: bool, columns: bool,
    need_best: bool,
) -> Sums:  # fmt: skip
    """Those of S, from those that `sums` makes of its strips; of q with itself all are in those of the rows."""
    N, M, new = q.shape[0], keys.shape[0], allocator(q)
    row, row_best = new(N), new(N, needed=need_best)
    col, col_best = new(M, needed=columns), new(M, needed=columns and need_best)
    for x in (col, col_best):
        if x is not None:
            x.fill_(-torch.inf)
    parts = strips.cut(N, M, 0, itself)
    room = strips.room(parts, M, row)
    for first, stop, begin in parts:
        x, y = q[first:stop], keys[begin:]
        products = strips.multiply(x, y.t(), room[: stop - first, : M - begin])
        part = sums(x, y, q_side.cut(first, stop), k_side.cut(begin, M), products)
        row[first:stop] = part.row.view(-1)
        if need_best:
            row_best[first:stop] = part.row_best.view(-1)
        if columns:
            torch.logaddexp(col[begin:], part.col.view(-1), out=col[begin:])
        if columns and need_best:
            torch.maximum(col_best[begin:], part.col_best.view(-1), out=col_best[begin:])
    if not itself:
        return Sums(row, row_best, col, col_best)
    if need_best:
        row_best = torch.maximum(row_best, col_best)
    return Sums(torch.logaddexp(row, col), row_best, None, None)


def gradients_of_strips(
    weigh: Callable[..., None], q: Tensor, keys: Tensor, q_side: Side, k_side: Side, itself: bool,
    need_q: bool, need_k: bool, scores_too: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dq [N, D] = w keys and dk [M, D] = w^T q, None where not needed, of the weights that `weigh` makes of strips; of
    q with itself, where w is symmetric, dq. scores_too: products, of fp32, are given to it as well."""
    (N, D), M = q.shape, keys.shape[0]
    least = 0
    if itself or need_k:
        least = 2 * D if scores_too else 8 * D
    parts = strips.cut(N, M, least, itself)

    def write(strip: Strip, weights: Tensor) -> None:
        first, stop, begin = strip
        x, y = q[first:stop], keys[begin:]
        products = None
        if scores_too:
            products = strips.multiply(x, y.t(), weights)  # the weights take their place
        weigh(x, y, q_side.cut(first, stop), k_side.cut(begin, M), products, weights)

    return strips.gradients(write, q, keys, parts, itself, need_q, need_k)
