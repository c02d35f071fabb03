"""The backward of `similarity_lse` on Hopper for many features: kernels write the weights of pairs for a strip of rows
at a time, and products of the library turn them into gradients."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import strips
from ..strips import Strip
from .launch import THREADS, WARP, Call
from .pairs import Pairs

BLOCK, TILE, COLUMNS, CHUNK, PANEL, CLUSTER = 384, 64, 128, 64, 8192, 2  # as in kernels/similarity_lse_weights.cu
SHARED = 227 << 10  # bytes of a block
ALIGNED = 1024 - 16  # of these, as the kernels begin at a multiple of 1024
KEPT = 512  # features of keys that stay in shared memory; of more both sides stream
ROWS = 8192  # of a strip: to add to dk once more for each costs 4 % of the time


def gradients_of(
    pairs: Pairs, row, col, g, h, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor | None, ...]:
    """Returns dq [N, D], dk [M, D], dscale [], dbias [M] in fp32, None where not needed; of q with itself all of dZ in
    dq. g or h may be None."""
    # Without a bias S of q with itself is symmetric; with one q is taken for both sides, and rows are all there is.
    symmetric = pairs.itself and pairs.bias is None
    if symmetric:
        col, h = row, g
    # Of a row with nothing left the gradient is 0, whatever arrived.
    left = [x.masked_fill(lse == -torch.inf, 0) for lse, x in ((row, g), (col, h)) if x is not None]
    fold = strips.fold_of(pairs.q, left)
    weights = _Weights.of(pairs, row, col, g, h, fold, symmetric, need_scale, need_bias)
    dq, dk = weights.gradients(need_q, need_q if pairs.itself else need_k)
    full_scale = pairs.scale if pairs.scale_tensor is None else pairs.scale * pairs.scale_tensor
    dq, dk = strips.scaled(dq, dk, full_scale, fold)
    if pairs.itself and dk is not None:
        dq, dk = dq.add_(dk), None
    dscale, dbias = (torch.stack(parts).sum(0) if parts else None for parts in (weights.dscale, weights.dbias))
    if fold is not None:
        dscale, dbias = (None if x is None else x / fold for x in (dscale, dbias))
    return dq, dk, dscale, dbias


def means_of(pairs: Pairs, row: Tensor) -> Tensor:
    """mean [N, D] = sum_j exp(s_ij - row_i) k_j in fp32."""
    ones = torch.ones_like(row)
    fold = strips.fold_of(pairs.q, [ones])
    mean, _ = _Weights.of(pairs, row, None, ones, None, fold, False, False, False).gradients(True, False)
    return mean if fold is None else mean.div_(fold)


class _Side(NamedTuple):
    """What the kernels read of the rows or of the columns; None where the weights lack them."""

    terms: Tensor | None = None  # [n, 2]
    factors: Tensor | None = None  # [n], of columns
    blocks: Tensor | None = None  # [ceil(n / COLUMNS), 2], of columns

    @classmethod
    def of(cls, lse: Tensor | None, grad: Tensor | None, fold: Tensor | None, columns: bool) -> "_Side":
        if lse is None or grad is None:
            return cls()
        n, lse, grad = len(lse), lse.contiguous(), grad.contiguous()
        side = cls(lse.new_empty((n, 2)))
        if columns:
            side = cls(side.terms, torch.empty_like(lse), lse.new_empty((-(-n // COLUMNS), 2)))
        addresses = (0 if x is None else x.data_ptr() for x in (lse, grad, fold, *side))
        blocks = -(-n // (COLUMNS * THREADS // WARP))
        Call("similarity_lse_sides", lse.device).launch("lse_sides", blocks, n, COLUMNS, *addresses)
        return side

    def cut(self, first: int) -> "_Side":
        """From a row or column on that is a multiple of COLUMNS."""
        starts = first, first, first // COLUMNS
        return _Side(*(None if x is None else x[start:] for x, start in zip(self, starts, strict=True)))


class _Weights(NamedTuple):
    """The weights of a problem, and what is summed over them on the way."""

    pairs: Pairs
    rows: _Side
    columns: _Side
    symmetric: bool
    dscale: list[Tensor] | None  # of each strip, times fold; None: not needed
    dbias: list[Tensor] | None

    @classmethod
    def of(cls, pairs, row, col, g, h, fold, symmetric: bool, need_scale: bool, need_bias: bool) -> "_Weights":
        sides = _Side.of(row, g, fold, False), _Side.of(col, h, fold, True)
        return cls(pairs, *sides, symmetric, [] if need_scale else None, [] if need_bias else None)

    def gradients(self, need_q: bool, need_k: bool) -> tuple[Tensor | None, Tensor | None]:
        """dq and dk, times fold and without the scale."""
        N, M, _ = self.pairs.sizes
        rows = ROWS if need_k or self.symmetric else ROWS // 2
        cut = strips.cut(N, M, rows, self.symmetric)
        return strips.gradients(self.write, self.pairs.q, self.pairs.k, cut, self.symmetric, need_q, need_k)

    def write(self, strip: Strip, weights: Tensor) -> None:
        """Fills in the weights of a strip."""
        part = self.pairs.cut(*strip)
        N, M, D = part.sizes
        call = Call("similarity_lse_weights", weights.device, weights.dtype, "chunks" if D <= KEPT else "stream")
        plan = _plan(N, M, D, call.processors)
        sums = weights.new_empty(plan.sums, dtype=torch.float32) if self.dscale is not None else None
        of_columns = weights.new_empty((-(-N // 16), M), dtype=torch.float32) if self.dbias is not None else None
        rows, columns = self.rows.cut(strip.first), self.columns.cut(strip.begin)
        maps = call.matrix("q", part.q, TILE), call.matrix("k", part.k, TILE), call.matrix("weights", weights, 16)
        tensors = rows.terms, *columns, sums, of_columns
        addresses = (0 if x is None else x.data_ptr() for x in tensors)
        call.launch(
            "weights_{1}<{0}>", plan.blocks, *maps, *part.words(), *addresses, plan.slots, plan.stages, self.symmetric,
            threads=BLOCK, shared=plan.shared, cluster=plan.cluster,
        )  # fmt: skip
        if sums is not None:
            self.dscale.append(sums.sum())
        if of_columns is not None:
            self.dbias.append(of_columns.sum(0))


class _Plan(NamedTuple):
    blocks: int
    cluster: int
    slots: int
    stages: int
    shared: int
    sums: int  # of scale_parts


@functools.lru_cache(maxsize=1024)
def _plan(N: int, M: int, D: int, processors: int) -> _Plan:
    """How a kernel is launched for a strip."""
    out, chunks = 4 * PANEL, -(-D // CHUNK)
    if D > KEPT:
        units, stages = -(-N // (CLUSTER * 2 * TILE)) * -(-M // (2 * COLUMNS)) * CLUSTER, 4
        blocks = min(units, processors // CLUSTER * CLUSTER)
        return _Plan(blocks, CLUSTER, 1, stages, ALIGNED + out + stages * (6 * PANEL + 16), 8 * units)
    room = SHARED - ALIGNED - out - chunks * 2 * PANEL - 16
    stages = min(8, room // (2 * PANEL + 32))
    shared = SHARED - room + stages * (2 * PANEL + 32)
    blocks, tiles = -(-M // COLUMNS), -(-N // (2 * TILE))

    def time(slots: int) -> int:
        """Each part of a block's rows costs one tile more, as the keys come and while the last is weighed."""
        return -(-blocks * slots // processors) * (-(-tiles // slots) + 1)

    slots = min(range(1, tiles + 1), key=time)
    return _Plan(min(blocks * slots, processors), 1, slots, stages, shared, 8 * blocks * slots)
