"""`similarity_topk`: the n best of each row, kept while the tiles of S stream by.

Floor: one pass of 2 N M D flop. A score and its column are one integer that sorts as they do, the score in the high
half and the column, counted from the end, in the low. What of a tile beats the worst of the n that a row has so far is
taken one by one, which soon is rare.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import Problem
from ..reference import similarity_topk as reference
from . import chips
from .configs import choose
from .launch import Launch, precision
from .tiles import (
    SIZES,
    Side,
    columns_of,
    counts,
    dot_products,
    full_scale,
    of_rows,
    scores,
    some_left_out,
    this_program,
)

NONE = tl.constexpr(-(2**63))  # below what any score makes


@triton.jit(do_not_specialize=[*SIZES, "n"])
def similarity_topk_fwd_kernel(
    q, k,  # [G, N, D] and [G, M, D], or their descriptors
    q_side, k_side,
    scale_tensor,  # []
    scale,
    best,  # int64 [splits, G, N, n]
    n, G, N, M, blocks, split_size,
    D: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    ITSELF: tl.constexpr, SAME: tl.constexpr, PRECISION: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """best gets the n <= P largest of each row over a split of the columns, in no order."""
    g, block, split, _, q_start, k_start = this_program(N, M, blocks)
    scale = full_scale(scale, scale_tensor)
    i0 = block * BM
    i = i0 + tl.arange(0, BM)
    limit = of_rows(q_side.limit, q_start, i, N, float("inf"))
    # All differ, so that one at a time gives way; places from n on never do.
    place = tl.arange(0, P)
    found = tl.zeros((BM, P), tl.int64) + tl.where(place < n, place.to(tl.int64) + NONE, 2**63 - 1)[None, :]
    worst = tl.min(found, 1)
    first, end = columns_of(split, split_size, M)
    for j0 in range(first, end, BN):
        j = j0 + tl.arange(0, BN)
        dots = dot_products(q, k, None, 0, q_start, k_start, i0, j0, N, M, D, BM, BN, BD, PRECISION, WS)
        s = scores(dots, scale, None, limit)
        q_block, k_block = g * blocks + block, g * tl.cdiv(M, BN) + j0 // BN
        if some_left_out(q_side, k_side, q_block, k_block, i0, j0, N, M, BM, BN, ITSELF, SAME):
            mask = counts(q_side, k_side, q_start, k_start, i, j, N, M, ITSELF, False, SAME)
            s = tl.where(mask, s, float("-inf"))
        bits = (s + 0.0).to(tl.int32, bitcast=True)  # -0 becomes 0, which equals it
        order = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) << 32
        order |= (0x7FFFFFFF - j)[None, :].to(tl.int64)
        order = tl.where((s > float("-inf")) | (s == float("inf")), order, NONE)  # NaN is neither
        candidate = tl.max(order, 1)
        while tl.max((candidate > worst).to(tl.int32), 0) > 0:
            gives_way = (candidate > worst)[:, None] & (found == worst[:, None])
            found = tl.where(gives_way, candidate[:, None], found)
            order = tl.where(order == candidate[:, None], NONE, order)
            worst, candidate = tl.min(found, 1), tl.max(order, 1)
    row = (split.to(tl.int64) * G + g) * N + i
    tl.store(best + row[:, None] * n + place[None, :], found, mask=(i < N)[:, None] & (place < n)[None, :])


def similarity_topk_fwd(problem: Problem, n: int) -> tuple[Tensor, Tensor]:
    """Returns values [G, N, n] and indices [G, N, n], -inf and -1 where a row has fewer."""
    launch = Launch.of(problem)
    problem, (G, N, M, D), itself, _, chip = launch
    if 0 in launch.sizes:
        return reference.similarity_topk_fwd(problem, n)
    q, _, scale_tensor, scale, q_ids, k_ids, same, _, q_limit = problem
    config, P = choose("topk", q.dtype, D, chip), max(2, triton.next_power_of_2(n))
    blocks = triton.cdiv(N, config.BM)
    split_blocks, splits = launch.split(triton.cdiv(M, config.BN), G * blocks)
    best = torch.empty((splits, G, N, n), dtype=torch.int64, device=q.device)
    sides = Side(q_ids, limit=q_limit), Side(q_ids if itself else k_ids)
    with chips.on(q.device):
        q_side, k_side = launch.with_extents(*sides, config)
        x, y = launch.features(q, problem.keys, config)
        similarity_topk_fwd_kernel[(G * blocks, splits)](
            q=x, k=y, q_side=q_side, k_side=k_side, scale_tensor=scale_tensor, scale=scale, best=best,
            n=n, G=G, N=N, M=M, blocks=blocks, split_size=split_blocks * config.BN,
            D=D, P=P, BM=config.BM, BN=config.BN, BD=config.BD, ITSELF=itself, SAME=same,
            PRECISION=precision(q.dtype), **config.launch(),
        )  # fmt: skip
    best = best.permute(1, 2, 0, 3).reshape(*q.shape[:-1], splits * n).topk(n).values
    left_out = best < NONE.value + n  # nothing came to that place
    order = (best >> 32).to(torch.int32)
    values = torch.where(order < 0, order ^ 0x7FFFFFFF, order).view(torch.float32)
    indices = 0x7FFFFFFF - (best & 0xFFFFFFFF)
    return values.masked_fill(left_out, -torch.inf), indices.masked_fill(left_out, -1)
