"""Log-sum-exps of the rows and columns of S in one pass: kernels/similarity_lse_forward.cu."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Call
from .pairs import Pairs

BLOCK, HALF, TILE, PANEL, BOX_ROWS = 384, 128, 128, 64, 64  # as in kernels/similarity_lse_forward.cu
WARPS, OF_WARP = 8, 16  # as in kernels/segments.h
MERGED = 8  # rows or columns of a block, as in kernels/similarity_lse_merge.cu
FEATURES = 64, 128, 704  # of the kernels that keep a block of queries in shared memory; more stream by
SHARED, GROUP_BYTES = 227 << 10, 1024  # bytes: a block has a processor for itself; what the swizzle aligns to
START, LAUNCH = 3, 20  # tiles that take as long as the start and the end of a segment, and of a launch
PARTIALS = 256 << 20  # bytes that partial sums may take at a time


class Kind(NamedTuple):
    """Of a kernel, by its features at most (0: any number)."""

    features: int
    group_blocks: int  # blocks of a cluster that share keys
    tile_blocks: int  # and that share queries

    @property
    def blocks(self) -> int:
        return self.group_blocks * self.tile_blocks

    @property
    def group_rows(self) -> int:
        return 2 * HALF

    @property
    def tile_rows(self) -> int:
        return TILE * self.tile_blocks

    def memory(self, D: int) -> tuple[int, int]:
        """Stages of a ring, as many as fit, and the bytes that they take with all else."""
        panel, barriers = 2 * PANEL, 16
        if self.features == 0:
            fixed, each = 0, (2 * HALF + TILE) * panel + barriers
        else:
            panels = -(-D // PANEL)
            fixed = self.group_rows // self.group_blocks * panels * panel
            each = TILE * (panels if self.features <= 2 * PANEL else 1) * panel + 2 * barriers
        fixed += GROUP_BYTES + barriers
        stages = (SHARED - fixed) // each
        return stages, fixed + stages * each


def kind_of(D: int) -> Kind:
    features = next((features for features in FEATURES if D <= features), 0)
    return Kind(features, 2 if features == 704 else 1, 2 if features == 0 else 1)


class Plan(NamedTuple):
    """As in kernels/segments.h."""

    group_rows: int
    group_blocks: int
    tile_rows: int
    tile_blocks: int
    groups: int
    tiles: int
    slots: int
    triangle: bool
    first: int
    count: int  # type: ignore[assignment]  # not the method of tuples

    @property
    def parts(self) -> int:
        return 1 + self.triangle

    @property
    def sequences(self) -> int:
        return -(-self.groups // self.parts)

    @property
    def length(self) -> int:
        if not self.triangle or self.groups == 1:
            return self.tiles
        return 2 * self.tiles - (self.groups - 1) * (self.group_rows // self.tile_rows)

    def time(self, clusters: int) -> int:
        """Of a launch, in tiles."""
        return -(-self.count * self.slots // clusters) * (-(-self.length // self.slots) + START)

    @property
    def row_sums(self) -> int:
        """For all slots of a launch, WARPS in each block."""
        return self.slots * WARPS * self.tile_blocks * self.count * self.parts * self.group_rows

    @property
    def row_shifts(self) -> int:
        return self.row_sums // (self.group_rows // self.group_blocks)

    @property
    def column_sums(self) -> int:
        return self.count * self.group_blocks * self.length * self.tile_rows


@functools.lru_cache(maxsize=1024)
def plan_of(kind: Kind, N: int, M: int, triangle: bool, columns: bool, processors: int) -> Plan:
    """Of the first launch; where partial sums of all take too much, others go on from there."""
    groups, tiles = -(-N // kind.group_rows), -(-M // kind.tile_rows)
    whole = Plan(kind.group_rows, kind.group_blocks, kind.tile_rows, kind.tile_blocks, groups, tiles, 1, triangle, 0, 0)
    clusters = max(1, processors // kind.blocks)

    def cut(count: int) -> Plan:
        slots = range(1, min(whole.length, 2 * clusters // count + 2) + 1)
        return min((whole._replace(count=count, slots=n) for n in slots), key=lambda plan: plan.time(clusters))

    def bytes(plan: Plan) -> int:
        return 4 * (plan.row_sums + (plan.column_sums if columns or triangle else 0))

    def time(plan: Plan) -> int:
        return -(-plan.sequences // plan.count) * (plan.time(clusters) + LAUNCH)

    if bytes(plan := cut(whole.sequences)) <= PARTIALS:
        return plan
    # As many sequences as fit, or some less if these share the work better.
    most = max(1, min(whole.sequences, PARTIALS // bytes(whole._replace(count=1))))
    counts = *range(most, 1, -max(1, most // 64)), 1
    return min((plan for plan in map(cut, counts) if bytes(plan) <= PARTIALS or plan.count == 1), key=time)


def log_sum_exps(pairs: Pairs, columns: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns row [N] and its flags (uint8), and with `columns` col [M] and its flags. What has a flag may be wrong and
    is for similarity_lse_rows.py to do again."""
    N, M, D = pairs.sizes
    kind, triangle = kind_of(D), pairs.itself and pairs.bias is None
    call = Call("similarity_lse_forward", pairs.q.device, pairs.q.dtype, kind.features)
    merge = Call("similarity_lse_merge", pairs.q.device)
    plan = plan_of(kind, N, M, triangle, columns, call.processors)
    new = functools.partial(torch.empty, dtype=torch.float32, device=pairs.q.device)
    row, col = new(N), new(M) if columns else None
    flags = [None if x is None else torch.empty_like(x, dtype=torch.uint8) for x in (row, col)]
    rows = new(plan.row_sums), new(plan.row_shifts)
    columns = (new(plan.column_sums), new(plan.column_sums // OF_WARP)) if columns or triangle else (None, None)
    state = new(2, N + M) if plan.count < plan.sequences else None
    partials = [_address(x) for x in (*rows, *columns)]
    maps = [call.matrix(name, x, BOX_ROWS) for name, x in (("q", pairs.q), ("k", pairs.k))]
    stages, shared = kind.memory(D)
    for first in range(0, plan.sequences, plan.count):
        part = plan._replace(first=first, count=min(plan.count, plan.sequences - first))
        clusters = min(part.count * part.slots, max(1, call.processors // kind.blocks))
        call.launch(
            "forward<{0}, {1}>", clusters * kind.blocks, *maps, *pairs.words(), *part, *partials, stages,
            threads=BLOCK, shared=shared, cluster=kind.blocks,
        )  # fmt: skip
        blocks = -(-N // MERGED) + (0 if col is None else -(-M // MERGED))
        merge.launch("merge", blocks, *part, *partials, N, M, *map(_address, (state, row, col, *flags)))
    return row, flags[0], col, flags[1]


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
