"""LARS: You, Gitman and Ginsburg, "Large Batch Training of Convolutional Networks", 2017, arXiv 1708.03888.

SGD with momentum whose steps fit to each layer: of a matrix w with gradient g, weight decay included,

    v <- momentum * v + trust * |w| / |g| * g        w <- w - lr * v

Vectors, the biases and what normalisations scale by, take plain steps, as in SimCLR. SimCLR, MoCo v3 and NNCLR train so
with batches of thousands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class LARS(torch.optim.Optimizer):
    """`groups` as other optimisers take them; what has two dimensions or more is a matrix."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 0.001,
    ):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                step = p.grad + group["weight_decay"] * p
                if p.ndim > 1:
                    step = step * _ratio(p, step, group["trust"])
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                p.sub_(group["lr"] * state["momentum_buffer"].mul_(group["momentum"]).add_(step))


def _ratio(weight: Tensor, step: Tensor, trust: float) -> Tensor:
    """1 where one of them is zero; without waiting for the device."""
    weights, steps = weight.norm(), step.norm()
    return torch.where((weights > 0) & (steps > 0), trust * weights / steps, torch.ones_like(weights))
