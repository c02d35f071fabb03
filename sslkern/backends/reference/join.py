"""`torch.cat` and `torch.stack` of any type inside of autocast, where torch's own refuse some on the CPU: fp64, and of
the types of 16 bits the one that autocast does not take."""

from collections.abc import Sequence

import torch
from torch import Tensor


def autocast_active(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _join(torch.cat, tensors, dim)


def stack(tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    return _join(torch.stack, tensors, dim)


def _join(function, tensors, dim):
    if tensors[0].dtype == torch.float32 or not autocast_active(tensors[0].device.type):
        return function(tensors, dim)
    with torch.autocast(tensors[0].device.type, enabled=False):
        return function(tensors, dim)
