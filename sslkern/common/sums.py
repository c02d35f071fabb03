"""In one order, what torch computes with other bits for other numbers of threads.

From SERIAL numbers on torch shares its work: the sum of all of a tensor is then one of partial sums, and where a thread
begins within a vector, functions without an exact result (softplus, sigmoid) take another way to it. Rows that are
summed by themselves, and pieces that begin where a vector does, have the same bits for any number of threads.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .autocast import cat
from .node import Node

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
        x = cat((x[: rows * ROW].view(rows, ROW).sum(1), x[rows * ROW :]))
    return x.sum()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """<a, b> of vectors, 0-d. The CPU's libraries share the work on far fewer numbers than torch's own loops do."""
    return total(a * b) if a.device.type == "cpu" and a.numel() > ROW else torch.dot(a, b)


def mean(x: Tensor) -> Tensor:
    """The mean of all of x, 0-d."""
    return total(x) / x.numel() if shared(x) else x.mean()


def log_total(x: Tensor) -> Tensor:
    """The log-sum-exp of all of x, 0-d. Where nothing is left its gradient is NaN, like that of torch."""
    if not shared(x):
        return x.reshape(-1).logsumexp(0)
    most = x.detach().amax()
    most = most.masked_fill(most.isinf(), 0)
    return total(each(torch.exp, x - most)).log() + most


def times(x: Tensor, scale: float | Tensor) -> Tensor:
    """x * scale, where the gradient of a 0-d tensor is a `total`."""
    if isinstance(scale, Tensor) and scale.requires_grad and shared(x):
        scale = _spread.way(True, scale)(scale, x.shape)
    return x * scale


_spread = Node(
    lambda scale, shape: scale.expand(shape),
    lambda ctx, inputs, output: setattr(ctx, "shape", inputs[1]),
    lambda ctx, g: (total(g), None),
    name="spread",
    jvp=lambda ctx, tangent, _: tangent.expand(ctx.shape),
)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), the loss of a row whose negatives outweigh its positive by x.

    torch's own switches to x at 20, where in fp64 the rest still counts; beyond 40 it does not, in fp32 nor fp64.
    """
    return each(_softplus, x)


_softplus = functools.partial(F.softplus, threshold=40)


def pair_loss(negative: Tensor, positive: Tensor) -> Tensor:
    """softplus(negative - positive), the loss of a row from the log-sum-exp of its negatives and its positive.

    NaN where one of them is +inf, as in cross-entropy: an overflow must not pass for a loss of 0.
    """
    gap = torch.add(negative - positive, torch.maximum(negative.detach(), positive.detach()), alpha=0)
    return softplus(gap)


def each(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), which is elementwise."""
    if not shared(x):
        return function(x)
    return cat([function(part) for part in pieces(x)]).view(x.shape)


def pieces(x: Tensor) -> list[Tensor]:
    """x, flat, cut where a vector ends, so that the share of each thread begins with one: for what is elementwise."""
    if not shared(x):
        return [x]
    x, threads = x.reshape(-1), torch.get_num_threads()
    while True:
        whole = x.numel() // (threads * _VECTORS) * (threads * _VECTORS)
        taken = min(threads, -(-whole // SERIAL))  # as many as torch takes for so many numbers
        if taken == threads:
            return [part for part in (x[:whole], x[whole:]) if part.numel() > 0]
        threads = taken


def shared(x: Tensor) -> bool:
    """Whether torch's threads share the work on x. In compiled code the compiler decides on its loops."""
    return not torch.compiler.is_compiling() and x.numel() >= SERIAL and x.device.type == "cpu"
