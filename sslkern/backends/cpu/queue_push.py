"""`queue_push_` on the native kernel."""

import torch
from torch import Tensor

from sslkern import _cpu

from ..reference.queue_push import queue_push_ as reference
from ._native import CODES


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool) -> None:
    if not queue.is_contiguous() or keys.dtype not in CODES:
        return reference(queue, ptr, keys, normalize)
    codes, sizes = (CODES[queue.dtype], CODES[keys.dtype]), (*queue.shape, keys.shape[0])
    _cpu.queue_push_(*codes, *sizes, queue, ptr, keys.contiguous(), normalize, torch.get_num_threads())
    if not queue.is_inference():  # the native write is invisible to autograd otherwise
        torch.autograd.graph.increment_version((queue, ptr))
