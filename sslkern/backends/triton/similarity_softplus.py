"""`similarity_softplus`: sums of softplus over tiles of S that are never stored, and their gradients in the forward.

Floor, in passes of 2 N M D flop: 1, and 1 for each side that learns. Here a program owns rows of one gradient and needs
no atomics, so S is computed once more for the second side: 1, 2 or 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.similarity_softplus import similarity_softplus_fwd as reference
from . import hardware
from .configs import choose
from .similarity_lse import LARGE, SIZES, _problem, _split, _with_extents
from .tiles import (
    INF,
    Side,
    allocator,
    counts,
    crowded,
    dot_products,
    features,
    full_scale,
    load_rows,
    load_vector,
    precision,
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
    x, y, v, x_side, y_side, scale_tensor, scale, sign, fold, row, dx, dscale, dshift, dbias,
    G, N, M, blocks, split_size,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, DV: tl.constexpr,
    TRANSPOSED: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Of each row i of x over a split of y: row = sum_j softplus(t_ij), dx = scale sum_j w_ij y_j.

    x is q, or TRANSPOSED k (then w_ij is the weight of row j), or both (ITSELF: the weights of rows i and j add up).
    Also the sums over j of w_ij <x_i, y_j>, dscale, and of what belongs to the shift and to the bias of i, dshift and
    dbias.
    """
    g, block, split, chunk = tl.program_id(0) // blocks, tl.program_id(0) % blocks, tl.program_id(1), tl.program_id(2)
    x_start, y_start = g.to(tl.int64) * N, g.to(tl.int64) * M
    scale = full_scale(scale, scale_tensor)
    i0, d0 = block * BM, chunk * DV
    i = i0 + tl.arange(0, BM)
    fold_by = 1.0 if fold is None else tl.load(fold)
    if D <= BD:
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
    row_sum, scale_sum = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    shift_sum, bias_sum = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32)
    for j0 in range(split * split_size, tl.minimum((split + 1) * split_size, M), BN):
        j = j0 + tl.arange(0, BN)
        if D <= BD:
            b = load_rows(y, y_start, j0, 0, M, D, BN, BD, TMA)
            dots = tl.dot(a, tl.trans(b), input_precision=PRECISION)
        else:
            dots = dot_products(x, y, x_start, y_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, TMA)
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

        if TRANSPOSED:
            value, w = _terms(s, y_shift, y_weight, sign)
        else:
            value, w = _terms(s, x_shift, x_weight, sign)
        if row is not None:
            row_sum += value
        if dshift is not None:
            shift_sum += w
        if dscale is not None:
            scale_sum += w * dots
        back_w = w
        if ITSELF:
            if TWO:
                _, back_w = _terms(back, y_shift, y_weight, sign)
            w += back_w
        if dbias is not None:
            bias_sum += back_w
        if FEATURES:
            if D > BD:
                b = load_rows(v, y_start, j0, d0, M, D, BN, DV, False)
            sums = tl.dot((w * fold_by).to(b.dtype), b, sums, input_precision=PRECISION)

    place = (split.to(tl.int64) * G + g) * N + i
    if FEATURES:
        d = d0 + tl.arange(0, DV)
        inside = (i < N)[:, None] & (d < D)[None, :]
        tl.store(dx + place[:, None] * D + d[None, :], sums * (scale / fold_by), mask=inside)
    if chunk == 0:
        if row is not None:
            tl.store(row + place, tl.sum(row_sum, 1), mask=i < N)
        if dscale is not None:
            tl.store(dscale + place, tl.sum(scale_sum, 1), mask=i < N)
        if dshift is not None:
            tl.store(dshift + place, tl.sum(shift_sum, 1), mask=i < N)
        if dbias is not None:
            tl.store(dbias + place, tl.sum(bias_sum, 1), mask=i < N)


@hardware.on_its_device
def similarity_softplus_fwd(
    q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit, bias, weights, sign,
    need_q, need_k, need_scale, need_bias, need_k_bias,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Returns total [G], row [G, N], and the gradients of total, None where not needed: dq [G, N, D], dk [G, M, D],
    dscale [G], dbias [G, N], dk_bias [G, M]; k=None: all of the gradient in dq."""
    problem, sizes = _problem(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit)
    needs = need_q, need_k, need_scale, need_bias, need_k_bias
    if 0 in sizes:
        return reference(q, k, *problem[2:], bias, weights, sign, *needs)
    q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, q_limit = problem
    bias, weights = (None if x is None else x.contiguous() for x in (bias, weights))
    (G, N, M, D), itself, groups = sizes, k is None, q.shape[:-2]
    chip = hardware.of(q.device)
    config = choose("softplus", q.dtype, D, chip, crowded(q, k, k_bias, q_limit, chip))
    fold = _fold(q, weights)
    if itself:  # a row is a column, too
        q_side = k_side = Side(q_ids, bias=k_bias, limit=q_limit, shift=bias, weight=weights)
    else:
        q_side, k_side = Side(q_ids, limit=q_limit, shift=bias, weight=weights), Side(k_ids, bias=k_bias)

    def sums(x, y, x_side, y_side, transposed, row_too, rows_too, scale_too, shift_too, bias_too):
        rows, columns = x.shape[-2], y.shape[-2]
        x_side, y_side = _with_extents(x_side, y_side, N * M >= LARGE, same, False, config)
        blocks, chunks = triton.cdiv(rows, config.BM), triton.cdiv(D, config.DV) if rows_too else 1
        split_blocks, splits = _split(triton.cdiv(columns, config.BN), G * blocks * chunks, chip)
        new = allocator(x)
        dx = new(splits, G, rows, D) if rows_too else None
        wanted = row_too, scale_too, shift_too, bias_too
        row, dscale, dshift, dbias = (new(splits, G, rows) if want else None for want in wanted)
        a, b, tma = features(x, y, config, chip)
        _softplus[(G * blocks, splits, chunks)](
            a, b, y, x_side, y_side, scale_tensor, scale, float(sign), fold, row, dx, dscale, dshift, dbias,
            G, rows, columns, blocks, split_blocks * config.BN,
            D=D, BM=config.BM, BN=config.BN, BD=config.BD, DV=config.DV, TRANSPOSED=transposed, ITSELF=itself,
            SAME=same, FEATURES=rows_too, PRECISION=precision(x.dtype), TMA=tma, **config.launch(),
        )  # fmt: skip
        parts = row, dx, dscale, dshift, dbias
        return (None if part is None else part[0] if splits == 1 else part.sum(0) for part in parts)

    row, dq, dscale, dbias, dk_bias = sums(
        q, q if itself else k, q_side, k_side, False, True, need_q, need_scale, need_bias, need_k_bias and itself
    )
    dk = None
    if not itself and (need_k or need_k_bias):
        _, dk, _, _, dk_bias = sums(k, q, k_side, q_side, True, False, need_k, False, False, need_k_bias)
    total = (row if weights is None else row * weights.view(G, N)).sum(1).view(groups)
    keys = q if itself else k
    shapes = (dq, q.shape), (dk, keys.shape), (dbias, q.shape[:-1]), (dk_bias, keys.shape[:-1])
    dq, dk, dbias, dk_bias = (None if x is None else x.view(shape) for x, shape in shapes)
    dscale = None if dscale is None else dscale.sum(1).view(groups)
    return total, row.view(q.shape[:-1]), dq, dk, dscale, dbias, dk_bias


def _fold(q: Tensor, weights: Tensor | None) -> Tensor | None:
    """What weights are multiplied by on their way through fp16, where the smallest would vanish: the largest become
    2^13, of q with itself 2^14."""
    if q.dtype != torch.float16:
        return None
    if weights is None:
        return torch.full((), 2.0**13, device=q.device)
    largest = weights.abs().nan_to_num(0, 0, 0).amax()  # what is not finite may be of rows with nothing left
    return 2.0**13 / largest.clamp(2.0**-100, 2.0**100)
