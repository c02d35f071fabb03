"""What a tensor is: whether a kernel may have its memory, and in which type its sums run."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

# What comes back where an option adds to it: a tensor, or a tuple that begins with it. Type checkers accept both.
TensorOrTuple = Tensor | Any

_watchers = torch._C._len_torch_dispatch_stack
_tracing = torch._C._get_tracing_state
_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_PLAIN = Tensor, torch.nn.Parameter


def plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called with these tensors past the dispatcher, which costs as much as a small kernel.

    Not where something else than their memory says what their values are (fake tensors, DTensors and other subclasses,
    what a torch.func that is over left behind, the sign bit of `torch.imag` of a conjugate, a 0 without memory), nor
    where somebody wants to see each operator (`make_fx`, `torch.jit.trace`).
    """
    if _watchers() or _tracing() is not None:
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_neg() or x._is_zerotensor() or _wrapped(x)):
            return False
    return True


def apart(x: Tensor, written: Tensor) -> Tensor:
    """x, or a copy of it where it shares its memory with what is written while x is read.

    Asked of the memory: the same may come as two storages, by NumPy or DLPack.
    """
    a, b = x.untyped_storage(), written.untyped_storage()
    start, other = a.data_ptr(), b.data_ptr()
    return x.clone() if start < other + b.nbytes() and other < start + a.nbytes() else x


def transformed() -> bool:
    """Whether torch.func or forward mode is at work; then requires_grad does not tell what gets a derivative."""
    return not torch.compiler.is_compiling() and eagerly_transformed()


def eagerly_transformed() -> bool:
    """The same, of code that is not being compiled."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def accumulator(x: Tensor) -> torch.dtype:
    """The type that sums of x run in: fp64 of fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in that type."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def map_given(function: Callable[[Tensor], Tensor], *tensors: Tensor | None) -> list[Tensor | None]:
    """function of each tensor; None for each that is not there."""
    return [None if x is None else function(x) for x in tensors]


def zeros_needed(dtype: torch.dtype, *results: tuple[bool, Tensor | None]) -> list[Tensor | None]:
    """Of each (needed, like) zeros of its shape in that type; None where they are not needed."""
    return [torch.zeros_like(like, dtype=dtype) if needed and like is not None else None for needed, like in results]


def needed(needs: Sequence[bool], *tensors: Tensor | None) -> list[Tensor | None]:
    """Each tensor that is needed; None for the others."""
    return [x if need else None for need, x in zip(needs, tensors, strict=True)]
