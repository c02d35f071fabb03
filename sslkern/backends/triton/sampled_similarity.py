"""`sampled_similarity`: rows of the bank are read where they are named; `[N, K, D]` is never there.

Floor: N K rows of the bank read once, forward and backward each.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import sampled_similarity as reference
from . import chips
from .rows import aligned, load, row_of, tile


@triton.jit(do_not_specialize=["N", "M", "K", "blocks"], debug=True)
def sampled_similarity_fwd_kernel(
    q,  # [G, N, D]
    bank,  # [G, M, D]
    index,  # int64 [G, N, K]
    out,  # fp32 [G, N, K]
    N, M, K, blocks, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """out[n, t] = <q_n, bank[index_nt]>; n runs through the groups of N rows, each of which has M rows of the bank."""
    n, t = tl.program_id(0) // blocks, tl.program_id(0) % blocks * R + tl.arange(0, R)
    row, inside = row_of(index + n.to(tl.int64) * K, t, t < K, M)
    row += (n // N).to(tl.int64) * M
    only = tl.zeros((1,), tl.int32) + n
    total = tl.zeros((R,), tl.float32)
    for d0 in range(0, D, BD):
        total += tl.sum(load(q, only, d0, only >= 0, D, BD) * load(bank, row, d0, inside, D, BD), 1)
    tl.store(out + n.to(tl.int64) * K + t, total, mask=inside)


@triton.jit(do_not_specialize=["N", "M", "K", "names", "rows"], debug=True)
def sampled_similarity_bwd_kernel(
    bank,  # [G, M, D]
    index,  # int64 [G, N, K]
    g,  # fp32 [G, N, K]
    dq,  # fp32 [splits, G, N, D]
    N, M, K, names, rows, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """dq[s, n] = sum of g_nt bank[index_nt] over split s, `names` of them, of the K; for a part of the features."""
    n, split, d0 = tl.program_id(0), tl.program_id(1), tl.program_id(2) * BD
    total = tl.zeros((R, BD), tl.float32)
    for t0 in range(split * names, tl.minimum((split + 1) * names, K), R):
        t = t0 + tl.arange(0, R)
        row, inside = row_of(index + n.to(tl.int64) * K, t, t < tl.minimum((split + 1) * names, K), M)
        row += (n // N).to(tl.int64) * M
        weight = tl.load(g + n.to(tl.int64) * K + t, mask=inside, other=0.0)
        total += weight[:, None] * load(bank, row, d0, inside, D, BD)
    d = d0 + tl.arange(0, BD)
    tl.store(dq + (split.to(tl.int64) * rows + n) * D + d, tl.sum(total, 0), mask=d < D)


def sampled_similarity_fwd(q: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    reference.check_index(index, bank)
    if q.numel() == 0 or bank.numel() == 0 or index.numel() == 0:
        return reference.sampled_similarity_fwd(q, bank, index)
    *_, N, D = q.shape
    M, K, sizes = bank.shape[-2], index.shape[-1], tile(D)
    out = torch.empty(index.shape, dtype=torch.float32, device=q.device)
    blocks = triton.cdiv(K, sizes["R"])
    with chips.on(q.device):
        sampled_similarity_fwd_kernel[(q.shape[:-1].numel() * blocks,)](
            q=aligned(q), bank=aligned(bank), index=index.contiguous(), out=out, N=N, M=M, K=K, blocks=blocks,
            sanitize_overflow=False, **sizes,
            num_warps=4 if D % sizes["BD"] == 0 else 8,  # masks take registers
        )  # fmt: skip
    return out


def sampled_similarity_bwd(
    q: Tensor, bank: Tensor, index: Tensor, g: Tensor, need_q: bool, need_bank: bool
) -> tuple[Tensor | None, Tensor | None]:
    reference.check_index(index, bank)
    if q.numel() == 0 or bank.numel() == 0 or index.numel() == 0:
        return reference.sampled_similarity_bwd(q, bank, index, g, need_q, need_bank)
    dq = None
    if need_q:
        *_, N, D = q.shape
        M, K, sizes, rows = bank.shape[-2], index.shape[-1], tile(D), q.shape[:-1].numel()
        chunks = triton.cdiv(D, sizes["BD"])
        blocks = triton.cdiv(K, sizes["R"])
        splits = min(blocks, triton.cdiv(8 * chips.of(q.device).processors, rows * chunks))  # they fill the chip
        names = triton.cdiv(blocks, splits) * sizes["R"]
        splits = triton.cdiv(K, names)
        part = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
        with chips.on(q.device):
            sampled_similarity_bwd_kernel[(rows, splits, chunks)](
                bank=aligned(bank), index=index.contiguous(), g=g.contiguous(), dq=part,
                N=N, M=M, K=K, names=names, rows=rows,
                sanitize_overflow=False, **sizes,
            )  # fmt: skip
        dq = part[0] if splits == 1 else part.sum(0)
    return dq, reference.sum_by_key(q, bank, index, g) if need_bank else None
