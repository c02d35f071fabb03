"""DCL and DCLW as modules."""

from torch import Tensor

from .. import functional
from ..distributed import Group
from .base import TwoViewLoss


class DCLLoss(TwoViewLoss):
    """Decoupled contrastive loss. Arguments, formula and result: `sslkern.functional.dcl`.

    Example:
        >>> criterion = sslkern.DCLLoss(temperature=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.dcl)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
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
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )


class DCLWLoss(TwoViewLoss):
    """Decoupled contrastive loss with weighted positives. Arguments, formula and result: `sslkern.functional.dclw`.

    Example:
        >>> criterion = sslkern.DCLWLoss(temperature=0.1, sigma=0.5)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.dclw)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
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
            sigma=sigma,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
