"""When a stand-in stores all similarities: of few, which is quicker, and, with a warning, where it has to."""

import warnings
import weakref
from types import FunctionType

import torch
from torch import Tensor

_said: weakref.WeakKeyDictionary[object, set[str]] = weakref.WeakKeyDictionary()


def few(features: Tensor, products: int, most: int) -> bool:
    """Whether a loss of so many products is one of few, as was measured on a CPU; compiled code has none."""
    return features.device.type == "cpu" and products <= most and not torch.compiler.is_compiling()


def warn_once(loss: object, reason: str) -> None:
    """Says once for each loss and reason that all similarities are stored. Compiled code says nothing.

    loss: an object, or a function.
    reason: what was asked for, and what to change, "weight_fn may use all features; leave it out or take DCLWLoss".
    """
    if torch.compiler.is_compiling() or reason in (said := _said.setdefault(loss, set())):
        return
    said.add(reason)
    named = loss if isinstance(loss, FunctionType) else type(loss)
    name = f"{named.__module__}.{named.__qualname__}"
    warnings.warn(f"{name} takes the dense path, which stores all similarities: {reason}", stacklevel=2)
