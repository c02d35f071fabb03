"""`queue_push_` in one kernel."""

import torch
from torch import Tensor

from ..reference.queue_push import queue_push_ as reference
from . import NAMES
from .launch import THREADS, Call, teams, width

MOST_BLOCKS = 1 << 12  # that kernels/queue_push.cu counts


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool) -> None:
    if not queue.is_contiguous() or keys.dtype not in NAMES:
        return reference(queue, ptr, keys, normalize)
    keys, types = keys.contiguous(), (queue.dtype, keys.dtype)
    (size, D), B = queue.shape, keys.shape[0]
    rows = min(B, size)
    call = Call("queue_push", queue.device, *types)
    to = call.address("queue", queue, queue.dtype, size * D)
    at = call.address("ptr", ptr, torch.int64, 1)
    source = call.address("keys", keys, keys.dtype, B * D)
    shared = teams(D, width(*types), THREADS, to, source)
    blocks = min(shared.blocks(rows), MOST_BLOCKS)
    call.launch("push<{0}, {1}>", blocks, *shared, size, B - rows, rows, to, at, source, normalize)
    if not queue.is_inference():  # the kernel's write is invisible to autograd otherwise
        torch.autograd.graph.increment_version((queue, ptr))
