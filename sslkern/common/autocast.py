"""What autocast leaves alone: `product`, `cat` and `stack` of features in their own type.

It would round the factors of a product to 16 bits. On the CPU its `cat` and `stack` refuse fp64, and of the types of 16
bits the one that it does not take.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .node import Node

# Asked here for compiled code, which cannot ask it in torch before 2.12.
_WITH_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")))


def autocast_active(device_type: str) -> bool:
    if torch.compiler.is_compiling():
        available = device_type in _WITH_AUTOCAST
    else:
        available = torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _join(torch.cat, tensors, dim)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _join(torch.stack, tensors, dim)


def _join(function: Callable[..., Tensor], tensors: Sequence[Tensor], dim: int) -> Tensor:
    if tensors[0].dtype == torch.float32 or not autocast_active(tensors[0].device.type):
        return function(tensors, dim)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(tensors, dim)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of a [.., N, K] and b [.., K, M], in their type, and so the gradients, wherever `backward` is called."""
    return _product.way(True, a, b)(a, b)


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    if not autocast_active(a.device.type):
        return a @ b
    with torch.autocast(a.device.type, enabled=False):
        return a @ b


def _save(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    if not torch.compiler.is_compiling():
        ctx.save_for_forward(*inputs)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None]:
    a, b = ctx.saved_tensors
    da = db = None
    if ctx.needs_input_grad[0]:
        da = product(g, b.mT)
    if ctx.needs_input_grad[1]:
        db = product(a.mT, g)
    return da, db


def _jvp(ctx: Any, da: Tensor | None, db: Tensor | None) -> Tensor | None:
    a, b = ctx.saved_tensors
    parts = [product(x, y) for x, y in ((da, b), (a, db)) if x is not None and y is not None]
    return sum(parts[1:], parts[0]) if parts else None


_product = Node(_multiply, _save, _backward, name="product", jvp=_jvp)
