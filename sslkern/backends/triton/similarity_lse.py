"""`similarity_lse`: the log-sum-exps of the rows and columns of S, whose tiles live in registers only.

Floors, in passes of 2 N M D flop: rows and columns 1 from one pass, of q with itself 1/2, as S is symmetric and each
tile serves its rows and its columns; frozen keys 2, gradient included; backward 2 for each side that learns, as a
program owns rows of one gradient, computes S again and needs no atomics. One exponential for each pair and direction,
and in the backward one for both directions where that is exact.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strips
from ..problem import Problem
from ..reference import similarity_lse as reference
from . import blas, chips
from .blas import Sums
from .configs import Config, choose
from .launch import Launch, allocator, contiguous, precision, sum_of_splits, viewed, width_of
from .schemes import is_shared, scores_by_blas
from .tiles import (
    SIZES,
    Side,
    columns_of,
    counts,
    dot_products,
    exp,
    finite_shift,
    full_scale,
    load_rows,
    load_vector,
    log_sum,
    longest,
    of_columns,
    of_pairs,
    of_rows,
    online_softmax,
    or_nan,
    scores,
    some_left_out,
    this_program,
)

TRIANGLE_FROM = 32  # blocks of rows; merging the columns of fewer costs more than half of the tiles

# ---- forward: rows, and from the same tiles the columns --------------------------------------------------------------


@triton.jit
def _sums_of_columns(s):
    """The largest score of each column of a tile, and the sum of exponentials relative to it."""
    maximum = tl.max(s, 0)
    return maximum, tl.sum(exp(s - finite_shift(maximum)[None, :]), 0)


@triton.jit(do_not_specialize=SIZES)
def similarity_lse_fwd_kernel(
    q, k,  # [G, N, D] and [G, M, D], or their descriptors; None where products are there
    products,  # fp32 [N, M], <q_i, k_j>, rows `width` apart, or None
    width,
    q_side, k_side,
    scale_tensor,  # []
    scale,
    row, row_best,  # [splits, G, N]
    col, col_best,  # [programs, G, M], or None
    G, N, M, programs, rounds, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr,
    TRIANGLE: tl.constexpr, PRECISION: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Program (g, p) takes a block of rows in each round, and of the columns a split.

    row gets the log-sum-exp of each row over a split, col that of each column over the rows of a program. TRIANGLE:
    only pairs above the diagonal are visited, and each counts for its row and its column.
    """
    STAYS: tl.constexpr = q is not None and D <= BD  # a block of q, in shared memory
    # Not `this_program`: it may have many blocks.
    g, p, split = tl.program_id(0) // programs, tl.program_id(0) % programs, tl.program_id(1)
    q_start, k_start = g.to(tl.int64) * N, g.to(tl.int64) * M
    scale = full_scale(scale, scale_tensor)
    for r in range(rounds):
        # there and back, so that programs share a triangle evenly
        block = r * programs + tl.where(r % 2 == 0, p, programs - 1 - p)
        i0 = block * BM
        i = i0 + tl.arange(0, BM)
        first, end = columns_of(split, split_size, M)
        if TRIANGLE:
            first = tl.maximum(first, i0 // BN * BN)
        if i0 >= N:
            end = first
        if STAYS:
            x = load_rows(q, q_start, i0, 0, N, D, BM, BD)
        limit = of_rows(q_side.limit, q_start, i, N, float("inf"))
        if q_side.norm is not None:
            x_norm = tl.abs(scale) * tl.load(q_side.norm + g * tl.cdiv(N, BM) + block, mask=i0 < N, other=0.0)
        maximum = tl.full((BM,), float("-inf"), tl.float32)
        total = tl.zeros((BM,), tl.float32)
        for j0 in tl.range(first, end, BN, warp_specialize=WS and STAYS):
            j = j0 + tl.arange(0, BN)
            if STAYS:
                y = load_rows(k, k_start, j0, 0, M, D, BN, BD)
                dots = tl.dot(x, tl.trans(y), input_precision=PRECISION)
            else:
                dots = dot_products(q, k, products, width, q_start, k_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, WS)
            s = scores(dots, scale, of_columns(k_side.k_bias, k_start, j, M, 0.0), limit)
            q_block, k_block = g * tl.cdiv(N, BM) + block, g * tl.cdiv(M, BN) + j0 // BN
            if some_left_out(q_side, k_side, q_block, k_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
                mask = counts(q_side, k_side, q_start, k_start, i, j, N, M, ITSELF, TRIANGLE, SAME)
                s = tl.where(mask, s, float("-inf"))
            if q_side.norm is None:
                maximum, total, _, _ = online_softmax(maximum, total, s)
                if col is not None:
                    here, here_total = _sums_of_columns(s)
            elif x_norm * tl.load(k_side.norm + k_block) < 32.0:
                # Neither exponentials of scores up to that nor sums of many need a maximum taken off: one exponential
                # for both directions. A row or column with nothing in this tile keeps what earlier ones gave it.
                terms = exp(s)
                row_total, here_total = tl.sum(terms, 1), tl.sum(terms, 0)
                there = tl.where(row_total > 0, 0.0, float("-inf"))
                here = tl.where(here_total > 0, 0.0, float("-inf"))
                new = tl.maximum(maximum, there)
                shift = finite_shift(new)
                total = total * exp(maximum - shift) + row_total * exp(there - shift)
                maximum = new
            else:
                maximum, total, _, _ = online_softmax(maximum, total, s)
                here, here_total = _sums_of_columns(s)
            if col is not None:  # the first round comes to every tile that later ones come to
                place = (p.to(tl.int64) * G + g) * M + j
                old = tl.load(col + place, mask=(j < M) & (r > 0), other=float("-inf"))
                shift = finite_shift(tl.maximum(old, here))
                here_total = exp(old - shift) + here_total * exp(here - shift)
                tl.store(col + place, shift + tl.log(here_total), mask=j < M)
                if col_best is not None:
                    old = tl.load(col_best + place, mask=(j < M) & (r > 0), other=float("-inf"))
                    tl.store(col_best + place, or_nan(tl.maximum(old, here), here_total), mask=j < M)

        place = (split.to(tl.int64) * G + g) * N + i
        tl.store(row + place, log_sum(maximum, total), mask=i < N)
        if row_best is not None:
            tl.store(row_best + place, or_nan(maximum, total), mask=i < N)
        if col is not None:
            tl.debug_barrier()  # threads that wrote columns need not be those that read them in the next round


@triton.jit(do_not_specialize=SIZES)
def _merge_parts(
    maximum, total, best,  # [BLOCK] each, the running sums of exp(part - maximum) and the best score
    parts, best_parts,  # [count, size]
    x,  # [BLOCK], which of size
    size, N, count, STEP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Takes parts into the running sums. STEP: part n came to the columns from those of its first block on, which
    starts at n * STEP."""
    TOGETHER: tl.constexpr = 64  # parts whose loads are under way together
    for n0 in range(0, count, TOGETHER):
        n = n0 + tl.arange(0, TOGETHER)
        there = (n < count)[:, None] & (x < size)[None, :]
        if STEP > 0:
            there &= (n * STEP // BN * BN)[:, None] <= (x % N)[None, :]
        place = n.to(tl.int64)[:, None] * size + x[None, :]
        value = tl.load(parts + place, mask=there, other=float("-inf"))
        new = tl.maximum(maximum, tl.max(value, 0))
        shift = finite_shift(new)
        total = total * exp(maximum - shift) + tl.sum(exp(value - shift[None, :]), 0)
        maximum = new
        if best_parts is not None:
            best = tl.maximum(best, tl.max(tl.load(best_parts + place, mask=there, other=float("-inf")), 0))
    return maximum, total, best


@triton.jit(do_not_specialize=SIZES)
def similarity_lse_merge_kernel(
    row, row_best,  # [splits, size], or None
    col, col_best,  # [programs, size] of a triangle, or None
    out, out_best,  # [size]
    size, N, splits, programs, BM: tl.constexpr, BN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = log-sum-exp over the first dimension of row and of col."""
    x = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    maximum, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    best = maximum
    if row is not None:
        maximum, total, best = _merge_parts(maximum, total, best, row, row_best, x, size, N, splits, 0, BN)
    if col is not None:
        maximum, total, best = _merge_parts(maximum, total, best, col, col_best, x, size, N, programs, BM, BN)
    tl.store(out + x, log_sum(maximum, total), mask=x < size)
    if out_best is not None:
        tl.store(out_best + x, or_nan(best, total), mask=x < size)


def similarity_lse_fwd(problem: Problem, columns: bool, need_best: bool, kept_rows: int) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], col [G, M] or None, best [G, N + M or N] or None, and no scores: it does not keep them."""
    launch = Launch.of(problem)
    problem, (G, N, M, D), itself, _, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_lse_fwd(problem, columns, need_best, 0)
    q, k_bias, q_limit = problem.q, problem.k_bias, problem.q_limit
    by_blas = is_shared(q, N, M, chip) and scores_by_blas(q, q_limit, itself and k_bias is not None)
    config = choose("products" if by_blas else "forward", q.dtype, D, chip, launch.crowded)
    triangle = itself and k_bias is None and q_limit is None and (by_blas or N >= TRIANGLE_FROM * config.BM)
    options = _Options(config, columns or triangle, triangle, need_best)
    sides = _sides(problem)
    with chips.on(q.device):
        if by_blas:
            strip = partial(_sums_of_strip, launch, options)
            sums = blas.sums_of_strips(strip, q, problem.keys, *sides, itself, options.columns, need_best)
        else:
            sums = _sums(launch, options, q, problem.keys, *sides)
            row, row_best, col, col_best = sums
            if triangle:  # each row is a column as well
                sums = Sums(*_merged(config, row, row_best, col, col_best), None, None)
            else:
                sums = Sums(*_merged(config, row, row_best), *_merged(config, col, col_best))
    row, row_best, col, col_best = sums
    groups = q.shape[:-2]
    if need_best and columns:
        row_best = torch.cat((row_best.view(G, N), col_best.view(G, M)), 1)
    return row.view(*groups, N), viewed(col, *groups, M), viewed(row_best, *groups, -1), None


def _sides(problem: Problem) -> tuple[Side, Side]:
    """What there is for the rows of S and for its columns."""
    k_ids = problem.q_ids if problem.k is None else problem.k_ids
    return Side(problem.q_ids, limit=problem.q_limit), Side(k_ids, k_bias=problem.k_bias)


class _Options(NamedTuple):
    config: Config
    columns: bool  # of S, or of a triangle of it
    triangle: bool  # only what is above the diagonal is visited
    need_best: bool


def _sums(
    launch: Launch, options: _Options, x: Tensor, y: Tensor, x_side: Side, y_side: Side, products: Tensor | None = None
) -> Sums:
    """Of rows x and columns y, in parts: not merged here, as a small batch feels each call."""
    config, columns, triangle, need_best = options
    problem, (G, *_), itself, large, chip = launch
    (N, D), M, new = x.shape[-2:], y.shape[-2], allocator(x)
    row_blocks, col_blocks = triton.cdiv(N, config.BM), triton.cdiv(M, config.BN)
    # Columns cost a vector for each program, so these are no more than run side by side, in rounds.
    rounds = min(row_blocks, triton.cdiv(row_blocks * G, 2 * chip.processors)) if columns else 1
    programs = triton.cdiv(row_blocks, rounds)
    # Of a triangle in one round programs find little or much to do, so these are many.
    split_blocks, splits = launch.split(col_blocks, G * programs, 8 if triangle and rounds == 1 else 2)
    row, row_best = new(splits, G, N), new(splits, G, N, needed=need_best)
    col, col_best = new(programs, G, M, needed=columns), new(programs, G, M, needed=columns and need_best)
    x_side, y_side = launch.with_extents(x_side, y_side, config)
    # In fp32 it is products that take the time, and another rounding of exponentials would show.
    plain = problem.k_bias is None and problem.q_limit is None and x.dtype != torch.float32
    if large and columns and not need_best and plain:
        x_side, y_side = x_side._replace(norm=longest(x, config.BM)), y_side._replace(norm=longest(y, config.BN))
    a, b = launch.features(x, y, config, products)
    similarity_lse_fwd_kernel[(G * programs, splits)](
        q=a, k=b, products=products, width=width_of(products), q_side=x_side, k_side=y_side,
        scale_tensor=problem.scale_tensor, scale=problem.scale,
        row=row, row_best=row_best, col=col, col_best=col_best,
        G=G, N=N, M=M, programs=programs, rounds=rounds, split_size=split_blocks * config.BN,
        D=D, BM=config.BM, BN=config.BN, BD=config.BD, ITSELF=itself, SAME=problem.same, TRIANGLE=triangle,
        PRECISION=precision(problem.q.dtype), **config.launch(),
    )  # fmt: skip
    return Sums(row, row_best, col, col_best)


def _sums_of_strip(
    launch: Launch, options: _Options, x: Tensor, y: Tensor, x_side: Side, y_side: Side, products: Tensor
) -> Sums:
    config = options.config
    row, row_best, col, col_best = _sums(launch, options, x, y, x_side, y_side, products)
    row, row_best = _merged(config, row, row_best)
    if options.triangle:
        col, col_best = _merged(config, None, None, col, col_best)
    else:
        col, col_best = _merged(config, col, col_best)
    return Sums(row, row_best, col, col_best)


def _merged(
    config: Config, row: Tensor | None, row_best: Tensor | None,
    col: Tensor | None = None, col_best: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """The log-sum-exps over the first dimension of row and col, which is of a triangle, and the best of row_best and
    col_best; each may be None."""
    if row is None and col is None:
        return None, None
    if col is None and len(row) == 1:
        return row[0], None if row_best is None else row_best[0]
    splits, programs = (0 if x is None else len(x) for x in (row, col))
    out = torch.empty_like((col if row is None else row)[0])
    out_best = None if row_best is None and col_best is None else torch.empty_like(out)
    size, N, BLOCK = out.numel(), out.shape[-1], 32
    similarity_lse_merge_kernel[(triton.cdiv(size, BLOCK),)](
        row=row, row_best=row_best, col=col, col_best=col_best, out=out, out_best=out_best,
        size=size, N=N, splits=splits, programs=programs, BM=config.BM, BN=config.BN, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return out, out_best


# ---- rows only, with keys that need no gradient: it is accumulated in the forward ------------------------------------


@triton.jit(do_not_specialize=SIZES)
def similarity_lse_frozen_fwd_kernel(
    q, k,  # [G, N, D] and [G, M, D], or their descriptors
    k_rows,  # [G, M, D], k itself
    q_side, k_side,
    scale_tensor,  # []
    scale,
    row, mean, best,  # [splits, G, N], [splits, G, N, D], [splits, G, N] or None
    G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr, SAME: tl.constexpr,
    LIFT: tl.constexpr, PRECISION: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """row, and mean = sum_j softmax_ij k_j, over a split of the keys; a chunk is DV features of the mean."""
    STAYS: tl.constexpr = D <= BD  # a block of q, in shared memory
    g, block, split, chunk, q_start, k_start = this_program(N, M, blocks)
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    if STAYS:
        x = load_rows(q, q_start, i0, 0, N, D, BM, BD)
    limit = of_rows(q_side.limit, q_start, i, N, float("inf"))
    maximum, total = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, DV), tl.float32)
    first, end = columns_of(split, split_size, M)
    for j0 in tl.range(first, end, BN, warp_specialize=WS and STAYS):
        j = j0 + tl.arange(0, BN)
        if STAYS:
            y = load_rows(k, k_start, j0, 0, M, D, BN, BD)
            dots = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        else:
            dots = dot_products(q, k, None, 0, q_start, k_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, WS)
        s = scores(dots, scale, of_columns(k_side.k_bias, k_start, j, M, 0.0), limit)
        q_block, k_block = g * tl.cdiv(N, BM) + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(q_side, k_side, q_block, k_block, i0, j0, N, M, BM, BN, False, SAME):
            mask = counts(q_side, k_side, q_start, k_start, i, j, N, M, False, False, SAME)
            s = tl.where(mask, s, float("-inf"))
        maximum, total, shrink, terms = online_softmax(maximum, total, s)
        if not STAYS:
            y = load_rows(k_rows, k_start, j0, d0, M, D, BN, DV)
        sums = tl.dot((terms * LIFT).to(y.dtype), y, sums * shrink[:, None], input_precision=PRECISION)

    place = (split.to(tl.int64) * G + g) * N + i
    sums = sums / (LIFT * tl.where(total == 0, 1.0, total))[:, None]
    d = d0 + tl.arange(0, DV)
    tl.store(mean + place[:, None] * D + d[None, :], sums, mask=(i < N)[:, None] & (d < D)[None, :])
    if chunk == 0:
        tl.store(row + place, log_sum(maximum, total), mask=i < N)
        if best is not None:
            tl.store(best + place, or_nan(maximum, total), mask=i < N)


@triton.jit(do_not_specialize=SIZES)
def similarity_lse_merge_means_kernel(
    parts, best_parts,  # [splits, size], the latter or None
    means,  # [splits, size, D]
    row, best, mean,  # [size], [size] or None, [size, D]
    size, splits, D: tl.constexpr, BLOCK: tl.constexpr, DV: tl.constexpr,
):  # fmt: skip
    """row = log-sum-exp over parts, and mean that over means, weighted by the exp(part - row) of their splits."""
    x, d = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * DV + tl.arange(0, DV)
    inside, place = (x < size)[:, None] & (d < D)[None, :], x[:, None] * D + d[None, :]
    maximum, total = tl.full((BLOCK,), float("-inf"), tl.float32), tl.zeros((BLOCK,), tl.float32)
    maximum, total, best_of_row = _merge_parts(maximum, total, maximum, parts, best_parts, x, size, 1, splits, 0, 1)
    merged = log_sum(maximum, total)
    if tl.program_id(1) == 0:
        tl.store(row + x, merged, mask=x < size)
        if best is not None:
            tl.store(best + x, or_nan(best_of_row, total), mask=x < size)
    shift = finite_shift(merged)
    sums = tl.zeros((BLOCK, DV), tl.float32)
    for n0 in range(0, splits, 16):
        for n in tl.static_range(16):  # their loads are under way together
            there = x < tl.where(n0 + n < splits, size, 0)
            weight = exp(tl.load(parts + x, mask=there, other=float("-inf")) - shift)
            sums += weight[:, None] * tl.load(means + place, mask=inside & there[:, None], other=0.0)
            parts += size
            means += size.to(tl.int64) * D
    tl.store(mean + place, sums, mask=inside)


def similarity_lse_frozen_fwd(problem: Problem, need_best: bool) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], mean [G, N, D] = sum_j softmax_ij k_j (0 for an empty row), best [G, N] or None."""
    launch = Launch.of(problem)
    problem, (_, N, M, _), _, _, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_lse_frozen_fwd(problem, need_best)
    q = problem.q
    if is_shared(q, N, M, chip):
        row, mean, row_best = _frozen_by_blas(launch, need_best)
    else:
        row, mean, row_best = _frozen(launch, need_best)
    rows = q.shape[:-1]
    return row.view(rows), mean.view(q.shape), viewed(row_best, *rows)


def _frozen_by_blas(launch: Launch, need_best: bool) -> tuple[Tensor | None, ...]:
    """As a forward and a backward, for which S is there once more."""
    problem = launch.problem
    row, _, row_best, _ = similarity_lse_fwd(problem, False, need_best, 0)
    ones = torch.ones_like(row)
    fold = strips.fold_of(problem.q, [ones])
    q_side, k_side = _sides(problem)
    with chips.on(problem.q.device):
        mean, *_ = _by_blas(launch, q_side._replace(lse=row, grad=ones), k_side, fold, True, False, False)
    return row, mean if fold is None else mean.div_(fold), row_best


def _frozen(launch: Launch, need_best: bool) -> tuple[Tensor | None, ...]:
    problem, (G, N, M, D), _, _, chip = launch
    q, k = problem.q, problem.k
    config = choose("frozen", q.dtype, D, chip, launch.crowded)
    blocks, chunks = triton.cdiv(N, config.BM), triton.cdiv(D, config.DV)
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks * chunks)
    new = allocator(q)
    parts, means, best_parts = new(splits, G, N), new(splits, G, N, D), new(splits, G, N, needed=need_best)
    with chips.on(q.device):
        q_side, k_side = launch.with_extents(*_sides(problem), config)
        x, y = launch.features(q, k, config)
        similarity_lse_frozen_fwd_kernel[(G * blocks, splits, chunks)](
            q=x, k=y, k_rows=k, q_side=q_side, k_side=k_side, scale_tensor=problem.scale_tensor, scale=problem.scale,
            row=parts, mean=means, best=best_parts, G=G, N=N, M=M, blocks=blocks, split_size=split_blocks * config.BN,
            D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, SAME=problem.same,
            LIFT=2.0**14 if q.dtype == torch.float16 else 1.0,  # where weights of long queues would vanish
            PRECISION=precision(q.dtype), **config.launch(),
        )  # fmt: skip
        if splits == 1:
            return parts, means, best_parts
        row, mean, row_best = new(G, N), new(G, N, D), new(G, N, needed=need_best)
        BLOCK, DV = 4, min(32, triton.next_power_of_2(D))
        similarity_lse_merge_means_kernel[(triton.cdiv(G * N, BLOCK), triton.cdiv(D, DV))](
            parts=parts, best_parts=best_parts, means=means, row=row, best=row_best, mean=mean, size=G * N,
            splits=splits, D=D, BLOCK=BLOCK, DV=DV, num_warps=4,
        )  # fmt: skip
    return row, mean, row_best


# ---- backward: S is computed again, once for each side that learns ---------------------------------------------------


@triton.jit(do_not_specialize=SIZES)
def similarity_lse_bwd_kernel(
    x, y,  # [G, N, D] and [G, M, D], or their descriptors; None where products are there
    y_rows,  # [G, M, D], y itself
    products, weights,  # [N, M], rows `width` apart, or None; the same memory, but one address for both takes registers
    width,
    x_side, y_side,
    scale_tensor,  # []
    scale,
    fold,  # [], or None: 1
    dx,  # [splits, G, N, D], or None
    dscale, dk_bias,  # [splits, G, N] each, or None
    G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    TRANSPOSED: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """dx = scale sum_j w_ij y_j with w_ij = g_i exp(s_ij - lse_i) + h_j exp(s_ij - lse_j), over a split of y; a chunk
    is DV features of it.

    x is q, or TRANSPOSED k (then a bias belongs to rows and limits to columns of the tile), or both (ITSELF: the second
    term is that of s_ji, with bias and limit of the other side). dscale gets the sum over j of w_ij <x_i, y_j>, dk_bias
    that of what of w_ij the bias of i is in. Or, for products by BLAS, weights = w_ij fold.
    """
    STAYS: tl.constexpr = x is not None and D <= BD  # a block of x, in shared memory
    ONE_SIDED: tl.constexpr = ITSELF and (y_side.k_bias is not None or y_side.limit is not None)
    g, block, split, chunk, x_start, y_start = this_program(N, M, blocks)
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    fold_by = 1.0 if fold is None else tl.load(fold)
    if STAYS:
        a = load_rows(x, x_start, i0, 0, N, D, BM, BD)
    x_bias = of_rows(x_side.k_bias, x_start, i, N, 0.0)
    x_limit = of_rows(x_side.limit, x_start, i, N, float("inf"))
    if x_side.grad is not None:
        x_lse = load_vector(x_side.lse, x_start, i, N, float("-inf"))
        # A row with nothing left gets weight 0, whatever gradient arrived.
        x_grad = tl.where(x_lse == float("-inf"), 0.0, load_vector(x_side.grad, x_start, i, N, 0.0)) * fold_by
        x_lse = finite_shift(x_lse)
    if x_side.lse_extent is not None:
        x_extent = x_side.lse_extent + 2 * (g * blocks + block)
        x_low, x_high = tl.load(x_extent), tl.load(x_extent + 1)

    sums = tl.zeros((BM, DV), tl.float32)
    scale_sum, bias_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    first, end = columns_of(split, split_size, M)
    for j0 in tl.range(first, end, BN, warp_specialize=WS and STAYS):
        j = j0 + tl.arange(0, BN)
        if STAYS:
            b = load_rows(y, y_start, j0, 0, M, D, BN, BD)
            dots = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            dots = dot_products(x, y, products, width, x_start, y_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, WS)
        y_bias = of_columns(y_side.k_bias, y_start, j, M, 0.0)
        y_limit = of_columns(y_side.limit, y_start, j, M, float("inf"))
        if TRANSPOSED:
            s = scores(dots, scale, x_bias, y_limit)
        else:
            s = scores(dots, scale, y_bias, x_limit)
        back = s
        if ONE_SIDED:
            back = scores(dots, scale, x_bias, y_limit)
        x_block, y_block = g * tl.cdiv(N, BM) + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(x_side, y_side, x_block, y_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
            mask = counts(x_side, y_side, x_start, y_start, i, j, N, M, ITSELF, False, SAME)
            s = tl.where(mask, s, float("-inf"))
            if ONE_SIDED:
                back = tl.where(mask, back, float("-inf"))
            else:
                back = s
            if dscale is not None:  # a product that is left out may be infinite
                dots = tl.where(mask, dots, 0.0)

        if y_side.grad is not None:
            y_lse = load_vector(y_side.lse, y_start, j, M, float("-inf"))
            y_grad = tl.where(y_lse == float("-inf"), 0.0, load_vector(y_side.grad, y_start, j, M, 0.0)) * fold_by
            y_lse = finite_shift(y_lse)
        if x_side.lse_extent is not None:
            # One exponential: from the lowest log-sum-exp on, terms neither overflow nor vanish within e^64.
            y_extent = y_side.lse_extent + 2 * y_block
            low, high = tl.minimum(x_low, tl.load(y_extent)), tl.maximum(x_high, tl.load(y_extent + 1))
            if high - low < 64:
                row_weight = x_grad * exp(tl.minimum(low - x_lse, 0.0))
                col_weight = y_grad * exp(tl.minimum(low - y_lse, 0.0))
                w = exp(s - low) * (row_weight[:, None] + col_weight[None, :])
            else:
                w = x_grad[:, None] * exp(s - x_lse[:, None]) + y_grad[None, :] * exp(s - y_lse[None, :])
        elif x_side.grad is not None:
            w = x_grad[:, None] * exp(s - x_lse[:, None])
            if y_side.grad is not None:
                back_w = y_grad[None, :] * exp(back - y_lse[None, :])
                w += back_w
        else:
            w = y_grad[None, :] * exp(back - y_lse[None, :])
        if dscale is not None:
            if x_side.limit is not None or y_side.limit is not None:
                dots = tl.where(w == 0, 0.0, dots)
            along = tl.sum(w * dots, 1)
            if ITSELF:  # the columns of a strip from N on stand for rows that it does not visit, too
                along *= tl.where(j0 >= N, 2.0, 1.0)
            scale_sum += along
        if dk_bias is not None:
            if ITSELF:
                bias_sum += tl.sum(back_w, 1)
            else:
                bias_sum += tl.sum(w, 1)
        if weights is not None:
            tl.store(of_pairs(weights, width, i0, j0, BM, BN), w.to(weights.dtype.element_ty))  # whole tiles fit
        if dx is not None:
            if D > BD:
                b = load_rows(y_rows, y_start, j0, d0, M, D, BN, DV)
            sums = tl.dot(w.to(b.dtype), b, sums, input_precision=PRECISION)

    place = (split.to(tl.int64) * G + g) * N + i
    if dx is not None:
        d = d0 + tl.arange(0, DV)
        inside = (i < N)[:, None] & (d < D)[None, :]
        tl.store(dx + place[:, None] * D + d[None, :], sums * (scale / fold_by), mask=inside)
    if chunk == 0:
        if dscale is not None:
            tl.store(dscale + place, scale_sum / fold_by, mask=i < N)
        if dk_bias is not None:
            tl.store(dk_bias + place, bias_sum / fold_by, mask=i < N)


def similarity_lse_bwd(
    problem: Problem, row: Tensor | None, col: Tensor | None, g: Tensor | None, h: Tensor | None, kept: Tensor | None,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dq [G, N, D], dk [G, M, D], dscale [], dk_bias [G, M], None where not needed; k=None: all of dZ in dq."""
    launch = Launch.of(problem)
    problem, (_, N, M, D), itself, _, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_lse_bwd(problem, row, col, g, h, kept, need_q, need_k, need_scale, need_bias)
    q, k = problem.q, problem.k
    row, col, g, h = contiguous(row, col, g, h)
    q_side, k_side = _sides(problem)
    if itself:  # a row is a column, too
        q_side = k_side = q_side._replace(k_bias=problem.k_bias, lse=row, grad=g)
    else:
        q_side, k_side = q_side._replace(lse=row, grad=g), k_side._replace(lse=col, grad=h)
    # Of a row with nothing left the gradient is 0, whatever arrived.
    fold = strips.fold_of(q, (g.masked_fill(lse == -torch.inf, 0) for lse, g in ((row, g), (col, h)) if g is not None))
    dk = dk_bias = None
    with chips.on(q.device):
        if not need_bias and (need_q or need_k) and is_shared(q, N, M, chip):
            dq, dk, dscale = _by_blas(launch, q_side, k_side, fold, need_q, need_k, need_scale)
            dq, dk = strips.scaled(dq, dk, problem.full_scale, fold)
        else:
            gradient = partial(_gradient, launch, choose("backward", q.dtype, D, chip, launch.crowded), fold)
            if itself:
                dq, dscale, dk_bias = gradient(q, q, q_side, k_side, need_q, need_scale, need_bias)
            else:
                dq, dscale, _ = gradient(q, k, q_side, k_side, need_q, need_scale, False)
                dk, _, dk_bias = gradient(k, q, k_side, q_side, need_k, False, need_bias, transposed=True)
    if need_scale and itself:
        dscale = dscale / 2  # w_ij came as such and as w_ji
    keys = problem.keys.shape
    return viewed(dq, *q.shape), viewed(dk, *keys), dscale, viewed(dk_bias, *keys[:-1])


def _by_blas(
    launch: Launch, q_side: Side, k_side: Side, fold: Tensor | None, need_q: bool, need_k: bool, need_scale: bool
) -> tuple[Tensor | None, ...]:
    """Returns dq [N, D] and dk [M, D] without the scale and times fold, and dscale [], None where not needed."""
    problem, (*_, D), itself, _, chip = launch
    q, keys = problem.q, problem.keys
    scores_too = scores_by_blas(q, problem.q_limit, itself and problem.k_bias is not None)
    config = choose("products" if scores_too else "weights", q.dtype, D, chip, launch.crowded)
    if need_scale:  # its sums take registers
        config = config._replace(BN=min(64, config.BN))
    dscales: list[Tensor] = []

    def weigh(x: Tensor, y: Tensor, x_side: Side, y_side: Side, products: Tensor | None, weights: Tensor) -> None:
        needs = False, need_scale, False
        _, dscale, _ = _gradient(launch, config, fold, x, y, x_side, y_side, *needs, False, products, weights)
        dscales.append(dscale)

    dq, dk = blas.gradients_of_strips(weigh, q, keys, q_side, k_side, itself, need_q, need_k, scores_too)
    return dq, dk, sum(dscales[1:], dscales[0]) if need_scale else None


def _gradient(
    launch: Launch, config: Config, fold: Tensor | None, x: Tensor, y: Tensor, x_side: Side, y_side: Side,
    need_x: bool, need_scale: bool, need_bias: bool, transposed: bool = False,
    products: Tensor | None = None, weights: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns dx [G, N, D], dscale [], and dk_bias [G, N] where x are keys, None where not needed; fills `weights`,
    from the products <x_i, y_j> if they are there."""
    if weights is None and not (need_x or need_scale or need_bias):
        return None, None, None
    problem, itself = launch.problem, launch.itself
    (N, D), M, G = x.shape[-2:], y.shape[-2], launch.sizes[0]
    one_sided = itself and (y_side.k_bias is not None or y_side.limit is not None)
    close = launch.large and x_side.grad is not None and y_side.grad is not None and not one_sided
    x_side, y_side = launch.with_extents(x_side, y_side, config, close)
    blocks, chunks = triton.cdiv(N, config.BM), triton.cdiv(D, config.DV) if need_x else 1
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks * chunks)
    new = allocator(x)
    dx = new(splits, G, N, D, needed=need_x)
    dscale, dk_bias = new(splits, G, N, needed=need_scale), new(splits, G, N, needed=need_bias)
    a, b = launch.features(x, y, config, products)
    similarity_lse_bwd_kernel[(G * blocks, splits, chunks)](
        x=a, y=b, y_rows=y, products=products, weights=weights, width=width_of(weights),
        x_side=x_side, y_side=y_side, scale_tensor=problem.scale_tensor, scale=problem.scale, fold=fold,
        dx=dx, dscale=dscale, dk_bias=dk_bias,
        G=G, N=N, M=M, blocks=blocks, split_size=split_blocks * config.BN,
        D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, TRANSPOSED=transposed, ITSELF=itself,
        SAME=problem.same, PRECISION=precision(x.dtype), **config.launch(),
    )  # fmt: skip
    return sum_of_splits(dx), None if dscale is None else dscale.sum(), sum_of_splits(dk_bias)
