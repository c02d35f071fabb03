"""Products of the vendor's library, for a strip of rows of S at a time (backends/strips.py).

A kernel writes the weights w_ij of a strip, for some 8 bytes for each score in 16 bits. For features in true fp32,
where no matrix units help a kernel, S is such a product as well, and the kernels read it.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .. import strips
from ..strips import Strip
from .launch import allocator
from .tiles import Side


def sums_of_products(sums: Callable, q, keys, q_side: Side, k_side: Side, itself: bool, both: bool, best: bool):
    """The log-sum-exps of rows and columns and the largest scores of each, from those that `sums` makes of strips; of q
    with itself all are in those of the rows."""
    N, M, new = q.shape[0], keys.shape[0], allocator(q)
    row, top = new(N), new(N) if best else None
    col, col_top = (new(M).fill_(-torch.inf) if wanted else None for wanted in (both, both and best))
    parts = strips.cut(N, M, 0, itself)
    room = strips.room(parts, M, row)
    for first, stop, begin in parts:
        x, y, products = q[first:stop], keys[begin:], room[: stop - first, : M - begin]
        part = sums(x, y, q_side.cut(first, stop), k_side.cut(begin, M), strips.multiply(x, y.t(), products))
        row[first:stop], of_columns = part[0].view(-1), part[2]
        if best:
            top[first:stop] = part[1].view(-1)
        if both:
            torch.logaddexp(col[begin:], of_columns.view(-1), out=col[begin:])
            if best:
                torch.maximum(col_top[begin:], part[3].view(-1), out=col_top[begin:])
    if itself:
        return torch.logaddexp(row, col), torch.maximum(top, col_top) if best else None, None, None
    return row, top, col, col_top


def gradients_of_products(
    weigh: Callable, q: Tensor, keys: Tensor, q_side: Side, k_side: Side, itself: bool, need_q: bool, need_k: bool,
    by_library: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dq [N, D] = w keys and dk [M, D] = w^T q, None where not needed, of the weights that `weigh` makes of strips; of
    q with itself, where w is symmetric, dq. by_library: products, of fp32, are given to it as well."""
    (N, D), M = q.shape, keys.shape[0]
    least = (2 * D if by_library else 8 * D) if itself or need_k else 0
    parts = strips.cut(N, M, least, itself)

    def write(strip: Strip, weights: Tensor) -> None:
        first, stop, begin = strip
        x, y = q[first:stop], keys[begin:]
        given = strips.multiply(x, y.t(), weights) if by_library else None  # the weights take the place of the products
        weigh(x, y, q_side.cut(first, stop), k_side.cut(begin, M), given, weights)

    return strips.gradients(write, q, keys, parts, itself, need_q, need_k)
