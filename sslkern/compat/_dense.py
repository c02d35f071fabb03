"""The one warning of a loss that cannot take the fused path."""

import warnings
import weakref

import torch
from torch import nn

_said: weakref.WeakKeyDictionary[nn.Module, set[str]] = weakref.WeakKeyDictionary()


def warn_once(loss: nn.Module, reason: str) -> None:
    """Says once for each loss and reason that all similarities are stored. Compiled code says nothing.

    reason: what was asked for, and what to change, "weight_fn may use all features; leave it out or take DCLWLoss".
    """
    if torch.compiler.is_compiling() or reason in (said := _said.setdefault(loss, set())):
        return
    said.add(reason)
    name = f"{type(loss).__module__}.{type(loss).__qualname__}"
    warnings.warn(f"{name} takes the dense path, which stores all similarities: {reason}", stacklevel=2)
