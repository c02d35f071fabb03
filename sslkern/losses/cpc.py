"""CPC as a module, with its predictors."""

import torch
from torch import Tensor, nn

from .. import functional
from ..common.arguments import check_choice
from ..common.numbers import check_size
from ..common.tensors import TensorOrTuple
from ..distributed import Group
from ..functional.cpc import NEGATIVES
from .base import ScaledLoss


class CPCLoss(ScaledLoss):
    """CPC's InfoNCE with its predictors. Arguments, formula and result: `sslkern.functional.cpc`.

    Args:
        context_dim, target_dim, steps: the sizes Dc, Dz, K of the parameter `predictors` [K, Dz, Dc].

    Example:
        >>> criterion = sslkern.CPCLoss(context_dim=64, target_dim=32, steps=12)
        >>> criterion(torch.randn(8, 50, 64), torch.randn(8, 50, 32)).backward()
    """

    def __init__(
        self,
        context_dim: int,
        target_dim: int,
        steps: int,
        temperature: float | Tensor = 1.0,
        *,
        logit_scale: float | Tensor | None = None,
        negatives: str = "all",
        normalize: bool = False,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_choice("negatives", negatives, *NEGATIVES)
        super().__init__(
            temperature,
            logit_scale,
            negatives=negatives,
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
        sizes = ("steps", steps), ("target_dim", target_dim), ("context_dim", context_dim)
        self.predictors = nn.Parameter(torch.empty([check_size(*size) for size in sizes]))
        for predictor in self.predictors:
            nn.init.kaiming_uniform_(predictor, a=5**0.5)  # as nn.Linear

    def forward(self, context: Tensor, targets: Tensor, *, logit_scale: float | Tensor | None = None) -> TensorOrTuple:
        return self._loss(functional.cpc, context, targets, self.predictors, logit_scale=logit_scale)
