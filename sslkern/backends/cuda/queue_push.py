"""`queue_push_` in one kernel."""

import torch
from torch import Tensor

from sslkern.backends import cuda

from ..reference.queue_push import queue_push_ as reference


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool) -> None:
    if not queue.is_contiguous() or keys.dtype not in cuda.CODES:
        return reference(queue, ptr, keys, normalize)
    codes, sizes = (cuda.CODES[queue.dtype], cuda.CODES[keys.dtype]), (*queue.shape, keys.shape[0])
    cuda._cuda.queue_push_(*codes, *sizes, queue, ptr, keys.contiguous(), normalize, *cuda.place(queue))
    if not queue.is_inference():  # the native write is invisible to autograd otherwise
        torch.autograd.graph.increment_version((queue, ptr))
