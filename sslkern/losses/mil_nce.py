"""MIL-NCE as a module."""

from torch import Tensor

from .. import functional
from ..distributed import Group
from .base import ScaledLoss


class MILNCELoss(ScaledLoss):
    """MIL-NCE: anchors with several positives each. Arguments, formula and result: `sslkern.functional.mil_nce`.

    A learned temperature is an `nn.Parameter`; one that is computed anew for each step goes to `forward`.

    Example:
        >>> criterion = sslkern.MILNCELoss(two_way=True)
        >>> loss = criterion(torch.randn(64, 32) / 8, torch.randn(64, 5, 32))
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        two_way: bool = False,
        logit_scale: float | Tensor | None = None,
        normalize: bool = False,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            temperature,
            logit_scale,
            two_way=two_way,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        anchor: Tensor,
        positives: Tensor,
        *,
        valid: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        per_call = dict(valid=valid, ids=ids, weights=weights)
        return self._loss(functional.mil_nce, anchor, positives, logit_scale=logit_scale, **per_call)
