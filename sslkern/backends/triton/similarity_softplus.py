"""`similarity_softplus`: sums of softplus over tiles of S that are never stored, and their gradients in the forward.

Floor, in passes of 2 N M D flop: 1, and 1 for each side that learns. Where a program owns rows of one gradient, which
needs no atomics, S is computed once more for the second side: 1, 2 or 4. Of many features the weights are written, and
both gradients are products of the library: 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import strips
from ..problem import Problem
from ..reference.similarity_softplus import similarity_softplus_fwd as reference
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
    full_scale,
    load_rows,
    load_vector,
    of_tile,
    scores,
    softplus_and_sigmoid,
    some_left_out,
)


@triton.jit
def _terms(s, shift, weight, sign):
    """softplus(sign (s + shift)) and weight times its derivative by s; 0 of what is left out, whatever the weight."""
    t = s * sign if shift is None else (s + shift) * sign
    value, slope = softplus_and_sigmoid(t)
    w = slope * sign if weight is None else slope * (weight * sign)
    out = s == -INF
    return tl.where(out, 0.0, value), tl.where(out, 0.0, w)


@triton.jit(do_not_specialize=[*SIZES, "sign"])
def _softplus(
    x, y, v, given, weights, width, x_side, y_side, scale_tensor, scale, sign, fold, row, dx, dscale, dshift, dbias,
    G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    TRANSPOSED: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """Of each row i of x over a split of y: row = sum_j softplus(t_ij), dx = scale sum_j w_ij y_j.

    x is q, or TRANSPOSED k (then w_ij is the weight of row j), or both (ITSELF: the weights of rows i and j add up).
    Also the sums over j of w_ij <x_i, y_j>, dscale, and of what belongs to the shift and to the bias of i, dshift and
    dbias. Or, for products of the library, weights [N, width] = w_ij fold. given: the products <x_i, y_j>, if they are
    there already.
    """
    g, block, split, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1), tl.program_id(2)
    x_start, y_start = g.to(tl.int64) * N, g.to(tl.int64) * M
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    fold_by = 1.0 if fold is None else tl.load(fold)
    if given is None and D <= BD:
        a = load_rows(x, x_start, i0, 0, N, D, BM, BD, TMA)
    x_bias, x_limit, x_shift, x_weight = None, None, None, None
    if x_side.bias is not None:
        x_bias = load_vector(x_side.bias, x_start, i, N, 0.0)[:, None]
    if x_side.limit is not None:
        x_limit = load_vector(x_side.limit, x_start, i, N, INF)[:, None]
    if x_side.shift is not None:
        x_shift = load_vector(x_side.shift, x_start, i, N, 0.0)[:, None]
    if x_side.weight is not None:
        x_weight = load_vector(x_side.weight, x_start, i, N, 0.0)[:, None]
    # Of x with itself the terms of rows i and of rows j are equal where nothing tells rows and columns apart.
    ONE_SIDED: tl.constexpr = (
        x_side.bias is not None or x_side.limit is not None or x_side.shift is not None or x_side.weight is not None
    )

    sums = tl.zeros((BM, DV), tl.float32)
    # Beside a second product ptxas lets the first one wait for sums over a row.
    row_sum = tl.zeros((BM, BN if dx is not None else 1), tl.float32)
    scale_sum = tl.zeros((BM,), tl.float32)
    shift_sum, bias_sum = tl.zeros((BM,), tl.float32), tl.zeros((BM,), tl.float32)
    first, last = split * split_size, tl.minimum((split + 1) * split_size, M)
    for j0 in tl.range(first, last, BN, warp_specialize=WS and given is None and D <= BD):
        j = j0 + tl.arange(0, BN)
        if given is None and D <= BD:
            b = load_rows(y, y_start, j0, 0, M, D, BN, BD, TMA)
            dots = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            dots = dot_products(x, y, given, width, x_start, y_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, TMA, WS)
        y_bias, y_limit, y_shift, y_weight = None, None, None, None
        if y_side.bias is not None:
            y_bias = load_vector(y_side.bias, y_start, j, M, 0.0)[None, :]
        if y_side.limit is not None:
            y_limit = load_vector(y_side.limit, y_start, j, M, INF)[None, :]
        if y_side.shift is not None:
            y_shift = load_vector(y_side.shift, y_start, j, M, 0.0)[None, :]
        if y_side.weight is not None:
            y_weight = load_vector(y_side.weight, y_start, j, M, 0.0)[None, :]
        s = scores(dots, scale, x_bias if TRANSPOSED else y_bias, y_limit if TRANSPOSED else x_limit)
        TWO: tl.constexpr = ITSELF and ONE_SIDED
        back = scores(dots, scale, x_bias, y_limit) if TWO else s
        x_block, y_block = g * blocks + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(x_side, y_side, x_block, y_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
            keep = counts(x_side, y_side, x_start, y_start, i, j, N, M, ITSELF, False, SAME)
            s = tl.where(keep, s, -INF)
            back = tl.where(keep, back, -INF) if TWO else s
            if dscale is not None:  # a product that is left out may be infinite
                dots = tl.where(keep, dots, 0.0)

        if TRANSPOSED:
            value, w = _terms(s, y_shift, y_weight, sign)
        else:
            value, w = _terms(s, x_shift, x_weight, sign)
        if row is not None:
            row_sum += value if dx is not None else tl.sum(value, 1, keep_dims=True)
        if dshift is not None:
            shift_sum += tl.sum(w, 1)
        if dscale is not None:
            if x_side.limit is not None or y_side.limit is not None:
                dots = tl.where(w == 0, 0.0, dots)
            scale_sum += tl.sum(w * dots, 1)
        back_w = w
        if ITSELF:
            if TWO:
                _, back_w = _terms(back, y_shift, y_weight, sign)
            w += back_w
        if dbias is not None:
            bias_sum += tl.sum(back_w, 1)
        if weights is not None:
            tl.store(of_tile(weights, width, i0, j0, BM, BN), (w * fold_by).to(weights.dtype.element_ty))
        if dx is not None:
            if D > BD:
                b = load_rows(v, y_start, j0, d0, M, D, BN, DV, False)
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
        if dshift is not None:
            tl.store(dshift + place, shift_sum, mask=i < N)
        if dbias is not None:
            tl.store(dbias + place, bias_sum, mask=i < N)


def similarity_softplus_fwd(
    problem: Problem, bias, weights, sign: float,
    need_q: bool, need_k: bool, need_scale: bool, need_bias: bool, need_k_bias: bool,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns total [G], row [G, N], and the gradients of total, None where not needed: dq [G, N, D], dk [G, M, D],
    dscale [G], dbias [G, N], dk_bias [G, M]; k=None: all of the gradient in dq."""
    launch = Launch.of(problem)
    problem, (G, N, M, D), itself, _, chip = launch
    if 0 in launch.sizes:
        return reference(problem, bias, weights, sign, need_q, need_k, need_scale, need_bias, need_k_bias)
    q, k, _, _, q_ids, k_ids, _, k_bias, q_limit = problem
    bias, weights = (None if x is None else x.contiguous() for x in (bias, weights))
    keys, groups, sign = problem.keys, q.shape[:-2], float(sign)
    fold = strips.fold_of(q, (weights, weights))  # of q with itself two weights add up
    if itself:  # a row is a column, too
        q_side = k_side = Side(q_ids, bias=k_bias, limit=q_limit, shift=bias, weight=weights)
    else:
        q_side, k_side = Side(q_ids, limit=q_limit, shift=bias, weight=weights), Side(k_ids, bias=k_bias)

    dk = dk_bias = None
    with hardware.on(q.device):
        if (need_q or need_k) and not itself and not need_k_bias and strategy(q, N, M, chip) == "shared":
            by_library = scores_by_library(q, q_limit, one_sided=False)
            config = choose("given" if by_library else "weights", q.dtype, D, chip)
            # A softplus takes more registers than an exponential.
            config = config._replace(BN=min(64 if chip.large else 32, config.BN), specialised=False)
            parts = []

            def weigh(x, y, x_side, y_side, given, of_pairs) -> None:
                needs = True, False, need_scale, need_bias, False
                sums = _sums(launch, x, y, x_side, y_side, sign, fold, config, False, *needs, given, of_pairs)
                row, _, dscale, dbias, _ = sums
                parts.append((row, dscale, dbias))

            dq, dk = library.gradients_of_products(weigh, q, k, q_side, k_side, False, need_q, need_k, by_library)
            dq, dk = strips.scaled(dq, dk, problem.full_scale, fold)
            row, dscale, dbias = (None if x[0] is None else torch.cat(x, 1) for x in zip(*parts, strict=True))
        else:
            config = choose("softplus", q.dtype, D, chip, launch.crowded)
            needs = True, need_q, need_scale, need_bias, need_k_bias and itself
            sums = _sums(launch, q, keys, q_side, k_side, sign, fold, config, False, *needs)
            row, dq, dscale, dbias, dk_bias = sums
            if not itself and (need_k or need_k_bias):
                needs = False, need_k, False, False, need_k_bias
                _, dk, _, _, dk_bias = _sums(launch, k, q, k_side, q_side, sign, fold, config, True, *needs)
    total = (row if weights is None else row * weights.view(G, N)).sum(1).view(groups)
    shapes = (dq, q.shape), (dk, keys.shape), (dbias, q.shape[:-1]), (dk_bias, keys.shape[:-1])
    dq, dk, dbias, dk_bias = (None if x is None else x.view(shape) for x, shape in shapes)
    dscale = None if dscale is None else dscale.sum(1).view(groups)
    return total, row.view(q.shape[:-1]), dq, dk, dscale, dbias, dk_bias


def _sums(
    launch: Launch, x, y, x_side: Side, y_side: Side, sign: float, fold, config: Config, transposed: bool,
    need_row: bool, need_x: bool, need_scale: bool, need_shift: bool, need_bias: bool, given=None, weights=None,
) -> list[Tensor | None]:  # fmt: skip
    """Returns row [G, N], dx [G, N, D], dscale, dshift and dbias for each row, None if not needed; fills `weights`."""
    problem = launch.problem
    (N, D), M, G = x.shape[-2:], y.shape[-2], launch.sizes[0]
    x_side, y_side = launch.with_extents(x_side, y_side, config)
    blocks, chunks = triton.cdiv(N, config.BM), triton.cdiv(D, config.DV) if need_x else 1
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks * chunks)
    new = allocator(x)
    dx = new(splits, G, N, D) if need_x else None
    needs = need_row, need_scale, need_shift, need_bias
    row, dscale, dshift, dbias = (new(splits, G, N) if need else None for need in needs)
    strip = given if weights is None else weights
    a, b, tma = launch.features(x, y, config) if given is None else (x, y, False)
    _softplus[(G * blocks, splits, chunks)](
        a, b, y, given, weights, 0 if strip is None else strip.stride(0), x_side, y_side,
        problem.scale_tensor, problem.scale, sign, fold, row, dx, dscale, dshift, dbias,
        G, N, M, blocks, split_blocks * config.BN,
        D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, TRANSPOSED=transposed, ITSELF=launch.itself,
        SAME=problem.same, PRECISION=precision(x.dtype), TMA=tma, **config.launch(),
    )  # fmt: skip
    parts = row, dx, dscale, dshift, dbias
    return [None if part is None else part[0] if splits == 1 else part.sum(0) for part in parts]
