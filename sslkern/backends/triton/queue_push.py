"""`queue_push_` in one kernel.

Floor: the keys that stay read once, their rows of the ring written once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.queue_push import queue_push_ as reference
from . import DTYPES, chips
from .rows import aligned, length, load, store, tile


@triton.jit(do_not_specialize=["size", "B"])
def queue_push_kernel(
    queue,  # [size, D]
    ptr,  # int64 []
    keys,  # [B, D]
    size, B, D: tl.constexpr, R: tl.constexpr, BD: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """The pointer is read by all programs before the last of them moves it. Which one is the last they find out by
    taking tickets, counted above bit 40 of the pointer itself: nothing else is to be kept or cleared."""
    TICKET: tl.constexpr = 2**40
    word = tl.load(ptr)
    start = word - ((word + TICKET // 2) >> 40) * TICKET
    start = (start % size + size) % size  # a wild pointer stays inside the ring
    i = tl.maximum(B - size, 0) + tl.program_id(0) * R + tl.arange(0, R)
    inside, row = i < B, (start + i) % size
    if NORMALIZE:
        squares = tl.zeros((R,), tl.float32)
        for d0 in range(0, D, BD):
            x = load(keys, i, d0, inside, D, BD)
            squares += tl.sum(x * x, 1)
        norm = length(squares)[:, None]
    for d0 in range(0, D, BD):
        x = load(keys, i, d0, inside, D, BD)
        if NORMALIZE:
            x = tl.div_rn(x, norm)
        store(queue, row, d0, inside, x, D, BD)

    tl.debug_barrier()  # all threads have read the pointer
    taken = (tl.atomic_add(ptr, TICKET) + TICKET // 2) >> 40
    tl.store(ptr, (start + B) % size, mask=taken == tl.num_programs(0) - 1)


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool) -> None:
    if not queue.is_contiguous() or keys.dtype not in DTYPES:
        return reference(queue, ptr, keys, normalize)
    (size, D), B = queue.shape, keys.shape[0]
    sizes = tile(D)
    programs = triton.cdiv(min(B, size), sizes["R"])
    with chips.on(queue.device):
        queue_push_kernel[(programs,)](
            queue=queue, ptr=ptr, keys=aligned(keys), size=size, B=B, NORMALIZE=normalize, **sizes
        )
    if not queue.is_inference():  # autograd does not see what kernels write
        torch.autograd.graph.increment_version((queue, ptr))
