"""`similarity_lse` the other way: products of the vendor's library, some rows of S at a time, and kernels on them.

The library multiplies faster than kernels that also take exponentials, at the price of writing and reading S, some 14
bytes for each score. That pays where a score costs many flop: many features, or fp32 without matrix units. The backward
takes both gradients from one S: 4 passes for two-way losses, where the fused kernels take 5. `strategies.py` chooses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import INF, Side, allocator, counts, exp, finite_shift, full_scale, load_vector, scores

CHUNK = 2**25  # scores held at a time
BM, BN = tl.constexpr(16), tl.constexpr(256)  # of them, what a program looks at


@triton.jit
def _tile(
    s, q_side, k_side, scale, first, i, j, stop, N, M, ITSELF: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    """The dot products of rows i, of the chunk [first, stop), with columns j; and their scores, -inf if left out."""
    inside = (i < stop)[:, None] & (j < M)[None, :]
    dots = tl.load(s + (i - first).to(tl.int64)[:, None] * M + j[None, :], mask=inside, other=0.0)
    bias, limit = None, None
    if k_side.bias is not None:
        bias = load_vector(k_side.bias, 0, j, M, 0.0)[None, :]
    score = scores(dots, scale, bias, limit)
    keep = counts(q_side, k_side, 0, 0, i, j, N, M, ITSELF, False, SAME) & inside
    return dots, tl.where(keep, score, -INF)


@triton.jit(do_not_specialize=["first", "stop", "N", "M"])
def _rows(
    s, q_side, k_side, scale_tensor, scale, row, best, first, stop, N, M, ITSELF: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    """The log-sum-exps of the rows of a chunk."""
    i = first + tl.program_id(0) * BM + tl.arange(0, BM)
    scale = full_scale(scale, scale_tensor)
    top, total = tl.full((BM,), -INF, tl.float32), tl.zeros((BM,), tl.float32)
    for j0 in range(0, M, BN):
        _, score = _tile(s, q_side, k_side, scale, first, i, j0 + tl.arange(0, BN), stop, N, M, ITSELF, SAME)
        new = tl.maximum(top, tl.max(score, 1))
        shift = finite_shift(new)
        total = total * exp(top - shift) + tl.sum(exp(score - shift[:, None]), 1)
        top = new
    tl.store(row + i, finite_shift(top) + tl.log(total), mask=i < stop)
    if best is not None:
        tl.store(best + i, top, mask=i < stop)


@triton.jit(do_not_specialize=["first", "stop", "N", "M"])
def _columns(
    s, q_side, k_side, scale_tensor, scale, col, best, first, stop, N, M, SAME: tl.constexpr
):  # fmt: skip
    """Takes the rows of a chunk into the log-sum-exps of the columns."""
    j = tl.program_id(0) * BN + tl.arange(0, BN)
    scale = full_scale(scale, scale_tensor)
    # one sum for each of the BM rows that a program reads together, merged at the end
    top = tl.full((BM, BN), -INF, tl.float32)
    total = tl.zeros((BM, BN), tl.float32)
    for i0 in range(first, stop, BM):
        _, score = _tile(s, q_side, k_side, scale, first, i0 + tl.arange(0, BM), j, stop, N, M, False, SAME)
        new = tl.maximum(top, score)
        shift = finite_shift(new)
        total = total * exp(top - shift) + exp(score - shift)
        top = new
    old = tl.load(col + j, mask=j < M, other=-INF)
    here = tl.max(top, 0)
    shift = finite_shift(tl.maximum(old, here))
    sums = exp(old - shift) + tl.sum(total * exp(top - shift[None, :]), 0)
    tl.store(col + j, shift + tl.log(sums), mask=j < M)
    if best is not None:
        old = tl.load(best + j, mask=j < M, other=-INF)
        tl.store(best + j, tl.maximum(old, here), mask=j < M)


@triton.jit(do_not_specialize=["first", "stop", "N", "M"])
def _weights(
    s, w, q_side, k_side, scale_tensor, scale, fold, dscale, first, stop, N, M, ITSELF: tl.constexpr, SAME: tl.constexpr
):  # fmt: skip
    """w_ij = g_i exp(s_ij - lse_i) + h_j exp(s_ij - lse_j) of a chunk, in the type of the features."""
    i, j = first + tl.program_id(1) * BM + tl.arange(0, BM), tl.program_id(0) * BN + tl.arange(0, BN)
    scale = full_scale(scale, scale_tensor)
    dots, score = _tile(s, q_side, k_side, scale, first, i, j, stop, N, M, ITSELF, SAME)
    weight = tl.zeros((BM, BN), tl.float32)
    if q_side.grad is not None:
        lse = load_vector(q_side.lse, 0, i, N, -INF)
        grad = tl.where(lse == -INF, 0.0, load_vector(q_side.grad, 0, i, N, 0.0))
        weight += grad[:, None] * exp(score - finite_shift(lse)[:, None])
    if k_side.grad is not None:
        lse = load_vector(k_side.lse, 0, j, M, -INF)
        grad = tl.where(lse == -INF, 0.0, load_vector(k_side.grad, 0, j, M, 0.0))
        weight += grad[None, :] * exp(score - finite_shift(lse)[None, :])
    if dscale is not None:
        tl.store(dscale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(weight * dots))
    if fold is not None:
        weight *= tl.load(fold)
    inside = (i < stop)[:, None] & (j < M)[None, :]
    tl.store(w + (i - first).to(tl.int64)[:, None] * M + j[None, :], weight.to(w.dtype.element_ty), mask=inside)


def forward(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, columns: bool, best: bool):
    """row [N], col [M] or None, and the largest scores of both, or None."""
    N, M, itself, keys = q.shape[0], (q if k is None else k).shape[0], k is None, q if k is None else k
    sides = Side(q_ids), Side(q_ids if itself else k_ids, bias=k_bias)
    new = allocator(q)
    row, row_best = new(N), new(N) if best else None
    col, col_best = (new(M).fill_(-torch.inf) if wanted else None for wanted in (columns, columns and best))
    for first, stop, s in _chunks(q, keys):
        problem = s, *sides, scale_tensor, scale
        rows = triton.cdiv(stop - first, BM.value)
        _rows[(rows,)](*problem, row, row_best, first, stop, N, M, ITSELF=itself, SAME=same, num_warps=8)
        if columns:
            _columns[(triton.cdiv(M, BN.value),)](*problem, col, col_best, first, stop, N, M, SAME=same, num_warps=8)
    return row, col, row_best, col_best


def frozen(q, k, scale_tensor, scale, q_ids, k_ids, same, k_bias, best: bool):
    """row [N], mean [N, D] = sum_j softmax_ij k_j, best [N] or None."""
    N, M = q.shape[0], k.shape[0]
    new = allocator(q)
    row, top, mean = new(N), new(N) if best else None, torch.empty_like(q, dtype=torch.float32)
    # Weights of long queues would vanish in fp16.
    fold = torch.full((), 2.0**14, device=q.device) if q.dtype == torch.float16 else None
    one, sides = torch.ones_like(row), (Side(q_ids), Side(k_ids, bias=k_bias))
    for first, stop, s in _chunks(q, k):
        rows, w = triton.cdiv(stop - first, BM.value), torch.empty_like(s, dtype=q.dtype)
        _rows[(rows,)](
            s, *sides, scale_tensor, scale, row, top, first, stop, N, M, ITSELF=False, SAME=same, num_warps=8
        )
        weighed = sides[0]._replace(lse=row, grad=one), sides[1]
        grid = triton.cdiv(M, BN.value), rows
        _weights[grid](
            s, w, *weighed, scale_tensor, scale, fold, None, first, stop, N, M, ITSELF=False, SAME=same, num_warps=8
        )
        mean[first:stop] = product(w, k)
    return row, mean if fold is None else mean.div_(fold), top


def backward(q, k, row, col, g, h, scale_tensor, scale, q_ids, k_ids, same, k_bias, fold, need_q, need_k, need_scale):
    """dq [N, D], dk [M, D] or None of k=None, dscale 0-d; None where not needed."""
    N, M, itself, keys = q.shape[0], (q if k is None else k).shape[0], k is None, q if k is None else k
    if itself:
        q_side = k_side = Side(q_ids, bias=k_bias, lse=row, grad=g)
    else:
        q_side, k_side = Side(q_ids, lse=row, grad=g), Side(k_ids, bias=k_bias, lse=col, grad=h)
    dq = torch.empty_like(q, dtype=torch.float32) if need_q else None
    dk = torch.zeros_like(keys, dtype=torch.float32) if need_k and not itself else None
    dscale = q.new_zeros((), dtype=torch.float32) if need_scale else None
    for first, stop, s in _chunks(q, keys):
        grid = triton.cdiv(M, BN.value), triton.cdiv(stop - first, BM.value)
        w, part = torch.empty_like(s, dtype=q.dtype), allocator(q)(*grid) if need_scale else None
        _weights[grid](
            s, w, q_side, k_side, scale_tensor, scale, fold, part, first, stop, N, M,
            ITSELF=itself, SAME=same, num_warps=8,
        )  # fmt: skip
        if need_q:
            dq[first:stop] = product(w, keys)
        if dk is not None:
            dk += product(w.t(), q[first:stop])
        if need_scale:
            dscale += part.sum()
    full = scale if scale_tensor is None else scale * scale_tensor
    full = full if fold is None else full / fold
    dq, dk = (None if x is None else x.mul_(full) for x in (dq, dk))
    return dq, dk, dscale / 2 if need_scale and itself else dscale  # there w_ij came as such and as w_ji


def _chunks(q: Tensor, keys: Tensor):
    """(first, stop, S without its scale [stop - first, M] in fp32), the rows evenly cut."""
    N, M = q.shape[0], keys.shape[0]
    parts = triton.cdiv(N * M, CHUNK)
    step = triton.cdiv(triton.cdiv(N, parts), 16) * 16
    for first in range(0, N, step):
        stop = min(first + step, N)
        yield first, stop, product(q[first:stop], keys.t())


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in fp32; into a tensor that is there, which autocast leaves alone."""
    if a.dtype != torch.float32 and a.device.type == "cuda" and _KEEPS_SUMS:
        return torch.mm(a, b, out_dtype=torch.float32)
    out = torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=a.device)
    return torch.mm(a.float(), b.float(), out=out)


_KEEPS_SUMS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 8)  # mm takes out_dtype
