"""`product`: a matrix product that autocast leaves alone, forward and backward."""

import torch
from torch import Tensor

from ..backends.reference.join import autocast_active
from ._library import transformed


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of a [.., N, K] and b [.., K, M], in their type.

    Autocast would round both to 16 bits, and the gradients too if `backward` is called inside of it. A loss that needs
    a product of torch's takes this one.
    """
    return (_Transformed if transformed() else _Product).apply(a, b)


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a, b):
        if not autocast_active(a.device.type):
            return a @ b
        with torch.autocast(a.device.type, enabled=False):
            return a @ b

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, g):
        a, b = ctx.saved_tensors
        da = product(g, b.mT) if ctx.needs_input_grad[0] else None
        db = product(a.mT, g) if ctx.needs_input_grad[1] else None
        return da, db


class _Transformed(_Product):
    """With a derivative in forward mode, which the compiler does not trace."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def jvp(ctx, da, db):
        a, b = ctx.saved_tensors
        parts = [product(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
        return sum(parts) if parts else None
