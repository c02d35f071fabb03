"""What is asked of the arguments of every call, besides their numbers."""

from typing import Any

import torch
from torch import Tensor

from .numbers import shown

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def describe(x: object) -> str:
    """What x is, and which part of it may have been meant, for an error message."""
    if isinstance(x, Tensor):
        return f"a tensor {list(x.shape)}"
    inside = [f".{name}{'.t()' if name == 'queue' else ''}" for name in ("queue", "bank") if hasattr(x, name)]
    return f"a {type(x).__name__}" + "".join(f"; pass its {what}" for what in inside)


def check_dense(name: str, x: Any) -> None:
    """x, if it is a tensor, is a dense one: asked before its shape, which others may not have."""
    if not isinstance(x, Tensor):
        return
    if x.layout is not torch.strided:
        raise TypeError(f"{name} must be a dense tensor, not of layout {x.layout}; convert it with .to_dense()")
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, not nested; convert it with .to_padded_tensor(0.0)")


def check_device(name: str, x: Tensor, like: Tensor, those: str = "the features are") -> None:
    """x is on the device of `like`; `those`: what these are, for the message."""
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device} but {those} on {like.device}; move one of them")


def check_devices(name: str, like: Tensor, **others: Tensor | float | None) -> None:
    """All tensors among the others are on the device of `like`, which is called `name`."""
    device = like.device
    for other, x in others.items():
        if isinstance(x, Tensor) and x.device != device:
            check_device(other, x, like, f"{name} is")


def check_own_memory(name: str, x: Tensor) -> None:
    """Each element of x, which is written to, has a place of its own, and is what stands there."""
    if any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True)):
        raise ValueError(f"{name} must not be expanded, as it is written to; pass {name}.clone()")
    if not torch.compiler.is_compiling() and x.is_neg():
        raise ValueError(f"{name} must not be a view with a sign bit, as it is written to; pass {name}.resolve_neg()")


def check_written(name: str, x: Tensor) -> None:
    """x, which is dense, is written to: it is without a gradient, and each element has a place of its own."""
    if x.requires_grad:
        raise ValueError(f"{name} gets no gradient; make it a buffer or pass {name}.detach()")
    check_own_memory(name, x)


def check_flags(**flags: bool) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {shown(value)}")


def check_choice(name: str, value: str, *choices: str) -> None:
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, not {shown(value)}")
