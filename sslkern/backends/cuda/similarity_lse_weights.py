"""The backward of `similarity_lse` on Hopper for many features: kernels write the weights of pairs for a strip of rows
at a time, and products by BLAS turn them into gradients."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .. import strips
from ..strips import Strip
from .launch import Call
from .pairs import Pairs
from .similarity_lse_sides import Columns, addresses_of, fold_of

BLOCK, TILE, COLUMNS, CHUNK, PANEL, CLUSTER = 384, 64, 128, 64, 8192, 2  # as in kernels/weights.h
SHARED = 227 << 10  # bytes of a block
ALIGNED = 1024 - 16  # of these, as the kernels begin at a multiple of 1024
CHUNKED = 512  # features up to which keys stay in shared memory; of more both sides stream
ROWS, FEWEST = 8192, 2048  # of a strip: to add to dk once more for each costs 4 % of the time, 15 % at the fewest
STRIP = 2**30  # weights of a strip, 2 GB; more only where a strip of the fewest rows has more


def gradients_of(
    pairs: Pairs, row: Tensor | None, col: Tensor | None, g: Tensor | None, h: Tensor | None,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dq [N, D], dk [M, D], dscale [], dbias [M] in fp32, None where not needed; of q with itself all of dZ in
    dq. g or h may be None."""
    # Without a bias S of q with itself is symmetric; with one q is taken for both sides, and rows are all there is.
    symmetric = pairs.itself and pairs.bias is None
    if symmetric:
        col, h = row, g
    row, col = None if g is None else row, None if h is None else col
    weights = _Weights.of(pairs, row, g, col, h, symmetric, need_scale, need_bias)
    dq, dk = weights.gradients(need_q, need_q if pairs.itself else need_k)
    fold = None if weights.fold is None else weights.fold[0]
    dq, dk = strips.scaled(dq, dk, pairs.full_scale, fold)
    if pairs.itself and dk is not None:
        dq, dk = dq.add_(dk), None
    dscale, dbias = (torch.stack(parts).sum(0) if parts else None for parts in (weights.dscale, weights.dbias))
    if fold is not None:
        dscale, dbias = (None if x is None else x / fold for x in (dscale, dbias))
    return dq, dk, dscale, dbias


def means_of(pairs: Pairs, row: Tensor) -> Tensor:
    """mean [N, D] = sum_j exp(s_ij - row_i) k_j in fp32."""
    weights = _Weights.of(pairs, row, torch.ones_like(row), None, None)
    mean, _ = weights.gradients(True, False)
    return mean if weights.fold is None else mean.mul_(weights.fold[1])


def rows_of_strip(M: int, adds: bool) -> int:
    """adds: each strip adds to what those before it made of the keys."""
    return min(ROWS if adds else ROWS // 2, max(FEWEST, STRIP // M))


class _Weights(NamedTuple):
    """The weights of a problem, and what is summed over them on the way."""

    pairs: Pairs
    row: Tensor | None
    g: Tensor | None
    columns: Columns
    fold: Tensor | None
    with_columns: bool
    symmetric: bool
    dscale: list[Tensor] | None  # of each strip, times fold; None: not needed
    dbias: list[Tensor] | None

    @classmethod
    def of(
        cls, pairs: Pairs, row: Tensor | None, g: Tensor | None, col: Tensor | None, h: Tensor | None,
        symmetric: bool = False, need_scale: bool = False, need_bias: bool = False,
    ) -> "_Weights":  # fmt: skip
        row, g, col, h = (None if x is None else x.contiguous() for x in (row, g, col, h))
        fold = fold_of(pairs.q, row, g, col, h)
        columns = Columns.of(len(pairs.k), COLUMNS, col, h, pairs.bias, False, fold, pairs.q.device)
        sums: tuple[list[Tensor] | None, ...] = ([] if need_scale else None, [] if need_bias else None)
        return cls(pairs, row, g, columns, fold, col is not None, symmetric, *sums)

    def gradients(self, need_q: bool, need_k: bool) -> tuple[Tensor | None, Tensor | None]:
        """dq and dk, times fold and without the scale."""
        N, M, _ = self.pairs.sizes
        cut = strips.cut(N, M, rows_of_strip(M, need_k or self.symmetric), self.symmetric)
        return strips.gradients(self.write, self.pairs.q, self.pairs.k, cut, self.symmetric, need_q, need_k)

    def write(self, strip: Strip, weights: Tensor) -> None:
        """Fills in the weights of a strip."""
        part = self.pairs.cut(*strip)
        N, M, D = part.sizes
        call = Call("similarity_lse_weights", weights.device, weights.dtype, "chunks" if D <= CHUNKED else "stream")
        plan = plan_of(N, M, D, call.processors)
        sums = weights.new_empty(plan.sums, dtype=torch.float32) if self.dscale is not None else None
        of_columns = weights.new_empty((-(-N // 16), M), dtype=torch.float32) if self.dbias is not None else None
        rows = (None if x is None else x[strip.first :] for x in (self.row, self.g))
        columns = (x[strip.begin // COLUMNS :] for x in self.columns)
        maps = call.matrix("q", part.q, TILE), call.matrix("k", part.k, TILE), call.matrix("weights", weights, 16)
        call.launch(
            "weights_{1}<{0}>", plan.blocks, *maps, *part.words(),
            *addresses_of(*rows, *columns, self.fold, sums, of_columns),
            plan.slots, plan.stages, self.with_columns, self.symmetric,
            threads=BLOCK, shared=plan.shared, cluster=plan.cluster,
        )  # fmt: skip
        if sums is not None:
            self.dscale.append(sums.sum())
        if of_columns is not None:
            self.dbias.append(of_columns.sum(0))


class Plan(NamedTuple):
    blocks: int
    cluster: int
    slots: int
    stages: int
    shared: int
    sums: int  # of scale_parts


@functools.lru_cache(maxsize=1024)
def plan_of(N: int, M: int, D: int, processors: int) -> Plan:
    """How a kernel is launched for a strip."""
    out, chunks = 4 * PANEL, -(-D // CHUNK)
    if D > CHUNKED:
        units, stages = -(-N // (CLUSTER * 2 * TILE)) * -(-M // (2 * COLUMNS)) * CLUSTER, 4
        blocks = min(units, processors // CLUSTER * CLUSTER)
        return Plan(blocks, CLUSTER, 1, stages, ALIGNED + out + stages * (6 * PANEL + 16), 8 * units)
    room = SHARED - ALIGNED - out - chunks * 2 * PANEL - 16
    stages = min(8, room // (2 * PANEL + 32))
    shared = SHARED - room + stages * (2 * PANEL + 32)
    blocks, tiles = -(-M // COLUMNS), -(-N // (2 * TILE))

    def time(slots: int) -> int:
        """Each part of a block's rows costs one tile more, as the keys come and while the last is weighed."""
        return -(-blocks * slots // processors) * (-(-tiles // slots) + 1)

    slots = min(range(1, tiles + 1), key=time)
    return Plan(min(blocks * slots, processors), 1, slots, stages, shared, 8 * blocks * slots)
