"""Log-sum-exps of `similarity_lse` with a running maximum: kernels/similarity_lse_rows.cu."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .driver import MAP_BYTES
from .launch import PIECE, THREADS, Call
from .pairs import Pairs

BLOCK, ROWS = 384, 128  # threads and rows of a block, as in kernels/similarity_lse_rows.cu
SHARED = 227 << 10  # bytes: a block has a processor for itself
FROZEN_FEATURES = 64, 128, 256  # that `frozen` has kernels for
START = 3  # tiles that take as long as the start and the end of a block, and as merging parts
UNITS = 16  # of all processors, so that not one of them does a whole row again on which the others wait
LEAST_TILES = 4  # of a unit


class Rows(NamedTuple):
    """What is wanted of the rows of S, or of those alone that have a flag; [N], or [parts, N]."""

    lse: Tensor | None
    best: Tensor | None = None
    flags: Tensor | None = None

    def addresses(self) -> tuple[int, int, int]:
        return _address(self.flags), _address(self.lse), _address(self.best)


def frozen(pairs: Pairs, need_best: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of up to 256 features row [N], mean [N, D] = sum_j softmax_ij k_j (0 for an empty row), best [N] or None."""
    N, M, D = pairs.sizes
    features = next(features for features in FROZEN_FEATURES if D <= features)
    columns = 64 if features == 256 else 128  # of a tile
    call, new = Call("similarity_lse_frozen", pairs.q.device, pairs.q.dtype, features), _allocator(pairs)
    blocks, tiles = -(-N // ROWS), -(-M // columns)
    each = _balanced(blocks, tiles, call.processors)
    parts = -(-tiles // each)
    width = -(-D // PIECE) * PIECE
    row, mean, best = new(parts, N), new(parts, N, width), new(parts, N) if need_best else None
    maps = call.matrix("q", pairs.q, ROWS), call.matrix("k", pairs.k, columns), _bias_map(call, pairs, columns)
    to = _address(row), _address(best), width, _address(mean)
    call.launch("frozen<{0}, {1}>", blocks * parts, *maps, *pairs.words(), each, *to, threads=BLOCK, shared=SHARED)
    if parts > 1:
        row_parts, best_parts, mean_parts = row, best, mean
        row, mean, best = new(1, N), new(1, N, width), new(1, N) if need_best else None
        merged = _parts(Rows(row_parts, best_parts), Rows(row, best), parts, N)
        call.launch("merge_means", N, *merged, width, _address(mean_parts), _address(mean))
    return row[0], mean[0, :, :D].contiguous(), best[0] if need_best else None


def with_best(pairs: Pairs, columns: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns row [N], col [M] or None, and best [N], or with columns [N + M]."""
    (N, M, _), new = pairs.sizes, _allocator(pairs)
    row, col, best = new(N), new(M) if columns else None, new(N + M if columns else N)
    _running(pairs, Rows(row, best[:N]), Rows(col, best[N:]) if columns else None)
    return row, col, best


def redo(
    pairs: Pairs, row: Tensor, row_flags: Tensor, col: Tensor | None = None, col_flags: Tensor | None = None
) -> None:
    """Computes what has a flag (uint8, on a multiple of 8 bytes) in the log-sum-exps row [N] and col [M] anew."""
    _running(pairs, Rows(row, flags=row_flags), None if col is None else Rows(col, flags=col_flags))


def _running(pairs: Pairs, rows: Rows, columns: Rows | None) -> None:
    call, new = Call("similarity_lse_running", pairs.q.device, pairs.q.dtype), _allocator(pairs)
    blocks = sum(-(-len(side.lse) // ROWS) for side in (rows, columns) if side is not None)
    words: list = []
    merged, units, kept = [], 0, []
    for side, wanted, row_bias in ((pairs, rows, None), (_transposed(pairs), columns, pairs.bias)):
        n, m, _ = side.sizes
        tiles = -(-m // ROWS)
        each = -(-tiles // max(1, min(UNITS * call.processors // blocks, tiles // LEAST_TILES)))
        parts = 0 if wanted is None else -(-tiles // each)
        wanted = to = wanted or Rows(None)
        if parts > 1:
            to = Rows(new(parts, n), None if wanted.best is None else new(parts, n), wanted.flags)
            kept.append(to)  # until it is merged
        words += *side.words(), _address(row_bias), *to.addresses(), parts, each
        merged.append(_parts(to, wanted, parts, n if parts > 1 else 0))
        units += parts * -(-n // ROWS)
    maps = call.matrix("q", pairs.q, ROWS), call.matrix("k", pairs.k, ROWS), _bias_map(call, pairs, ROWS)
    call.launch("running<{0}>", min(units, call.processors), *maps, *words, threads=BLOCK, shared=SHARED)
    rows_to_merge = sum(n for *_, n in merged)
    if rows_to_merge > 0:
        call.launch("merge_rows", -(-rows_to_merge // THREADS), *merged[0], *merged[1])


@functools.lru_cache(maxsize=1024)
def _balanced(blocks: int, tiles: int, processors: int) -> int:
    """Tiles that a block of rows takes of a part, so that processors have as much to do as possible to the end."""

    def time(each: int) -> int:
        parts = -(-tiles // each)
        return -(-blocks * parts // processors) * (each + START) + (START if parts > 1 else 0)

    return min((-(-tiles // parts) for parts in range(1, min(tiles, 2 * processors // blocks + 1) + 1)), key=time)


def _transposed(pairs: Pairs) -> Pairs:
    """Without the bias, which then belongs to the rows."""
    q, k, q_ids, k_ids = pairs.q, pairs.k, pairs.q_ids, pairs.k_ids
    extents: dict[str, Any] = dict(q_extents=pairs.k_extents, k_extents=pairs.q_extents)
    return pairs._replace(q=k, k=q, q_ids=k_ids, k_ids=q_ids, bias=None, **extents)


def _parts(parts: Rows, to: Rows, count: int, n: int) -> tuple[int, ...]:
    """What the kernels call Parts."""
    return _address(to.flags), *map(_address, (parts.lse, parts.best, to.lse, to.best)), count, n


def _bias_map(call: Call, pairs: Pairs, columns: int) -> bytes:
    return bytes(MAP_BYTES) if pairs.bias is None else call.vector("k_bias", pairs.bias, len(pairs.k), columns)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _allocator(pairs: Pairs) -> Callable[..., Tensor]:
    return functools.partial(torch.empty, dtype=torch.float32, device=pairs.q.device)
