"""CLIP as a module, which learns its scale."""

import math

import torch
from torch import Tensor, nn

from .. import functional
from ..common.numbers import check_number
from ..common.tensors import TensorOrTuple
from ..distributed import Group
from .base import Loss


class CLIPLoss(Loss):
    """The CLIP loss with its learned scale. Formula and result: `sslkern.functional.clip`.

    The parameter `log_scale` is the logarithm of what multiplies the similarities; each forward in training first
    clamps it between log(min_scale) and log(max_scale). A scale that is learned elsewhere goes to `forward`, already
    exponentiated.

    Args:
        logit_scale: where the scale starts, a positive number.
        max_scale: the most it may become.
        min_scale: the least it may become; 0: no bound, as in CLIP. OpenCLIP's is 1.
        normalize, reduction, stats, group, strategy, grad_reduce, label_smoothing: as in `sslkern.functional.clip`.

    Example:
        >>> criterion = sslkern.CLIPLoss()
        >>> criterion(torch.randn(64, 32), torch.randn(64, 32)).backward()  # criterion.log_scale has a gradient
    """

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
        *,
        min_scale: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__(
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            label_smoothing=label_smoothing,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
        check_number("logit_scale", logit_scale, 1e-6)
        check_number("max_scale", max_scale, logit_scale)
        check_number("min_scale", min_scale, 0)
        if min_scale > logit_scale:
            raise ValueError(
                f"min_scale must not exceed logit_scale, where the scale starts: {min_scale} > {logit_scale}"
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.max_log_scale = math.log(max_scale)
        self.min_log_scale = math.log(min_scale) if min_scale else None

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> TensorOrTuple:
        if logit_scale is None:
            if self.training:
                functional.clamp_logit_scale_(self.log_scale, self.max_log_scale, self.min_log_scale)
            logit_scale = self.log_scale.exp()
        return self._loss(functional.clip, image, text, logit_scale, ids=ids, weights=weights)
