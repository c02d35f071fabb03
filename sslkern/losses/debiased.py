"""The debiased loss, and that with hard negatives, as modules."""

from torch import Tensor

from .. import functional
from ..distributed import Group
from .base import TwoViewLoss


class DebiasedLoss(TwoViewLoss):
    """Debiased contrastive loss. Arguments, formula and result: `sslkern.functional.debiased`.

    Example:
        >>> criterion = sslkern.DebiasedLoss(temperature=0.5, tau_plus=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.debiased)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        tau_plus: float = 0.1,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            temperature,
            logit_scale,
            tau_plus=tau_plus,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )


class HardNegativeLoss(TwoViewLoss):
    """Debiased loss with hard negatives. Arguments, formula and result: `sslkern.functional.hard_negative`.

    Example:
        >>> criterion = sslkern.HardNegativeLoss(temperature=0.5, beta=1.0, tau_plus=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.hard_negative)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        options = dict(beta=beta, tau_plus=tau_plus, normalize=normalize, reduction=reduction)
        super().__init__(temperature, logit_scale, **options, group=group, strategy=strategy, grad_reduce=grad_reduce)
