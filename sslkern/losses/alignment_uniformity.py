"""Alignment and uniformity as a module."""

from torch import Tensor

from .. import functional
from ..distributed import Group
from .base import Loss


class AlignmentUniformityLoss(Loss):
    """Alignment and uniformity. Arguments, formula and result: `sslkern.functional.alignment_uniformity`.

    Example:
        >>> criterion = sslkern.AlignmentUniformityLoss(alpha=2.0, t=2.0, uniformity_weight=1.0)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    def __init__(
        self,
        alpha: float = 2.0,
        t: float = 2.0,
        uniformity_weight: float = 1.0,
        *,
        normalize: bool = True,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            alpha=alpha,
            t=t,
            uniformity_weight=uniformity_weight,
            normalize=normalize,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return self._loss(functional.alignment_uniformity, z0, z1)
