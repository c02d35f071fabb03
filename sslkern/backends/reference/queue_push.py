"""`queue_push_` in plain torch."""

import torch
from torch import Tensor


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor) -> None:
    """Writes keys [B, D] into the ring queue [size, D] from row ptr [1] on; the last of them where B > size."""
    size, B = queue.shape[0], keys.shape[0]
    kept = keys[-size:]
    place = torch.arange(B - kept.shape[0], B, device=queue.device).add_(ptr).remainder_(size)
    queue.index_copy_(0, place, kept.to(queue.dtype))
    ptr.add_(B).remainder_(size)
