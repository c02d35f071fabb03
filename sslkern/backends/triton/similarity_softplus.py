"""`similarity_softplus`: sums of softplus over tiles of S that are never stored, and their gradients in the forward.

Floor, in passes of 2 N M D flop: 1, and 1 for each side that learns. Where a program owns rows of one gradient, which
needs no atomics, S is computed once more for the second side: 1, 2 or 4. Of many features the weights are written, and
both gradients are products by BLAS: 3.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strips
from ..problem import Problem
from ..reference.similarity_softplus import similarity_softplus_fwd as reference
from . import blas, chips
from .configs import Config, choose
from .launch import Launch, allocator, contiguous, precision, sum_of_splits, viewed, width_of
from .schemes import is_shared, scores_by_blas
from .tiles import (
    SIZES,
    Side,
    columns_of,
    counts,
    dot_products,
    full_scale,
    load_rows,
    of_columns,
    of_pairs,
    of_rows,
    scores,
    softplus_and_sigmoid,
    some_left_out,
    this_program,
)


@triton.jit
def _terms(s, bias, weight, sign):
    """softplus(sign (s + bias)) and weight times its derivative by s; 0 of what is left out, whatever the weight."""
    t = s * sign if bias is None else (s + bias) * sign
    value, slope = softplus_and_sigmoid(t)
    w = slope * sign if weight is None else slope * (weight * sign)
    out = s == float("-inf")
    return tl.where(out, 0.0, value), tl.where(out, 0.0, w)


@triton.jit(do_not_specialize=[*SIZES, "sign"])
def similarity_softplus_fwd_kernel(
    x, y,  # [G, N, D] and [G, M, D], or their descriptors; None where products are there
    y_rows,  # [G, M, D], y itself
    products, weights,  # [N, M], rows `width` apart, or None; the same memory, but one address for both takes registers
    width,
    x_side, y_side,
    scale_tensor,  # []
    scale, sign,
    fold,  # [], or None: 1
    row, dx,  # [splits, G, N] and [splits, G, N, D], or None
    dscale, dq_bias, dk_bias,  # [splits, G, N] each, or None
    G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    TRANSPOSED: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Of each row i of x over a split of y: row = sum_j softplus(t_ij), dx = scale sum_j w_ij y_j; a chunk is DV
    features of it.

    x is q, or TRANSPOSED k (then w_ij is the weight of row j), or both (ITSELF: the weights of rows i and j add up).
    dscale gets the sums over j of w_ij <x_i, y_j>, dq_bias and dk_bias those of what of w_ij each bias of i is in. Or,
    for products by BLAS, weights = w_ij fold.
    """
    STAYS: tl.constexpr = x is not None and D <= BD  # a block of x, in shared memory
    # Of x with itself the terms of rows i and of rows j are equal where nothing tells rows and columns apart.
    ONE_SIDED: tl.constexpr = ITSELF and (
        x_side.k_bias is not None or x_side.limit is not None or x_side.q_bias is not None or x_side.weight is not None
    )
    g, block, split, chunk, x_start, y_start = this_program(N, M, blocks)
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    fold_by = 1.0 if fold is None else tl.load(fold)
    if STAYS:
        a = load_rows(x, x_start, i0, 0, N, D, BM, BD)
    x_k_bias = of_rows(x_side.k_bias, x_start, i, N, 0.0)
    x_limit = of_rows(x_side.limit, x_start, i, N, float("inf"))
    x_q_bias = of_rows(x_side.q_bias, x_start, i, N, 0.0)
    x_weight = of_rows(x_side.weight, x_start, i, N, 0.0)

    sums = tl.zeros((BM, DV), tl.float32)
    # Beside a second product ptxas lets the first one wait for sums over a row.
    row_sum = tl.zeros((BM, BN if dx is not None else 1), tl.float32)
    scale_sum = tl.zeros((BM,), tl.float32)
    q_bias_sum, k_bias_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    first, end = columns_of(split, split_size, M)
    for j0 in tl.range(first, end, BN, warp_specialize=WS and STAYS):
        j = j0 + tl.arange(0, BN)
        if STAYS:
            b = load_rows(y, y_start, j0, 0, M, D, BN, BD)
            dots = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            dots = dot_products(x, y, products, width, x_start, y_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, WS)
        y_k_bias = of_columns(y_side.k_bias, y_start, j, M, 0.0)
        y_limit = of_columns(y_side.limit, y_start, j, M, float("inf"))
        y_q_bias = of_columns(y_side.q_bias, y_start, j, M, 0.0)
        y_weight = of_columns(y_side.weight, y_start, j, M, 0.0)
        if TRANSPOSED:
            s = scores(dots, scale, x_k_bias, y_limit)
        else:
            s = scores(dots, scale, y_k_bias, x_limit)
        back = s
        if ONE_SIDED:
            back = scores(dots, scale, x_k_bias, y_limit)
        x_block, y_block = g * blocks + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(x_side, y_side, x_block, y_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
            mask = counts(x_side, y_side, x_start, y_start, i, j, N, M, ITSELF, False, SAME)
            s = tl.where(mask, s, float("-inf"))
            if ONE_SIDED:
                back = tl.where(mask, back, float("-inf"))
            else:
                back = s
            if dscale is not None:  # a product that is left out may be infinite
                dots = tl.where(mask, dots, 0.0)

        if TRANSPOSED:
            value, w = _terms(s, y_q_bias, y_weight, sign)
        else:
            value, w = _terms(s, x_q_bias, x_weight, sign)
        if row is not None:
            row_sum += value if dx is not None else tl.sum(value, 1, keep_dims=True)
        if dq_bias is not None:
            q_bias_sum += tl.sum(w, 1)
        if dscale is not None:
            if x_side.limit is not None or y_side.limit is not None:
                dots = tl.where(w == 0, 0.0, dots)
            scale_sum += tl.sum(w * dots, 1)
        back_w = w
        if ITSELF:
            if ONE_SIDED:
                _, back_w = _terms(back, y_q_bias, y_weight, sign)
            w += back_w
        if dk_bias is not None:
            k_bias_sum += tl.sum(back_w, 1)
        if weights is not None:
            tl.store(of_pairs(weights, width, i0, j0, BM, BN), (w * fold_by).to(weights.dtype.element_ty))
        if dx is not None:
            if D > BD:
                b = load_rows(y_rows, y_start, j0, d0, M, D, BN, DV)
            sums = tl.dot((w * fold_by).to(b.dtype), b, sums, input_precision=PRECISION)

    place = (split.to(tl.int64) * G + g) * N + i
    if dx is not None:
        d = d0 + tl.arange(0, DV)
        inside = (i < N)[:, None] & (d < D)[None, :]
        tl.store(dx + place[:, None] * D + d[None, :], sums * (scale / fold_by), mask=inside)
    if chunk == 0:
        if row is not None:
            tl.store(row + place, tl.sum(row_sum, 1), mask=i < N)
        if dscale is not None:
            tl.store(dscale + place, scale_sum, mask=i < N)
        if dq_bias is not None:
            tl.store(dq_bias + place, q_bias_sum, mask=i < N)
        if dk_bias is not None:
            tl.store(dk_bias + place, k_bias_sum, mask=i < N)


def similarity_softplus_fwd(
    problem: Problem, bias: Tensor | None, weights: Tensor | None, sign: float,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns total [G], row [G, N], and the gradients of total, None where not needed: dq [G, N, D], dk [G, M, D],
    dscale [G], dbias [G, N], dk_bias [G, M]; k=None: all of the gradient in dq."""
    launch = Launch.of(problem)
    problem, (G, N, M, D), itself, _, chip = launch
    if 0 in launch.sizes:
        return reference(problem, bias, weights, sign, need_q, need_k, need_scale, need_bias, need_k_bias)
    q, k, _, _, q_ids, k_ids, _, k_bias, q_limit = problem
    bias, weights = contiguous(bias, weights)
    q_side, k_side = Side(q_ids, limit=q_limit, q_bias=bias, weight=weights), Side(k_ids, k_bias=k_bias)
    if itself:  # a row is a column, too
        q_side = k_side = q_side._replace(k_bias=k_bias)
    fold = strips.fold_of(q, (weights, weights))  # of q with itself two weights add up

    needs = Needs(row=True, dx=need_q, dscale=need_scale, dq_bias=need_bias, dk_bias=need_k_bias and itself)
    dk = dk_bias = None
    with chips.on(q.device):
        if (need_q or need_k) and not itself and not need_k_bias and is_shared(q, N, M, chip):
            row, dq, dk, dscale, dbias = _by_blas(launch, q_side, k_side, float(sign), fold, needs, need_k)
        else:
            config = choose("softplus", q.dtype, D, chip, launch.crowded)
            sums = partial(_sums, launch, config, float(sign), fold)
            row, dq, dscale, dbias, dk_bias = sums(q, problem.keys, q_side, k_side, needs)
            if not itself and (need_k or need_k_bias):
                needs = Needs(dx=need_k, dk_bias=need_k_bias)
                _, dk, _, _, dk_bias = sums(k, q, k_side, q_side, needs, transposed=True)
    total = (row if weights is None else row * weights.view(G, N)).sum(1)
    rows, columns, groups = q.shape[:-1], problem.keys.shape[:-1], q.shape[:-2]
    if dscale is not None:
        dscale = dscale.sum(1).view(groups)
    dq, dk = viewed(dq, *rows, D), viewed(dk, *columns, D)
    return total.view(groups), row.view(rows), dq, dk, dscale, viewed(dbias, *rows), viewed(dk_bias, *columns)


class Needs(NamedTuple):
    """What a launch is asked for, in the order of what it returns."""

    row: bool = False
    dx: bool = False
    dscale: bool = False
    dq_bias: bool = False
    dk_bias: bool = False


def _by_blas(
    launch: Launch, q_side: Side, k_side: Side, sign: float, fold: Tensor | None, needs: Needs, need_k: bool
) -> tuple[Tensor | None, ...]:
    """Returns row [G, N], dq [N, D], dk [M, D], and dscale and dbias for each row, None if not needed."""
    problem, (*_, D), _, _, chip = launch
    q, k = problem.q, problem.k
    scores_too = scores_by_blas(q, problem.q_limit, one_sided=False)
    config = choose("products" if scores_too else "weights", q.dtype, D, chip)
    # A softplus takes more registers than an exponential.
    config = config._replace(BN=min(64 if chip.large else 32, config.BN), specialised=False)
    of_strips = []

    def weigh(x: Tensor, y: Tensor, x_side: Side, y_side: Side, products: Tensor | None, weights: Tensor) -> None:
        asked = needs._replace(dx=False)
        sums = _sums(launch, config, sign, fold, x, y, x_side, y_side, asked, False, products, weights)
        row, _, dscale, dbias, _ = sums
        of_strips.append((row, dscale, dbias))

    dq, dk = blas.gradients_of_strips(weigh, q, k, q_side, k_side, False, needs.dx, need_k, scores_too)
    dq, dk = strips.scaled(dq, dk, problem.full_scale, fold)
    row, dscale, dbias = (None if x[0] is None else torch.cat(x, 1) for x in zip(*of_strips, strict=True))
    return row, dq, dk, dscale, dbias


def _sums(
    launch: Launch, config: Config, sign: float, fold: Tensor | None, x: Tensor, y: Tensor, x_side: Side, y_side: Side,
    needs: Needs, transposed: bool = False, products: Tensor | None = None, weights: Tensor | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """Returns row [G, N], dx [G, N, D], dscale, dq_bias and dk_bias for each row, None if not needed; fills `weights`,
    from the products <x_i, y_j> if they are there."""
    problem = launch.problem
    (N, D), M, G = x.shape[-2:], y.shape[-2], launch.sizes[0]
    x_side, y_side = launch.with_extents(x_side, y_side, config)
    blocks, chunks = triton.cdiv(N, config.BM), triton.cdiv(D, config.DV) if needs.dx else 1
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks * chunks)
    new = allocator(x)
    vector = partial(new, splits, G, N)
    row, dx, dscale = vector(needed=needs.row), new(splits, G, N, D, needed=needs.dx), vector(needed=needs.dscale)
    dq_bias, dk_bias = vector(needed=needs.dq_bias), vector(needed=needs.dk_bias)
    a, b = launch.features(x, y, config, products)
    similarity_softplus_fwd_kernel[(G * blocks, splits, chunks)](
        x=a, y=b, y_rows=y, products=products, weights=weights, width=width_of(weights),
        x_side=x_side, y_side=y_side, scale_tensor=problem.scale_tensor, scale=problem.scale, sign=sign, fold=fold,
        row=row, dx=dx, dscale=dscale, dq_bias=dq_bias, dk_bias=dk_bias,
        G=G, N=N, M=M, blocks=blocks, split_size=split_blocks * config.BN,
        D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, TRANSPOSED=transposed, ITSELF=launch.itself,
        SAME=problem.same, PRECISION=precision(x.dtype), **config.launch(),
    )  # fmt: skip
    return [sum_of_splits(parts) for parts in (row, dx, dscale, dq_bias, dk_bias)]
