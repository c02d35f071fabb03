"""`torch.cat` and `torch.stack` of any type inside of autocast, where torch's own refuse some on the CPU: fp64, and of
the types of 16 bits the one that autocast does not take."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Asked here for compiled code, which cannot ask it in torch before 2.12.
_WITH_AUTOCAST = tuple(filter(torch.amp.is_autocast_available, ("cpu", "cuda", "xpu", "mps", "mtia", "hpu", "xla")))


def autocast_active(device_type: str) -> bool:
    compiling = torch.compiler.is_compiling()
    available = device_type in _WITH_AUTOCAST if compiling else torch.amp.is_autocast_available(device_type)
    return available and torch.is_autocast_enabled(device_type)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _join(torch.cat, tensors, dim)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _join(torch.stack, tensors, dim)


def _join(function, tensors, dim):
    if tensors[0].dtype == torch.float32 or not autocast_active(tensors[0].device.type):
        return function(tensors, dim)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(tensors, dim)
