"""`sampled_similarity` on kernels that read the bank where it is named; the gradient of the bank on torch's own."""

import torch
from torch import Tensor

from ..reference import sampled_similarity as reference
from .launch import PIECES, THREADS, WARP, Call, at_most, teams, width

SHARE = 64  # names of a query that a team takes in the forward, as in kernels/sampled_similarity.cu
PART = 256  # and at least those that a block takes in the backward
BLOCKS = 1024  # that keep a large chip busy


def sampled_similarity_fwd(q: Tensor, bank: Tensor, index: Tensor) -> Tensor:
    G, N, M, D, K = sizes = _sizes(q, bank, index)
    if 0 in sizes:
        return reference.sampled_similarity_fwd(q, bank, index)
    reference.check_index(index, bank)
    q, bank, index = q.contiguous(), bank.contiguous(), index.contiguous()
    out = q.new_empty(index.shape, dtype=torch.float32)
    call = Call("sampled_similarity", q.device, q.dtype)
    queries = call.address("q", q, q.dtype, G * N * D)
    rows = call.address("bank", bank, q.dtype, G * M * D)
    names = call.address("index", index, torch.int64, G * N * K)
    to = call.address("out", out, torch.float32, G * N * K)
    shared = teams(D, width(q.dtype), WARP, queries, rows)
    kernel = "sampled_forward<{0}, true>" if shared.whole else "sampled_forward<{0}, false>"
    blocks = shared.blocks(G * N * ((K + SHARE - 1) // SHARE))
    call.launch(kernel, blocks, *shared, G * N, N, M, K, queries, rows, names, to)
    return out


def sampled_similarity_bwd(
    q: Tensor, bank: Tensor, index: Tensor, g: Tensor, need_q: bool, need_bank: bool
) -> tuple[Tensor | None, Tensor | None]:
    sizes = _sizes(q, bank, index)
    if 0 in sizes:
        return reference.sampled_similarity_bwd(q, bank, index, g, need_q, need_bank)
    reference.check_index(index, bank)
    dq = _gradient_of_queries(q, bank, index, g, sizes) if need_q else None
    return dq, reference.sum_by_key(q, bank, index, g) if need_bank else None


def _gradient_of_queries(q: Tensor, bank: Tensor, index: Tensor, g: Tensor, sizes: tuple[int, ...]) -> Tensor:
    G, N, M, D, K = sizes
    bank, index, g = bank.contiguous(), index.contiguous(), g.contiguous()
    dq, parts = q.new_empty(q.shape, dtype=torch.float32), _parts(G * N, D, K)
    call = Call("sampled_similarity", q.device, q.dtype)
    rows = call.address("bank", bank, q.dtype, G * M * D)
    names = call.address("index", index, torch.int64, G * N * K)
    weights = call.address("g", g, torch.float32, G * N * K)
    to = sums_to = call.address("dq", dq, torch.float32, G * N * D)
    if parts > 1:
        sums = q.new_empty((G * N, parts, D), dtype=torch.float32)
        sums_to = call.address("sums", sums, torch.float32, G * N * parts * D)
    shared = teams(D, width(q.dtype), WARP, rows)
    columns = PIECES * width(q.dtype) * shared.size  # that a block takes
    kernel = "sampled_backward<{0}, true>" if shared.whole else "sampled_backward<{0}, false>"
    blocks = at_most(G * N * parts * ((D + columns - 1) // columns))
    call.launch(kernel, blocks, *shared, G * N, N, M, K, parts, rows, names, weights, sums_to)
    if parts > 1:
        call.launch("add_parts", at_most((G * N * D + THREADS - 1) // THREADS), G * N, D, parts, sums_to, to)
    return dq


def _parts(queries: int, D: int, K: int) -> int:
    """Of how many sums a gradient is made. Depends on the problem alone, not on the chip: everywhere the same bits."""
    tasks = queries * ((D + 511) // 512)
    return min((BLOCKS + tasks - 1) // tasks, (K + PART - 1) // PART)


def _sizes(q: Tensor, bank: Tensor, index: Tensor) -> tuple[int, int, int, int, int]:
    """Groups, queries, rows of the bank, features, names."""
    return q.shape[0] if q.ndim == 3 else 1, q.shape[-2], bank.shape[-2], q.shape[-1], index.shape[-1]
