"""`queue_push_`: write a batch of keys into a ring buffer, the queue of MoCo (https://arxiv.org/abs/1911.05722)."""

import torch
from torch import Tensor

from ..backends import load, resolve
from ..common.arguments import FLOATS, check_dense, check_devices, check_flags, check_written, describe
from ..common.node import Operator
from ..common.tensors import apart


def queue_push_(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool = False) -> None:
    """Writes keys over the oldest rows of the ring, in place, and advances the pointer. No host synchronisation.

    Row i of keys goes to row (ptr + i) mod size; of a batch larger than the ring the last `size` rows stay.

    Args:
        queue: [size, D], fp32, bf16, fp16 or fp64, overwritten.
        ptr: int64 [1], the row to write next, updated.
        keys: [B, D] of any B, floating point; detached and cast to the type of queue.
        normalize: divide each row of keys by its norm, which is computed in fp32 (fp64), before it is cast: it is
            rounded once, whatever the types. Rows shorter than 1e-12 are divided by that.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> queue, ptr = torch.zeros(4, 2), torch.zeros(1, dtype=torch.long)
        >>> sslkern.ops.queue_push_(queue, ptr, torch.ones(3, 2))
        >>> ptr
        tensor([3])
    """
    check_push(queue, ptr, keys, normalize)
    _write.registered(queue, ptr, keys.detach(), normalize, resolve("queue_push", queue, other=keys.dtype))


def check_push(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool) -> None:
    """The arguments of `queue_push_`."""
    for name, x in (("queue", queue), ("ptr", ptr), ("keys", keys)):
        check_dense(name, x)
    if not isinstance(queue, Tensor) or queue.ndim != 2 or queue.shape[0] == 0 or queue.dtype not in FLOATS:
        raise ValueError(
            "queue must be a tensor [size, D] of fp32, bf16, fp16 or fp64 with size > 0; pass a (D, size) one as .t()"
        )
    check_written("queue", queue)
    if not isinstance(ptr, Tensor) or ptr.shape != (1,) or ptr.dtype != torch.int64:
        raise ValueError("ptr must be an int64 tensor [1]")
    if not isinstance(keys, Tensor) or keys.ndim != 2 or keys.shape[1] != queue.shape[1]:
        raise ValueError(
            f"keys must be a tensor [B, {queue.shape[1]}] to go with queue {list(queue.shape)}, not {describe(keys)}"
        )
    if keys.dtype not in FLOATS:
        raise TypeError(f"keys must be floating point, not {keys.dtype}; convert it with .float()")
    check_devices("queue", queue, ptr=ptr, keys=keys)
    check_flags(normalize=normalize)


def _written(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool, backend: str) -> None:
    load(backend, "queue_push").queue_push_(queue, ptr, apart(keys, queue), normalize)


def _fake(queue: Tensor, ptr: Tensor, keys: Tensor, normalize: bool, backend: str) -> None:
    return None


_write = Operator(
    "queue_push_(Tensor(a!) queue, Tensor(b!) ptr, Tensor keys, bool normalize, str backend) -> ()",
    _written,
    _fake,
)
