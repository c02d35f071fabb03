"""Features kept from earlier batches, to serve as negatives."""

import torch
from torch import Tensor, nn

from .functional._common import unit
from .ops import queue_push_


class FeatureQueue(nn.Module):
    """The queue of MoCo (https://arxiv.org/abs/1911.05722, section 3.2): the keys of the last batches, in a ring.

    Buffers have the names and shapes of MoCo's, and go with the module through `state_dict`, `.to()` and `deepcopy`:
    `queue` (dim, size), at first random unit vectors, and `queue_ptr` int64 (1,), the column to write next. The
    memory of `queue` is laid out by key, so that `queue.t()` [size, dim] costs nothing; safetensors wants it
    `.contiguous()`.

    Args:
        dim: features per key.
        size: keys kept; it need not be a multiple of the batch size.
        normalize: divide keys by their norm when they are pushed.

    Example:
        >>> memory = sslkern.FeatureQueue(dim=128, size=4096)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss = sslkern.functional.info_nce(query, key, memory.queue.t(), temperature=0.07)
        >>> memory.push(key)  # also allowed before the backward
        >>> loss.backward()
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int, size: int = 65536, normalize: bool = True):
        super().__init__()
        for name, value in (("dim", dim), ("size", size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")
        self.normalize = normalize
        self.register_buffer("queue", unit(torch.randn(size, dim)).t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Writes keys [B, dim] over the oldest; of a batch larger than the queue the last rows stay."""
        queue_push_(self.queue.t(), self.queue_ptr, unit(keys) if self.normalize else keys)

    def extra_repr(self) -> str:
        return f"dim={self.queue.shape[0]}, size={self.queue.shape[1]}, normalize={self.normalize}"
