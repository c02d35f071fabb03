"""Sums of `backends/reference/sums.py`, with what of them has a derivative of its own."""

import torch
from torch import Tensor

from ..backends.reference.sums import ROW, each, mean, pieces, shared, total
from .logsumexp import logsumexp

__all__ = ["each", "log_total", "mean", "pieces", "times", "total"]


def log_total(x: Tensor) -> Tensor:
    """The log-sum-exp of all of x, 0-d."""
    x = x.reshape(-1)
    while shared(x):
        rows = x.numel() // ROW
        x = torch.cat((logsumexp(x[: rows * ROW].view(rows, ROW), 1), x[rows * ROW :]))
    return logsumexp(x, 0)


def times(x: Tensor, scale: float | Tensor) -> Tensor:
    """x * scale, where the gradient of a 0-d tensor is a `total`."""
    learns = isinstance(scale, Tensor) and scale.requires_grad and shared(x)
    return x * (_Spread.apply(scale, x.shape) if learns else scale)


class _Spread(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda scale, shape: scale.expand(shape))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(lambda ctx, g: (total(g), None))
