"""Products of the vendor's library, for a strip of rows of S at a time.

"shared": a kernel writes the weights w_ij of a strip, and the library multiplies them with the keys for dQ and, turned
over, with the queries for dK. S is computed once for both gradients, 3 passes of 2 N M D flop; of q with itself, where
w is symmetric and a strip begins at its own first row, 1 1/2. The price is to write and to read the weights, and to add
to dK once for each strip: some 8 bytes for each score in 16 bits.

"library": S is such a product as well, and the kernels read it, for 8 bytes more: for features in true fp32, where no
matrix units help a kernel.
"""

from collections.abc import Callable

import torch
import triton
from torch import Tensor

from .launch import allocator
from .tiles import Side

LEAST = 2**25  # scores of a strip, where there are so many
TILE = 256  # rows and columns; strips begin at multiples of it, and tiles of kernels divide it
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


def sums_of_products(sums: Callable, q, keys, q_side: Side, k_side: Side, itself: bool, both: bool, best: bool):
    """The log-sum-exps of rows and columns and the largest scores of each, from those that `sums` makes of strips; of q
    with itself all are in those of the rows."""
    N, M, new = q.shape[0], keys.shape[0], allocator(q)
    row, top = new(N), new(N) if best else None
    col, col_top = (new(M).fill_(-torch.inf) if wanted else None for wanted in (both, both and best))
    strips = _strips(N, M, 0, itself)
    room = _room(strips, M, row)
    for first, stop, begin in strips:
        x, y, products = q[first:stop], keys[begin:], room[: stop - first, : M - begin]
        part = sums(x, y, q_side.cut(first, stop), k_side.cut(begin, M), multiply(x, y.t(), products))
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
    q with itself, where w is symmetric, dq. by_library: products are given to it as well."""
    (N, D), M, new = q.shape, keys.shape[0], allocator(q)
    dq = None if not need_q else new(N, D).zero_() if itself else new(N, D)
    dk = new(M, D).zero_() if need_k and not itself else None
    added_to = itself or need_k
    strips = _strips(N, M, (2 * D if by_library else 8 * D) if added_to else 0, itself)
    room = _room(strips, M, q)
    # In fp32 the weights take the place of the products.
    of_products = room if q.dtype == torch.float32 else _room(strips, M, new(0)) if by_library else None
    for first, stop, begin in strips:
        x, y, given, weights = q[first:stop], keys[begin:], None, room[: stop - first, : M - begin]
        if by_library:
            given = multiply(x, y.t(), of_products[: stop - first, : M - begin])
        weigh(x, y, q_side.cut(first, stop), k_side.cut(begin, M), given, weights)
        if need_q:
            multiply(weights, y, dq[first:stop], add=itself)
        if itself and stop < N:
            multiply(weights[:, stop - first :].t(), x, dq[stop:], add=True)
        elif dk is not None:
            multiply(weights.t(), x, dk, add=True)
    return dq, dk


def scaled(dq, dk, scale: float | Tensor, fold) -> list[Tensor | None]:
    """dq and dk times the scale and over fold, in place."""
    factor = scale if fold is None else scale / fold
    return [None if x is None else x.mul_(factor) for x in (dq, dk)]


def _strips(N: int, M: int, least: int, itself: bool) -> list[tuple[int, int, int]]:
    """(first, stop, begin): rows, evenly cut, and their first column.

    least: rows of a strip, where each costs one addition to the gradient of the keys.
    """
    parts = triton.cdiv(N, max(least, LEAST // M, 1))
    step = triton.cdiv(triton.cdiv(N, parts), TILE) * TILE
    return [(first, min(first + step, N), first if itself else 0) for first in range(0, N, step)]


def _room(strips: list, M: int, like: Tensor) -> Tensor:
    """Memory for a number for each pair of a strip, in whole tiles."""
    return like.new_empty(tuple(triton.cdiv(size, TILE) * TILE for size in (strips[0][1], M)))


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out + a @ b, summed in fp32; into a tensor that is there, which autocast leaves alone."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        a, b = a.float(), b.float()
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not add:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if VERSION < (2, 11):  # until then what is added to had the type of the factors
        return out.add_(torch.mm(a, b, out_dtype=torch.float32, out=torch.empty_like(out)))
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
