"""A device that is not there: tensors made while it is entered count as its own, and whoever mixes them with others
fails.

The values are the CPU's; only what `x.device` says is pretended. So a test that leaves an argument on the CPU beside
features from another device fails on a machine without a GPU as it would on one with it, in the checks of the library
or in the operators of torch.
"""

import torch
from torch import Tensor
from torch._C import _functorch as _C
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._device import DeviceContext, _device_constructors

DEVICE = torch.device("xpu", 0)  # a kind that no kernel is for
_CPU = torch.device("cpu")
_DEVICE_OF = Tensor.device.__get__
# What takes tensors of two devices on a real one as well; and gradients, which the graph takes where it wants them.
_MIXES = {Tensor.copy_, Tensor.to, Tensor.__getitem__, Tensor.__setitem__, torch.autograd.grad}
_ON_CPU_ONLY = {Tensor.numpy, Tensor.__array__}
# Asked all the time, and the same everywhere.
_PROPERTIES = {
    getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad", "is_leaf", "layout")
}
_PROPERTIES |= {
    Tensor.size,
    Tensor.dim,
    Tensor.numel,
    Tensor.stride,
    Tensor.data_ptr,
    Tensor.is_contiguous,
    Tensor.item,
}


class Elsewhere(DeviceContext):
    """`with Elsewhere():` is `torch.set_default_device` of the pretended device."""

    # What is there, by storage, which views share; what a cache holds stays there.
    _born: dict[int, StorageWeakRef] = {}

    def __init__(self):
        super().__init__(DEVICE)

    def __enter__(self):
        for key in [key for key, reference in self._born.items() if reference.expired()]:
            del self._born[key]
        return super().__enter__()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _PROPERTIES:
            return func(*args, **kwargs)
        if func == _DEVICE_OF:
            return DEVICE if self._here(args[0]) else func(*args)
        here, away = False, None
        for x in _tensors((args, kwargs)):
            if self._here(x):
                here = True
            elif x.ndim and x.device.type == "cpu":
                away = x
        if here and func in _ON_CPU_ONLY:
            raise TypeError(f"{func.__name__} of a tensor on {DEVICE}: copy it to the CPU first")
        if here and away is not None and func not in _MIXES:
            raise RuntimeError(f"{func} of tensors on {DEVICE} and the CPU, {list(away.shape)}")
        makes = func in _device_constructors()
        to = self._destination(func, args, kwargs, here, makes)
        if makes and to == DEVICE:
            if kwargs.get("generator") is not None:
                raise RuntimeError(f"{func} on {DEVICE} with a generator of the CPU")
            kwargs = kwargs | {"device": _CPU}
        args = [_CPU if _is_device(x) else x for x in args]
        kwargs = {name: _CPU if _is_device(x) else x for name, x in kwargs.items()}
        out = func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu) and here != (to == DEVICE):
            out = out.clone()  # a copy, as it would be
        if to == DEVICE:
            for x in _tensors(out):
                self._keep(x)
        return out

    def _destination(self, func, args, kwargs, here: bool, makes: bool) -> torch.device:
        """Where the result is."""
        if func is Tensor.cpu:
            return _CPU
        device = kwargs.get("device")
        if func is Tensor.to:
            for x in args[1:]:
                if isinstance(x, (str, torch.device)):
                    device = x
                elif isinstance(x, Tensor):
                    device = DEVICE if self._here(x) else x.device
        if device is not None:
            return torch.device(device)
        return DEVICE if here or makes else _CPU

    def _here(self, x: Tensor) -> bool:
        storage = _storage(x)
        return storage is not None and storage._cdata in self._born

    def _keep(self, x: Tensor) -> None:
        storage = _storage(x)
        if storage is not None and storage._cdata not in self._born:
            self._born[storage._cdata] = StorageWeakRef(storage)  # as long as it is kept, the number is no other's


def _is_device(x) -> bool:
    return isinstance(x, torch.device) and x == DEVICE


def _tensors(x) -> list[Tensor]:
    if isinstance(x, Tensor):
        return [x]
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, (tuple, list)):
        return []
    return [tensor for y in x for tensor in _tensors(y)]


def _storage(x: Tensor):
    while _C.is_functorch_wrapped_tensor(x):
        x = _C.get_unwrapped(x)
    try:
        return x.untyped_storage() if x.device.type == "cpu" else None
    except (NotImplementedError, RuntimeError):
        return None  # a tensor of its own kind, without memory
