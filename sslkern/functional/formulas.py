"""The few formulas that losses share, beside the primitives."""

import math
from typing import Any

import torch
from torch import Tensor

from ..common.sums import log_total, mean, total
from ..common.tensors import accumulator, wide
from ..distributed import Ranks, all_rows, gather, one_each, over_ranks, own_rows

# Equal scores, of a kernel and of `dots`, were seen 11 roundings apart (512 features in bf16).
_TIE = 64


def tie(scale: float | Tensor, x: Tensor, y: Tensor, normalized: bool) -> float | Tensor:
    """By how much scores may differ from scale <x_i, y_i> that equal it but for rounding: their products are summed in
    another order. x, y: rows [.., D], of length 1 if `normalized`."""
    most: float | Tensor = scale.detach().abs() if isinstance(scale, Tensor) else abs(scale)
    room = _TIE * torch.finfo(accumulator(x)).eps * most
    if normalized:
        return room
    x, y = (torch.linalg.vector_norm(wide(rows.detach()), dim=-1) for rows in (x, y))
    return room * x * y


def beaten(best: Tensor, positive: Tensor, room: float | Tensor, ranks: Ranks | None = None) -> Tensor:
    """The share of rows whose positive beats every negative by more than `room`, 0-d."""
    won = wins(best, positive, room)
    if ranks is None:
        return won.mean()
    return reduce(won, "mean", ranks=ranks)


def wins(best: Tensor, positive: Tensor, room: float | Tensor) -> Tensor:
    """1 where the positive beats the best negative by more than `room`, else 0. A `tie` is no win: all scores of an
    encoder that has collapsed are equal, and it finds nothing."""
    return (best < positive.detach() - room).float()


def logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(exp(a) + exp(b)), with zero gradient instead of NaN where both are -inf."""
    empty = (a == -math.inf) & (b == -math.inf)
    return torch.logaddexp(a.masked_fill(empty, 0), b.masked_fill(empty, 0)).masked_fill(empty, -math.inf)


def reduce(losses: Tensor, reduction: str, weights: Tensor | None = None, ranks: Ranks | None = None) -> Tensor:
    """losses [.., N] and weights [N]: sum w l / sum w for "mean" (0 where all weights are 0), sum w l, or w l; the
    sums over the rows of all ranks."""
    if weights is None:
        if reduction == "none":
            return own_rows(losses, ranks)
        if ranks is None and reduction == "mean":
            return mean(losses)
        if ranks is None:
            return total(losses)
        loss = over_ranks(total(losses), ranks)
        if reduction == "sum":
            return loss
        return loss / (losses.shape[:-1].numel() * all_rows(losses.shape[-1], ranks))
    weights = weights.to(losses.dtype).expand_as(losses)
    losses = weights * losses
    if reduction == "none":
        return own_rows(losses, ranks)
    loss = over_ranks(total(losses), ranks)
    if reduction == "sum":
        return loss
    share = over_ranks(total(weights), ranks)
    return loss / share.masked_fill(share == 0, 1)


def rows_of(x: object) -> int:
    """N of x [N, ..]; 0 where x is no such tensor, which the checks refuse later."""
    return x.shape[0] if isinstance(x, Tensor) and not x.is_nested and x.ndim else 0


def rows_of_views(views: Any) -> int:
    """N of V views [N, D], likewise."""
    listed = isinstance(views, (list, tuple)) or isinstance(views, Tensor) and not views.is_nested and views.ndim > 1
    if not listed or len(views) == 0:
        return 0
    return rows_of(views[0])


def mean_of(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The mean of x [N, ..], over the rows of all ranks, 0-d."""
    if ranks is None:
        return mean(x)
    return over_ranks(total(x), ranks) / (all_rows(x.shape[0], ranks) * x.shape[1:].numel())


def log_total_of(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The log-sum-exp of x [N, ..], over the rows of all ranks, 0-d."""
    if ranks is None:
        return log_total(x)
    share = log_total(x)
    most = gather(share.detach().view(1), one_each(ranks)).amax()
    return over_ranks((share - most).exp(), ranks).log() + most


def at_once_of(reduction: str, weights: Tensor | None, label_smoothing: float, ranks: Ranks | None = None) -> str:
    """The reduction that `pair_contrast` can take over: none where something comes before it."""
    if weights is None and label_smoothing == 0 and ranks is None:
        return reduction
    return "none"
