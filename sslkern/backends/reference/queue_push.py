"""`queue_push_` in plain torch."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ...common.rows import EPS


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool) -> None:
    """Writes keys [B, D] into the ring queue [size, D] from row ptr [1] on; the last of them where B > size. With
    `normalize` divided by their norms, in fp32 (fp64), before they are rounded to the type of queue."""
    size, B = queue.shape[0], keys.shape[0]
    last = keys[-size:]
    if normalize:
        widest = torch.promote_types(torch.promote_types(keys.dtype, queue.dtype), torch.float32)
        last = F.normalize(last.to(widest), dim=1, eps=EPS)
    ptr.remainder_(size)  # first: a sum with a wild pointer could overflow
    place = torch.arange(B - last.shape[0], B, device=queue.device).add_(ptr).remainder_(size)
    queue.index_copy_(0, place, last.to(queue.dtype))
    ptr.add_(B).remainder_(size)
