"""Whether a kernel may have a tensor's memory: where it has plain memory of its own, which nobody writes meanwhile."""

import torch
from torch import Tensor

_watchers = torch._C._len_torch_dispatch_stack
_PLAIN = Tensor, torch.nn.Parameter


def plain(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called with these tensors past the dispatcher, which costs as much as a small kernel.

    Not where something else than their memory says what their values are (fake tensors, DTensors and other subclasses,
    the sign bit of `torch.imag` of a conjugate), nor where somebody wants to see each operator (`make_fx`).
    """
    if _watchers():
        return False
    for x in tensors:
        if x is not None and (type(x) not in _PLAIN or x.is_neg()):
            return False
    return True


def apart(x: Tensor, written: Tensor) -> Tensor:
    """x, or a copy of it where it shares its memory with what is written while x is read.

    Asked of the memory: the same may come as two storages, by NumPy or DLPack.
    """
    a, b = x.untyped_storage(), written.untyped_storage()
    start, other = a.data_ptr(), b.data_ptr()
    return x.clone() if start < other + b.nbytes() and other < start + a.nbytes() else x
