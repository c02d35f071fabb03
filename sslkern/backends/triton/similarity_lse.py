"""`similarity_lse`: the log-sum-exps of the rows and columns of S, whose tiles live in registers only.

Floors, in passes of 2 N M D flop: rows and columns 1 from one pass, of q with itself 1/2, as S is symmetric and each
tile serves its rows and its columns; frozen keys 2, gradient included; backward 2 for each side that learns, as a
program owns rows of one gradient, computes S again and needs no atomics. One exponential for each pair and direction,
and in the backward one for both directions where that is exact.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strips
from ..problem import Problem
from ..reference import similarity_lse as reference
from . import hardware, library
from .configs import Config, choose
from .launch import Launch, allocator, precision
from .strategies import scores_by_library, strategy
from .tiles import (
    INF,
    SIZES,
    Side,
    counts,
    dot_products,
    exp,
    finite_shift,
    full_scale,
    load_rows,
    load_vector,
    log_sum,
    longest,
    of_tile,
    online_softmax,
    or_nan,
    scores,
    some_left_out,
)

TRIANGLE_FROM = 32  # blocks of rows; merging the columns of fewer costs more than half of the tiles
NEAR = tl.constexpr(32.0)  # exponentials of scores up to that need no maximum taken off, nor do sums of many
TOGETHER = tl.constexpr(64)  # partial results that are merged at a time

# ---- forward: rows, and from the same tiles the columns --------------------------------------------------------------


@triton.jit
def _of_columns(s):
    """The largest score of each column of a tile, and the sum of exponentials relative to it."""
    top = tl.max(s, 0)
    return top, tl.sum(exp(s - finite_shift(top)[None, :]), 0)


@triton.jit(do_not_specialize=SIZES)
def _forward(
    q, k, given, width, q_side, k_side, scale_tensor, scale, row, row_best, col, col_best,
    G, N, M, programs, rounds, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr,
    COLUMNS: tl.constexpr, TRIANGLE: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Program (g, p) takes a block of rows in each round, and of the columns a split.

    row [splits, G, N] gets the log-sum-exp of each row over a split, col [programs, G, M] that of each column over the
    rows of a program. TRIANGLE: only pairs above the diagonal are visited, and each counts for its row and its column.
    given: the products <q_i, k_j>, if they are there already.
    """
    g, p, split = tl.program_id(0) // programs, tl.program_id(0) % programs, tl.program_id(1)
    q_start, k_start = g.to(tl.int64) * N, g.to(tl.int64) * M
    scale = full_scale(scale, scale_tensor)
    for r in range(rounds):
        # there and back, so that programs share a triangle evenly
        block = r * programs + tl.where(r % 2 == 0, p, programs - 1 - p)
        i0 = block * BM
        i = i0 + tl.arange(0, BM)
        first, last = split * split_size, tl.minimum((split + 1) * split_size, M)
        if TRIANGLE:
            first = tl.maximum(first, i0 // BN * BN)
        if i0 >= N:
            last = first
        if given is None and D <= BD:
            x = load_rows(q, q_start, i0, 0, N, D, BM, BD, TMA)
        limit = None
        if q_side.limit is not None:
            limit = load_vector(q_side.limit, q_start, i, N, INF)[:, None]
        if q_side.norm is not None:
            x_norm = tl.abs(scale) * tl.load(q_side.norm + g * tl.cdiv(N, BM) + block, mask=i0 < N, other=0.0)
        top = tl.full((BM,), -INF, tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for j0 in tl.range(first, last, BN, warp_specialize=WS and given is None and D <= BD):
            j = j0 + tl.arange(0, BN)
            if given is None and D <= BD:
                y = load_rows(k, k_start, j0, 0, M, D, BN, BD, TMA)
                dots = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            else:
                dots = dot_products(
                    q, k, given, width, q_start, k_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, TMA, WS
                )
            bias = None
            if k_side.bias is not None:
                bias = load_vector(k_side.bias, k_start, j, M, 0.0)[None, :]
            s = scores(dots, scale, bias, limit)
            x_block, y_block = g * tl.cdiv(N, BM) + block, g * tl.cdiv(M, BN) + j0 // BN
            if some_left_out(q_side, k_side, x_block, y_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
                s = tl.where(counts(q_side, k_side, q_start, k_start, i, j, N, M, ITSELF, TRIANGLE, SAME), s, -INF)
            if q_side.norm is None:
                top, total, _, _ = online_softmax(top, total, s)
                if COLUMNS:
                    here, of_columns = _of_columns(s)
            elif x_norm * tl.load(k_side.norm + y_block) < NEAR:
                # No maximum is needed, and one exponential for both directions.
                terms = exp(s)
                of_rows, of_columns = tl.sum(terms, 1), tl.sum(terms, 0)
                # A row or column with nothing in this tile keeps what earlier ones gave it.
                there, here = tl.where(of_rows > 0, 0.0, -INF), tl.where(of_columns > 0, 0.0, -INF)
                new = tl.maximum(top, there)
                shift = finite_shift(new)
                total = total * exp(top - shift) + of_rows * exp(there - shift)
                top = new
            else:
                top, total, _, _ = online_softmax(top, total, s)
                here, of_columns = _of_columns(s)
            if COLUMNS:  # the first round comes to every tile that later ones come to
                place = (p.to(tl.int64) * G + g) * M + j
                old = tl.load(col + place, mask=(j < M) & (r > 0), other=-INF)
                shift = finite_shift(tl.maximum(old, here))
                of_columns = exp(old - shift) + of_columns * exp(here - shift)
                tl.store(col + place, shift + tl.log(of_columns), mask=j < M)
                if col_best is not None:
                    old = tl.load(col_best + place, mask=(j < M) & (r > 0), other=-INF)
                    tl.store(col_best + place, or_nan(tl.maximum(old, here), of_columns), mask=j < M)

        place = (split.to(tl.int64) * G + g) * N + i
        tl.store(row + place, log_sum(top, total), mask=i < N)
        if row_best is not None:
            tl.store(row_best + place, or_nan(top, total), mask=i < N)
        if COLUMNS:
            tl.debug_barrier()  # threads that wrote columns need not be those that read them in the next round


@triton.jit(do_not_specialize=SIZES)
def _merge_parts(top, total, largest, part, best, x, size, N, slots, STEP: tl.constexpr, BN: tl.constexpr):
    """Takes part [slots, size] into the running sums of exp(part - top). STEP: slot n came to the columns from those of
    its first block on, which starts at n * STEP."""
    for n0 in range(0, slots, TOGETHER):  # their loads are under way together
        n = n0 + tl.arange(0, TOGETHER)
        there = (n < slots)[:, None] & (x < size)[None, :]
        if STEP > 0:
            there &= (n * STEP // BN * BN)[:, None] <= (x % N)[None, :]
        place = n.to(tl.int64)[:, None] * size + x[None, :]
        value = tl.load(part + place, mask=there, other=-INF)
        new = tl.maximum(top, tl.max(value, 0))
        shift = finite_shift(new)
        total = total * exp(top - shift) + tl.sum(exp(value - shift[None, :]), 0)
        top = new
        if best is not None:
            largest = tl.maximum(largest, tl.max(tl.load(best + place, mask=there, other=-INF), 0))
    return top, total, largest


@triton.jit(do_not_specialize=SIZES)
def _merge(
    part, best, col_part, col_best, out, out_best, size, N, splits, programs,
    BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [size] = log-sum-exp over part [splits, size] and over col_part [programs, size] of a triangle."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    top, total = tl.full((BLOCK,), -INF, tl.float32), tl.zeros((BLOCK,), tl.float32)
    largest = top
    if part is not None:
        top, total, largest = _merge_parts(top, total, largest, part, best, x, size, N, splits, 0, BN)
    if col_part is not None:
        top, total, largest = _merge_parts(top, total, largest, col_part, col_best, x, size, N, programs, BM, BN)
    tl.store(out + x, log_sum(top, total), mask=x < size)
    if out_best is not None:
        tl.store(out_best + x, or_nan(largest, total), mask=x < size)


def similarity_lse_fwd(problem: Problem, columns: bool, best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], col [G, M] or None, best [G, N + M or N] or None, and no scores: it does not keep them."""
    launch = Launch.of(problem)
    problem, (G, N, M, D), itself, large, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_lse_fwd(problem, columns, best, 0)
    q, _, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit = problem
    by_library = scores_by_library(q, q_limit, itself and k_bias is not None) and strategy(q, N, M, chip) == "shared"
    config = choose("given", q.dtype, D, chip) if by_library else choose("forward", q.dtype, D, chip, launch.crowded)
    triangle = itself and k_bias is None and q_limit is None and (by_library or N >= TRIANGLE_FROM * config.BM)
    both, new = columns or triangle, allocator(q)

    def sums(
        x: Tensor, y: Tensor, x_side: Side, y_side: Side, given: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        """Log-sum-exps of the rows and the columns and the largest scores of each, in parts."""
        N, M = x.shape[-2], y.shape[-2]
        row_blocks, col_blocks = triton.cdiv(N, config.BM), triton.cdiv(M, config.BN)
        # Columns cost a vector for each program, so these are no more than run side by side, in rounds.
        rounds = min(row_blocks, triton.cdiv(row_blocks * G, 2 * chip.processors)) if both else 1
        programs = triton.cdiv(row_blocks, rounds)
        # Of a triangle in one round programs find little or much to do, so these are many.
        split_blocks, splits = launch.split(col_blocks, G * programs, 8 if triangle and rounds == 1 else 2)
        row, col = new(splits, G, N), new(programs, G, M) if both else None
        row_best, col_best = (None if x is None or not best else torch.empty_like(x) for x in (row, col))
        x_side, y_side = launch.with_extents(x_side, y_side, config)
        # In fp32 it is products that take the time, and another rounding of exponentials would show.
        if large and both and not best and k_bias is None and q_limit is None and q.dtype != torch.float32:
            x_side, y_side = x_side._replace(norm=longest(x, config.BM)), y_side._replace(norm=longest(y, config.BN))
        a, b, tma = launch.features(x, y, config) if given is None else (x, y, False)
        _forward[(G * programs, splits)](
            a, b, given, 0 if given is None else given.stride(0), x_side, y_side, scale_tensor, scale,
            row, row_best, col, col_best, G, N, M, programs, rounds, split_blocks * config.BN,
            D=D, BM=config.BM, BN=config.BN, BD=config.BD, ITSELF=itself, SAME=same, COLUMNS=both, TRIANGLE=triangle,
            PRECISION=precision(q.dtype), TMA=tma, **config.launch(),
        )  # fmt: skip
        return row, row_best, col, col_best

    def sums_of_strip(*strip) -> tuple[Tensor | None, ...]:
        row, top, col, col_top = sums(*strip)
        row, top = _merged(row, top, config)
        if both:
            col, col_top = _merged(None, None, config, col, col_top) if triangle else _merged(col, col_top, config)
        return row, top, col, col_top

    sides = Side(q_ids, limit=q_limit), Side(q_ids if itself else k_ids, bias=k_bias)
    with hardware.on(q.device):
        if by_library:
            strips = q, problem.keys, *sides, itself, both, best
            row, top, col, col_top = library.sums_of_products(sums_of_strip, *strips)
        else:  # not merged by `sums`, as a small batch feels each call
            row, top, col, col_top = sums(q, problem.keys, *sides)
            # Of a triangle each row is a column as well.
            row, top = _merged(row, top, config, col, col_top) if triangle else _merged(row, top, config)
            if columns:
                col, col_top = _merged(col, col_top, config)
    if best and columns:
        top = torch.cat((top.view(G, N), col_top.view(G, M)), 1)
    groups = q.shape[:-2]
    row, col = row.view(*groups, N), col.view(*groups, M) if columns else None
    return row, col, top.view(*groups, -1) if best else None, None


def _merged(part, best, config, col_part=None, col_best=None) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exps over the first dimension of part, if not None, and col_part of a triangle, and the largest of
    best and col_best."""
    if col_part is None and len(part) == 1:
        return part[0], None if best is None else best[0]
    parts = [0 if x is None else len(x) for x in (part, col_part)]
    out = torch.empty_like((col_part if part is None else part)[0])
    out_best = None if best is None and col_best is None else torch.empty_like(out)
    BLOCK = 32
    _merge[(triton.cdiv(out.numel(), BLOCK),)](
        part, best, col_part, col_best, out, out_best, out.numel(), out.shape[-1], *parts,
        BM=config.BM, BN=config.BN, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out, out_best


# ---- rows only, with keys that need no gradient: it is accumulated in the forward ------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _frozen(
    q, k, v, q_side, k_side, scale_tensor, scale, row, mean, best, G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, SAME: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """row [splits, G, N] and mean [splits, G, N, D] = sum_j softmax_ij k_j over a split of the keys, DV features."""
    g, block, split, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1), tl.program_id(2)
    q_start, k_start = g.to(tl.int64) * N, g.to(tl.int64) * M
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    if D <= BD:
        x = load_rows(q, q_start, i0, 0, N, D, BM, BD, TMA)
    limit = None
    if q_side.limit is not None:
        limit = load_vector(q_side.limit, q_start, i, N, INF)[:, None]
    top, total = tl.full((BM,), -INF, tl.float32), tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, DV), tl.float32)
    first, last = split * split_size, tl.minimum((split + 1) * split_size, M)
    for j0 in tl.range(first, last, BN, warp_specialize=WS and D <= BD):
        j = j0 + tl.arange(0, BN)
        if D <= BD:
            y = load_rows(k, k_start, j0, 0, M, D, BN, BD, TMA)
            dots = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            dots = dot_products(q, k, None, 0, q_start, k_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, TMA, WS)
        bias = None
        if k_side.bias is not None:
            bias = load_vector(k_side.bias, k_start, j, M, 0.0)[None, :]
        s = scores(dots, scale, bias, limit)
        x_block, y_block = g * tl.cdiv(N, BM) + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(q_side, k_side, x_block, y_block, i0, j0, N, M, BM, BN, False, SAME):
            s = tl.where(counts(q_side, k_side, q_start, k_start, i, j, N, M, False, False, SAME), s, -INF)
        top, total, shrink, terms = online_softmax(top, total, s)
        if D > BD:
            y = load_rows(v, k_start, j0, d0, M, D, BN, DV, False)
        sums = tl.dot((terms * LIFT).to(y.dtype), y, sums * shrink[:, None], input_precision=PRECISION)

    place = (split.to(tl.int64) * G + g) * N + i
    sums = sums / (LIFT * tl.where(total == 0, 1.0, total))[:, None]
    d = d0 + tl.arange(0, DV)
    tl.store(mean + place[:, None] * D + d[None, :], sums, mask=(i < N)[:, None] & (d < D)[None, :])
    if chunk == 0:
        tl.store(row + place, log_sum(top, total), mask=i < N)
        if best is not None:
            tl.store(best + place, or_nan(top, total), mask=i < N)


@triton.jit(do_not_specialize=SIZES)
def _merge_means(
    part, part_best, means, row, best, mean, size, splits, D: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr
):
    """row [size] = log-sum-exp over part [splits, size]; mean [size, D] over means [splits, size, D], weighted by the
    exp(part - row) of their splits."""
    x, d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * DV + tl.arange(0, DV)
    inside, place = (x < size)[:, None] & (d < D)[None, :], x[:, None] * D + d[None, :]
    top, total = tl.full((BLOCK,), -INF, tl.float32), tl.zeros((BLOCK,), tl.float32)
    top, total, largest = _merge_parts(top, total, top, part, part_best, x, size, 1, splits, 0, 1)
    merged = log_sum(top, total)
    if tl.program_id(1) == 0:
        tl.store(row + x, merged, mask=x < size)
        if best is not None:
            tl.store(best + x, or_nan(largest, total), mask=x < size)
    shift = finite_shift(merged)
    sums = tl.zeros((BLOCK, DV), tl.float32)
    for n0 in range(0, splits, 16):
        for n in tl.static_range(16):  # their loads are under way together
            there = x < tl.where(n0 + n < splits, size, 0)
            weight = exp(tl.load(part + x, mask=there, other=-INF) - shift)
            sums += weight[:, None] * tl.load(means + place, mask=inside & there[:, None], other=0.0)
            part += size
            means += size.to(tl.int64) * D
    tl.store(mean + place, sums, mask=inside)


def similarity_lse_frozen_fwd(problem: Problem, best: bool) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], mean [G, N, D] = sum_j softmax_ij k_j (0 for an empty row), best [G, N] or None."""
    launch = Launch.of(problem)
    problem, (G, N, M, D), _, _, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_lse_frozen_fwd(problem, best)
    q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit = problem
    sides = Side(q_ids, limit=q_limit), Side(k_ids, bias=k_bias)
    if strategy(q, N, M, chip) == "shared":  # as a forward and a backward, for which S is there once more
        row, _, top, _ = similarity_lse_fwd(problem, False, best, 0)
        ones = torch.ones_like(row)
        fold, q_side = strips.fold_of(q, [ones]), sides[0]._replace(lse=row, grad=ones)
        with hardware.on(q.device):
            mean, *_ = _by_products(launch, q_side, sides[1], fold, True, False, False)
        return row, mean if fold is None else mean.div_(fold), top
    config = choose("frozen", q.dtype, D, chip, launch.crowded)
    blocks, chunks = triton.cdiv(N, config.BM), triton.cdiv(D, config.DV)
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks * chunks)
    new = allocator(q)
    part, means, part_best = new(splits, G, N), new(splits, G, N, D), new(splits, G, N) if best else None
    row, top, mean = (None if x is None else x[0] for x in (part, part_best, means))
    with hardware.on(q.device):
        q_side, k_side = launch.with_extents(*sides, config)
        x, y, tma = launch.features(q, k, config)
        _frozen[(G * blocks, splits, chunks)](
            x, y, k, q_side, k_side, scale_tensor, scale, part, means, part_best, G, N, M, blocks,
            split_blocks * config.BN,
            D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, SAME=same,
            LIFT=2.0**14 if q.dtype == torch.float16 else 1.0,  # where weights of long queues would vanish
            PRECISION=precision(q.dtype), TMA=tma, **config.launch(),
        )  # fmt: skip
        if splits > 1:
            row, top, mean = (None if x is None else torch.empty_like(x) for x in (row, top, mean))
            BLOCK, DV = 4, min(32, triton.next_power_of_2(D))
            _merge_means[(triton.cdiv(G * N, BLOCK), triton.cdiv(D, DV))](
                part, part_best, means, row, top, mean, G * N, splits, D=D, BLOCK=BLOCK, DV=DV, num_warps=4
            )
    rows = q.shape[:-1]
    return row.view(rows), mean.view(q.shape), top.view(rows) if best else None


# ---- backward: S is computed again, once for each side that learns ---------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def _backward(
    x, y, v, given, weights, width, x_side, y_side, scale_tensor, scale, fold, dx, dscale, dbias,
    G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    TRANSPOSED: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr, CLOSE: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """dx [splits, G, N, D] = scale sum_j w_ij y_j with w_ij = g_i exp(s_ij - lse_i) + h_j exp(s_ij - lse_j).

    x is q, or TRANSPOSED k (then bias belongs to rows and limits to columns of the tile), or both (ITSELF: the second
    term is that of s_ji, with bias and limit of the other side). Also the sum over j of w_ij <x_i, y_j>, dscale
    [splits, G, N], and of what of w_ij the bias of i is in, dbias [splits, G, N]. Or, for products of the library,
    weights [N, width] = w_ij fold.
    CLOSE: log-sum-exps may be so close that one exponential does.
    """
    g, block, split, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1), tl.program_id(2)
    x_start, y_start = g.to(tl.int64) * N, g.to(tl.int64) * M
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    fold_by = 1.0 if fold is None else tl.load(fold)
    if given is None and D <= BD:
        a = load_rows(x, x_start, i0, 0, N, D, BM, BD, TMA)
    x_bias, x_limit = None, None
    if x_side.bias is not None:
        x_bias = load_vector(x_side.bias, x_start, i, N, 0.0)[:, None]
    if x_side.limit is not None:
        x_limit = load_vector(x_side.limit, x_start, i, N, INF)[:, None]
    if x_side.grad is not None:
        x_lse = load_vector(x_side.lse, x_start, i, N, -INF)
        # A row with nothing left gets weight 0, whatever gradient arrived.
        x_grad = tl.where(x_lse == -INF, 0.0, load_vector(x_side.grad, x_start, i, N, 0.0)) * fold_by
        x_lse = finite_shift(x_lse)
    if CLOSE:
        x_extent = x_side.lse_extent + 2 * (g * blocks + block)
        x_low, x_high = tl.load(x_extent), tl.load(x_extent + 1)

    sums = tl.zeros((BM, DV), tl.float32)
    scale_sum, bias_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    first, last = split * split_size, tl.minimum((split + 1) * split_size, M)
    for j0 in tl.range(first, last, BN, warp_specialize=WS and given is None and D <= BD):
        j = j0 + tl.arange(0, BN)
        if given is None and D <= BD:
            b = load_rows(y, y_start, j0, 0, M, D, BN, BD, TMA)
            dots = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            dots = dot_products(x, y, given, width, x_start, y_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, TMA, WS)
        y_bias, y_limit = None, None
        if y_side.bias is not None:
            y_bias = load_vector(y_side.bias, y_start, j, M, 0.0)[None, :]
        if y_side.limit is not None:
            y_limit = load_vector(y_side.limit, y_start, j, M, INF)[None, :]
        s = scores(dots, scale, x_bias if TRANSPOSED else y_bias, y_limit if TRANSPOSED else x_limit)
        ONE_SIDED: tl.constexpr = ITSELF and (y_side.bias is not None or y_side.limit is not None)
        back = scores(dots, scale, x_bias, y_limit) if ONE_SIDED else s
        x_block, y_block = g * tl.cdiv(N, BM) + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(x_side, y_side, x_block, y_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
            keep = counts(x_side, y_side, x_start, y_start, i, j, N, M, ITSELF, False, SAME)
            s = tl.where(keep, s, -INF)
            back = tl.where(keep, back, -INF) if ONE_SIDED else s
            if dscale is not None:  # a product that is left out may be infinite
                dots = tl.where(keep, dots, 0.0)

        if y_side.grad is not None:
            y_lse = load_vector(y_side.lse, y_start, j, M, -INF)
            y_grad = tl.where(y_lse == -INF, 0.0, load_vector(y_side.grad, y_start, j, M, 0.0)) * fold_by
            y_lse = finite_shift(y_lse)
        if CLOSE:
            # One exponential: from the lowest log-sum-exp on, terms neither overflow nor vanish within e^64.
            y_extent = y_side.lse_extent + 2 * y_block
            low, high = tl.minimum(x_low, tl.load(y_extent)), tl.maximum(x_high, tl.load(y_extent + 1))
            if high - low < 64:
                of_rows = x_grad * exp(tl.minimum(low - x_lse, 0.0))
                of_columns = y_grad * exp(tl.minimum(low - y_lse, 0.0))
                w = exp(s - low) * (of_rows[:, None] + of_columns[None, :])
            else:
                w = x_grad[:, None] * exp(s - x_lse[:, None]) + y_grad[None, :] * exp(s - y_lse[None, :])
        elif x_side.grad is not None:
            w = x_grad[:, None] * exp(s - x_lse[:, None])
            if y_side.grad is not None:
                other = y_grad[None, :] * exp(back - y_lse[None, :])
                w += other
        else:
            w = y_grad[None, :] * exp(back - y_lse[None, :])
        if dscale is not None:
            # Of x with itself the columns of a strip from N on stand for rows that it does not visit, too.
            if x_side.limit is not None or y_side.limit is not None:
                dots = tl.where(w == 0, 0.0, dots)
            scale_sum += tl.sum(w * dots, 1) * (tl.where(j0 >= N, 2.0, 1.0) if ITSELF else 1.0)
        if dbias is not None:
            bias_sum += tl.sum(other if ITSELF else w, 1)
        if weights is not None:
            tl.store(of_tile(weights, width, i0, j0, BM, BN), w.to(weights.dtype.element_ty))  # whole tiles fit
        if dx is not None:
            if D > BD:
                b = load_rows(v, y_start, j0, d0, M, D, BN, DV, False)
            sums = tl.dot(w.to(b.dtype), b, sums, input_precision=PRECISION)

    place = (split.to(tl.int64) * G + g) * N + i
    if dx is not None:
        d = d0 + tl.arange(0, DV)
        inside = (i < N)[:, None] & (d < D)[None, :]
        tl.store(dx + place[:, None] * D + d[None, :], sums * (scale / fold_by), mask=inside)
    if chunk == 0:
        if dscale is not None:
            tl.store(dscale + place, scale_sum / fold_by, mask=i < N)
        if dbias is not None:
            tl.store(dbias + place, bias_sum / fold_by, mask=i < N)


def similarity_lse_bwd(
    problem: Problem, row, col, g, h, kept, need_q: bool, need_k: bool, need_scale: bool, need_bias: bool
) -> tuple[Tensor | None, ...]:
    """Returns dq [G, N, D], dk [G, M, D], dscale [], dbias [G, M], None where not needed; k=None: all of dZ in dq."""
    launch = Launch.of(problem)
    problem, (_, N, M, D), itself, _, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_lse_bwd(problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias)
    q, k, _, _, q_ids, k_ids, _, k_bias, q_limit = problem
    row, col, g, h = (None if x is None else x.contiguous() for x in (row, col, g, h))
    if itself:  # a row is a column, too
        q_side = k_side = Side(q_ids, bias=k_bias, limit=q_limit, lse=row, grad=g)
    else:
        q_side, k_side = Side(q_ids, limit=q_limit, lse=row, grad=g), Side(k_ids, bias=k_bias, lse=col, grad=h)
    # Of a row with nothing left the gradient is 0, whatever arrived.
    fold = strips.fold_of(q, (g.masked_fill(lse == -torch.inf, 0) for lse, g in ((row, g), (col, h)) if g is not None))
    dq = dk = dscale = dbias = None
    with hardware.on(q.device):
        if not need_bias and (need_q or need_k) and strategy(q, N, M, chip) == "shared":
            dq, dk, dscale = _by_products(launch, q_side, k_side, fold, need_q, need_k, need_scale)
            dq, dk = strips.scaled(dq, dk, problem.full_scale, fold)
        else:
            config = choose("backward", q.dtype, D, chip, launch.crowded)
            if itself:
                needs = need_q, need_scale, need_bias
                dq, dscale, dbias = _gradient(launch, q, q, q_side, k_side, fold, config, False, *needs)
            else:
                if need_q or need_scale:
                    needs = need_q, need_scale, False
                    dq, dscale, _ = _gradient(launch, q, k, q_side, k_side, fold, config, False, *needs)
                if need_k or need_bias:
                    needs = need_k, False, need_bias
                    dk, _, dbias = _gradient(launch, k, q, k_side, q_side, fold, config, True, *needs)
    dscale = dscale / 2 if need_scale and itself else dscale  # there w_ij came as such and as w_ji
    dq, dk = None if dq is None else dq.view(q.shape), None if dk is None else dk.view(k.shape)
    return dq, dk, dscale, dbias.view(problem.keys.shape[:-1]) if need_bias else None


def _by_products(
    launch: Launch, q_side: Side, k_side: Side, fold, need_q: bool, need_k: bool, need_scale: bool
) -> tuple[Tensor | None, ...]:
    """Returns dq [N, D] and dk [M, D] without the scale and times fold, and dscale [], None where not needed."""
    problem, itself, D = launch.problem, launch.itself, launch.sizes[-1]
    q, keys = problem.q, problem.keys
    by_library = scores_by_library(q, problem.q_limit, itself and problem.k_bias is not None)
    config = choose("given" if by_library else "weights", q.dtype, D, launch.chip, launch.crowded)
    if need_scale:  # its sums take registers
        config = config._replace(BN=min(64, config.BN))
    dscales = []

    def weigh(x, y, x_side, y_side, given, weights) -> None:
        needs = False, need_scale, False
        _, dscale, _ = _gradient(launch, x, y, x_side, y_side, fold, config, False, *needs, given, weights)
        dscales.append(dscale)

    dq, dk = library.gradients_of_products(weigh, q, keys, q_side, k_side, itself, need_q, need_k, by_library)
    return dq, dk, sum(dscales) if need_scale else None


def _gradient(
    launch: Launch, x, y, x_side: Side, y_side: Side, fold, config: Config, transposed: bool,
    need_x: bool, need_scale: bool, need_bias: bool, given=None, weights=None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dx [G, N, D], dscale [], and dbias [G, N] of the bias of x, None where not needed; fills `weights`."""
    problem, itself = launch.problem, launch.itself
    (N, D), M, G = x.shape[-2:], y.shape[-2], launch.sizes[0]
    one_sided = itself and (y_side.bias is not None or y_side.limit is not None)
    close = launch.large and x_side.grad is not None and y_side.grad is not None and not one_sided
    x_side, y_side = launch.with_extents(x_side, y_side, config, close)
    blocks, chunks = triton.cdiv(N, config.BM), triton.cdiv(D, config.DV) if need_x else 1
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks * chunks)
    new = allocator(x)
    dx = new(splits, G, N, D) if need_x else None
    dscale, dbias = (new(splits, G, N) if need else None for need in (need_scale, need_bias))
    strip = given if weights is None else weights
    a, b, tma = launch.features(x, y, config) if given is None else (x, y, False)
    _backward[(G * blocks, splits, chunks)](
        a, b, y, given, weights, 0 if strip is None else strip.stride(0), x_side, y_side,
        problem.scale_tensor, problem.scale, fold, dx, dscale, dbias, G, N, M, blocks, split_blocks * config.BN,
        D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, TRANSPOSED=transposed, ITSELF=itself,
        SAME=problem.same, CLOSE=close, PRECISION=precision(x.dtype), TMA=tma, **config.launch(),
    )  # fmt: skip
    dx, dbias = (None if part is None else part[0] if splits == 1 else part.sum(0) for part in (dx, dbias))
    return dx, None if dscale is None else dscale.sum(), dbias
