"""The losses of pairs from the log-sum-exps of their negatives, in plain torch."""

import torch
from torch import Tensor

from ...common.autocast import stack
from ...common.sums import each, softplus


def pair_losses_fwd(
    row: Tensor, col: Tensor | None, cosine: Tensor, scale_tensor: Tensor | None, scale: float, bounded: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """losses [S, N] = softplus(gap), positive [N] = scale * cosine and gap [S, N] = negatives - positive. The negatives
    of S sides: row [S N], or two-way row [N] and col [N]. `bounded`: no score is +inf."""
    if scale_tensor is not None:
        scale = scale_tensor
    positive = cosine * scale
    # Equal ids leave the positive out of its row: the difference has no cancellation when the loss is tiny.
    negatives = row.view(-1, len(cosine)) if col is None else stack((row, col))
    gap = negatives - positive
    if not bounded:  # NaN where one of them is +inf, as in cross-entropy
        gap.add_(torch.maximum(negatives, positive), alpha=0)
    return softplus(gap), positive, gap


def pair_losses_bwd(gap: Tensor, g: Tensor, scale_tensor: Tensor | None, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """weight [S, N] = d loss / d negatives, toward [N] = - d loss / d positive and pull [N] = scale * toward."""
    # A row without negatives (gap -inf) has none, whatever g is.
    weight = torch.where(gap == -torch.inf, 0, each(torch.sigmoid, gap) * g)
    toward = weight.sum(0)
    if scale_tensor is not None:
        scale = scale_tensor
    return weight, toward, toward * scale
