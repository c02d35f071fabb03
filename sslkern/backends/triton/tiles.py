"""A tile of S = scale * x y^T + bias and which of its pairs count: what the kernels of the similarity family share.

A tile has BM rows i of one side x and BN columns j of the other, y. In the forward x is q and y is k; in the backward
the side whose gradient a program owns is x.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

SIZES = ["G", "N", "M", "size", "programs", "rounds", "blocks", "splits", "split_size"]  # no new kernel for new sizes


class Side(NamedTuple):
    """What there is for each of the rows (columns) of S but the features, [G, N] each, or None."""

    ids: torch.Tensor | None = None  # int64
    ids_extent: torch.Tensor | None = None  # int64 [G, blocks, 2]: lowest and highest id of each block
    k_bias: torch.Tensor | None = None  # fp32, of keys, is added to the scores
    limit: torch.Tensor | None = None  # fp32, of queries: scores above it do not count
    lse: torch.Tensor | None = None  # fp32, the log-sum-exp over the other side
    lse_extent: torch.Tensor | None = None  # fp32 [G, blocks, 2], without those that are -inf
    norm: torch.Tensor | None = None  # fp32 [G, blocks], of the longest row of each block
    grad: torch.Tensor | None = None  # fp32, the gradient of lse
    q_bias: torch.Tensor | None = None  # fp32, of queries, is added to the scores under the softplus, after the limit
    weight: torch.Tensor | None = None  # fp32, of queries in a sum

    def cut(self, first: int, stop: int) -> "Side":
        """What there is for the rows from first to stop, of one group."""
        return Side(*(None if x is None else x[first:stop] for x in self))


@triton.jit
def this_program(N, M, blocks):
    """What a program of a grid (groups and their blocks of rows, splits of the columns, chunks of features) does: its
    group and block, its split and its chunk; and where the rows of its group begin in x and y."""
    g, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    return g, block, tl.program_id(1), tl.program_id(2), g.to(tl.int64) * N, g.to(tl.int64) * M


@triton.jit
def columns_of(split, split_size, M):
    """The first column of a split and the end. Just before the loop: earlier they take registers."""
    return split * split_size, tl.minimum((split + 1) * split_size, M)


@triton.jit
def load_vector(x, start, i, size, other):
    """x[start + i], `other` beyond the size of the side."""
    return tl.load(x + start + i, mask=i < size, other=other)


@triton.jit
def of_rows(x, start, i, N, other):
    """What x [G, N] has for the rows of a tile, [BM, 1]; None where there is no x."""
    if x is not None:
        return load_vector(x, start, i, N, other)[:, None]


@triton.jit
def of_columns(x, start, j, M, other):
    """What x [G, M] has for the columns of a tile, [1, BN]; None where there is no x."""
    if x is not None:
        return load_vector(x, start, j, M, other)[None, :]


@triton.jit
def load_rows(x, start, i0, d0, size, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """x[start + i0 ..., d0 ...] [BLOCK, BLOCK_D], 0 beyond the size of the side and beyond D."""
    if isinstance(x, tl.tensor_descriptor):  # of one group: what is outside of the tensor is outside of the side
        return x.load([i0, d0])
    else:
        i, d = tl.arange(0, BLOCK), d0 + tl.arange(0, BLOCK_D)
        first = x + (start + i0).to(tl.int64) * D
        mask = (i0 + i < size)[:, None]
        if D % BLOCK_D != 0:
            mask = mask & (d < D)[None, :]
        return tl.load(first + i[:, None] * D + d[None, :], mask=mask, other=0.0)


@triton.jit
def dot_products(
    x, y, products, width, x_start, y_start, i0, j0, N, M,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr, WS: tl.constexpr,
):  # fmt: skip
    """<x_i, y_j> [BM, BN] in fp32, BD features at a time; without x and y those that are there, products [N, width]."""
    if x is None:
        inside = (i0 + tl.arange(0, BM) < N)[:, None] & (j0 + tl.arange(0, BN) < M)[None, :]
        dots = tl.load(of_pairs(products, width, i0, j0, BM, BN), mask=inside, other=0.0)
    else:
        dots = tl.zeros((BM, BN), tl.float32)
        for d0 in tl.range(0, D, BD, warp_specialize=WS):
            a = load_rows(x, x_start, i0, d0, N, D, BM, BD)
            b = load_rows(y, y_start, j0, d0, M, D, BN, BD)
            if PRECISION == "ieee" and a.dtype == tl.float32:
                # Without matrix units a product is one chain of roundings, so it begins anew every BD features. A plain
                # sum would not do: the compiler makes its other side the beginning of the chain.
                part = tl.dot(a, tl.trans(b), input_precision=PRECISION)
                dots = tl.fma(part, tl.zeros_like(part) + 1.0, dots)
            else:
                dots = tl.dot(a, tl.trans(b), dots, input_precision=PRECISION)
    return dots


@triton.jit
def of_pairs(matrix, width, i0, j0, BM: tl.constexpr, BN: tl.constexpr):
    """Where the numbers of a tile stand in a matrix with one for each pair, the rows `width` apart."""
    return matrix + (i0.to(tl.int64) * width + j0) + (tl.arange(0, BM)[:, None] * width + tl.arange(0, BN)[None, :])


@triton.jit
def scores(dots, scale, bias, limit):
    """scale * dots + bias, -inf where that is above the limit; bias and limit broadcast to dots, or None.

    Forward and backward must agree to the bit on what is above: so both call this, which leaves the compiler no choice.
    """
    if bias is None:
        s = dots * scale
    else:
        out = float("-inf")
        s = tl.where(bias == out, out, tl.fma(dots, tl.zeros_like(dots) + scale, tl.zeros_like(dots) + bias))
    if limit is not None:
        s = tl.where(s > limit, float("-inf"), s)
    return s


@triton.jit
def some_left_out(
    x_side, y_side, x_block, y_block, i0, j0, N, M,
    BM: tl.constexpr, BN: tl.constexpr, ITSELF: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Whether a tile may hold pairs that do not count, as far as one can tell without looking at each."""
    found = (i0 + BM > N) | (j0 + BN > M)
    if ITSELF:
        found |= (i0 < j0 + BN) & (j0 < i0 + BM)
    if x_side.ids is not None:
        if SAME or x_side.ids_extent is None:
            found |= True
        else:
            x_extent, y_extent = x_side.ids_extent + 2 * x_block, y_side.ids_extent + 2 * y_block
            found |= (tl.load(x_extent) <= tl.load(y_extent + 1)) & (tl.load(y_extent) <= tl.load(x_extent + 1))
    return found


@triton.jit
def counts(
    x_side, y_side, x_start, y_start, i, j, N, M,
    ITSELF: tl.constexpr, ABOVE: tl.constexpr, SAME: tl.constexpr,
):  # fmt: skip
    """Which pairs count, as far as places and ids say; ABOVE: only those above the diagonal."""
    mask = (i < N)[:, None] & (j < M)[None, :]
    if ABOVE:
        mask &= i[:, None] < j[None, :]
    elif ITSELF:
        mask &= i[:, None] != j[None, :]
    if x_side.ids is not None:
        row_ids = load_vector(x_side.ids, x_start, i, N, 0)
        col_ids = load_vector(y_side.ids, y_start, j, M, 0)
        equal = row_ids[:, None] == col_ids[None, :]
        mask &= equal if SAME else equal == 0
    return mask


@triton.jit
def exp(x):
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def precise_exp(x):
    """exp of x <= 0 to the last bits, where `exp` is off by |x| 2^-24: 12 bits of x times 12 of log2(e) are exact, and
    what is left of both is so small that a short series does."""
    x = tl.where(x < -104, -104.0, x)  # e^-104 is 0; NaN stays
    high = (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    rest = (x - high) + high * 2.1642023e-4
    series = 1.0 + rest * (1.0 + rest * (0.5 + rest * 0.16666667))
    return tl.exp2(high * 1.4423828125) * series


@triton.jit
def softplus_and_sigmoid(t):
    """Both of t from one exponential, with full relative accuracy where they are tiny."""
    u = precise_exp(-tl.abs(t))
    # log(1 + u) / u for u in [0, 1], interpolated at the zeros of a Chebyshev polynomial; off by 1e-8
    p = 0.0195425274 - 0.00317605705 * u
    p = -0.0563736132 + p * u
    p = 0.105436238 + p * u
    p = -0.152696671 + p * u
    p = 0.196632743 + p * u
    p = -0.249516163 + p * u
    p = 0.333297105 + p * u
    p = -0.499998926 + p * u
    p = 0.999999995 + p * u
    return tl.maximum(t, 0.0) + p * u, tl.where(t < 0, u, 1.0) / (1.0 + u)


@triton.jit
def finite_shift(maximum):
    """What to subtract before the exponential: the maximum, but 0 of nothing (-inf - -inf is NaN)."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def online_softmax(maximum, total, s):
    """Takes scores s [BM, BN] into the running maximum of each row and the sum of exp(s - maximum).

    Returns both, the factor by which sums of earlier exponentials shrink, and the exponentials of s.
    """
    new = tl.maximum(maximum, tl.max(s, 1))
    shift = finite_shift(new)
    shrink, terms = exp(maximum - shift), exp(s - shift[:, None])
    return new, total * shrink + tl.sum(terms, 1), shrink, terms


@triton.jit
def log_sum(maximum, total):
    return finite_shift(maximum) + tl.log(total)


@triton.jit
def or_nan(maximum, total):
    """The maximum, which drops NaN on a GPU, with the NaN of the sum beside it."""
    return tl.where(total == total, maximum, total)


@triton.jit
def full_scale(scale, scale_tensor):
    return scale if scale_tensor is None else scale * tl.load(scale_tensor)


@triton.jit(do_not_specialize=["N", "blocks"])
def similarity_extent_kernel(
    x,  # [G, N]
    out,  # [G, blocks, 2]
    N, blocks, BLOCK: tl.constexpr, LSE: tl.constexpr,
):  # fmt: skip
    g, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i = block * BLOCK + tl.arange(0, BLOCK)
    inside = i < N
    value = tl.load(x + g.to(tl.int64) * N + i, mask=inside, other=0)
    if LSE:
        inside &= value != float("-inf")
        low, high = tl.where(inside, value, float("inf")), tl.where(inside, value, float("-inf"))
        strange = inside & (value != value)  # NaN, which minimum and maximum would drop: never close to the others
        low, high = tl.where(strange, float("-inf"), low), tl.where(strange, float("inf"), high)
    else:
        low, high = tl.where(inside, value, 2**63 - 1), tl.where(inside, value, -(2**63))
    tl.store(out + 2 * tl.program_id(0), tl.min(low, 0))
    tl.store(out + 2 * tl.program_id(0) + 1, tl.max(high, 0))


def extent(x: torch.Tensor | None, block: int) -> torch.Tensor | None:
    """Lowest and highest of each block of x [.., N], [.., blocks, 2]; of log-sum-exps without the -inf."""
    if x is None:
        return None
    N, G = x.shape[-1], x.shape[:-1].numel()
    blocks = triton.cdiv(N, block)
    out = torch.empty((G, blocks, 2), dtype=x.dtype, device=x.device)
    similarity_extent_kernel[(G * blocks,)](
        x=x, out=out, N=N, blocks=blocks, BLOCK=block, LSE=x.is_floating_point(), num_warps=1
    )
    return out


@triton.jit(do_not_specialize=["N", "blocks"])
def similarity_longest_kernel(
    x,  # [G, N, D]
    out,  # [G, blocks]
    N, blocks, D: tl.constexpr, BLOCK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    g, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    squares = tl.zeros((BLOCK,), tl.float32)
    for d0 in range(0, D, BD):
        rows = load_rows(x, g.to(tl.int64) * N, block * BLOCK, d0, N, D, BLOCK, BD).to(tl.float32)
        squares += tl.sum(rows * rows, 1)
    tl.store(out + tl.program_id(0), tl.sqrt(tl.max(squares, 0)))


def longest(x: torch.Tensor, block: int) -> torch.Tensor:
    """The norm of the longest row of each block of x [.., N, D], [G, blocks]."""
    (N, D), G = x.shape[-2:], x.shape[:-2].numel()
    blocks = triton.cdiv(N, block)
    out = torch.empty((G, blocks), dtype=torch.float32, device=x.device)
    BD = min(32, max(16, triton.next_power_of_2(D)))
    similarity_longest_kernel[(G * blocks,)](x=x, out=out, N=N, blocks=blocks, D=D, BLOCK=block, BD=BD, num_warps=4)
    return out
