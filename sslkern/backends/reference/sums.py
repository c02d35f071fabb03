"""What torch computes with other bits for other numbers of threads, in one order.

From SERIAL numbers on torch shares its work: the sum of all of a tensor is then one of partial sums, and where a thread
begins within a vector, functions without an exact result (softplus, sigmoid) take another way to it. Rows that are
summed by themselves, and pieces that begin where a vector does, have the same bits for any number of threads.
"""

from collections.abc import Callable

import torch
from torch import Tensor

SERIAL = 2**15  # at::internal::GRAIN_SIZE
ROW = 2**10
_VECTORS = 64  # a multiple of what one step of a vectorized loop takes


def total(x: Tensor) -> Tensor:
    """The sum of all of x, 0-d."""
    if not shared(x):
        return x.sum()
    x = x.reshape(-1)
    while x.numel() >= SERIAL:
        rows = x.numel() // ROW
        x = torch.cat((x[: rows * ROW].view(rows, ROW).sum(1), x[rows * ROW :]))
    return x.sum()


def mean(x: Tensor) -> Tensor:
    """The mean of all of x, 0-d."""
    return total(x) / x.numel() if shared(x) else x.mean()


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which is elementwise."""
    if not shared(x):
        return function(x)
    return torch.cat([function(part) for part in pieces(x)]).view(x.shape)


def pieces(x: Tensor) -> list[Tensor]:
    """x, flat, cut where a vector ends, so that the share of each thread begins with one: for what is elementwise."""
    if not shared(x):
        return [x]
    x, threads = x.reshape(-1), torch.get_num_threads()
    while True:
        whole = x.numel() // (threads * _VECTORS) * (threads * _VECTORS)
        taken = min(threads, -(-whole // SERIAL))  # as many as torch takes for so many numbers
        if taken == threads:
            return [x[:whole], x[whole:]] if whole < x.numel() else [x]
        threads = taken


def shared(x: Tensor) -> bool:
    """Whether torch's threads share the work on x. In compiled code the compiler decides on its loops."""
    return not torch.compiler.is_compiling() and x.device.type == "cpu" and x.numel() >= SERIAL
