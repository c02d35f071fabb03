"""Gradients as products by the vendor's BLAS: dq = w keys and dk = w^T q, of the weights w [N, M] that kernels write
for a strip of rows at a time.

S is computed once for both, 3 passes of 2 N M D flop; of rows with each other, where w is symmetric and a strip begins
at its own first row, 1 1/2. The price is to write and to read the weights, and to add to dk once for each strip.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..common.tensors import map_given

LEAST = 2**25  # scores of a strip, where there are so many
TILE = 256  # rows and columns; strips begin at multiples of it, and tiles of kernels divide it
VERSION = tuple(map(int, torch.__version__.split(".")[:2]))


class Strip(NamedTuple):
    """The rows from `first` to `stop`, from the column `begin` on."""

    first: int
    stop: int
    begin: int


def cut(N: int, M: int, least: int, symmetric: bool) -> list[Strip]:
    """Strips of about as many rows, `least` or more, as each costs one addition to the gradient of the keys."""
    parts = -(-N // max(least, LEAST // M, 1))
    step = -(-N // (parts * TILE)) * TILE
    return [Strip(first, min(first + step, N), first if symmetric else 0) for first in range(0, N, step)]


def room(strips: list[Strip], M: int, like: Tensor) -> Tensor:
    """Memory for a number for each pair of a strip, in whole tiles."""
    return like.new_empty(tuple(-(-size // TILE) * TILE for size in (strips[0].stop, M)))


def gradients(
    weigh: Callable[[Strip, Tensor], None], q: Tensor, keys: Tensor, strips: list[Strip], symmetric: bool,
    need_q: bool, need_k: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dq [N, D] = w keys and dk [M, D] = w^T q in fp32, None where not needed; `weigh` fills in the weights of a strip.
    symmetric: q is keys, w is symmetric and dq is all there is."""
    (N, D), M = q.shape, keys.shape[0]
    dq = dk = None
    if need_q:
        dq = q.new_empty((N, D), dtype=torch.float32)
        if symmetric:  # to which strips add
            dq.zero_()
    if need_k and not symmetric:
        dk = q.new_zeros((M, D), dtype=torch.float32)
    memory = room(strips, M, q)
    for strip in strips:
        first, stop, begin = strip
        x, y, weights = q[first:stop], keys[begin:], memory[: stop - first, : M - begin]
        weigh(strip, weights)
        if need_q:
            multiply(weights, y, dq[first:stop], add=symmetric)
            if symmetric and stop < N:
                multiply(weights[:, stop - first :].t(), x, dq[stop:], add=True)
        if dk is not None:
            multiply(weights.t(), x, dk, add=True)
    return dq, dk


def multiply(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b, or out + a @ b, summed in fp32; into a tensor that is there, which autocast leaves alone."""
    if a.dtype == torch.float32 or a.device.type != "cuda" or VERSION < (2, 8):  # which had no `out_dtype`
        a, b = a.float(), b.float()
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if not add:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if VERSION < (2, 11):  # until then what is added to had the type of the factors
        return out.add_(torch.mm(a, b, out_dtype=torch.float32, out=torch.empty_like(out)))
    return torch.addmm(out, a, b, out_dtype=torch.float32, out=out)


def fold_of(q: Tensor, weights: Iterable[Tensor | None]) -> Tensor | None:
    """What weights of pairs are multiplied by on their way through fp16, where those of large batches would vanish: it
    brings the largest that a sum of `weights` (None: 1), one of each, can be to 2^14. None of other types."""
    if q.dtype != torch.float16:
        return None
    one = q.new_ones((), dtype=torch.float32)
    # What is not finite may be of rows with nothing left.
    largest: Any = sum(one if w is None else w.abs().nan_to_num(0, 0, 0).amax() for w in weights)
    return 2.0**14 / largest.clamp(2.0**-100, 2.0**100)


def scaled(dq: Tensor | None, dk: Tensor | None, scale: float | Tensor, fold: Tensor | None) -> list[Tensor | None]:
    """dq and dk times the scale and over fold, in place."""
    factor = scale if fold is None else scale / fold
    return map_given(lambda x: x.mul_(factor), dq, dk)
