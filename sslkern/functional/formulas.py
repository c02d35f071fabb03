"""The few formulas that losses share, beside the primitives."""

import math

import torch
from torch import Tensor

from ..common.sums import mean, total


def beaten(best: Tensor, positive: Tensor) -> Tensor:
    """The share of rows whose positive beats every negative, 0-d."""
    return (best < positive.detach()).float().mean()


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), with zero gradient instead of NaN where both are -inf."""
    empty = (a == -math.inf) & (b == -math.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -math.inf)


def reduce(losses: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """losses [.., N] and weights [N]: sum w l / sum w for "mean" (0 where all weights are 0), sum w l, or w l."""
    if weights is None:
        return mean(losses) if reduction == "mean" else total(losses) if reduction == "sum" else losses
    weights = weights.to(losses.dtype).expand_as(losses)
    losses = weights * losses
    if reduction == "none":
        return losses
    share = total(weights)
    return total(losses) / share.masked_fill(share == 0, 1) if reduction == "mean" else total(losses)


def at_once_of(reduction: str, weights: Tensor | None, label_smoothing: float) -> str:
    """The reduction that `pair_contrast` can take over: none where something comes before it."""
    return reduction if weights is None and label_smoothing == 0 else "none"
