"""SupCon as a module."""

from torch import Tensor

from .. import functional
from ..common.arguments import check_choice
from ..distributed import Group
from ..functional.sup_con import FORMS
from .base import ScaledLoss


class SupConLoss(ScaledLoss):
    """Supervised contrastive loss. Arguments, formula and result: `sslkern.functional.sup_con`.

    Example:
        >>> criterion = sslkern.SupConLoss(temperature=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randint(10, (256,)))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: str = "out",
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_choice("form", form, *FORMS)
        super().__init__(
            temperature,
            logit_scale,
            form=form,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        return self._loss(functional.sup_con, z, labels, weights=weights, logit_scale=logit_scale)
