"""SigLIP as a module."""

from torch import Tensor

from .. import functional
from ..distributed import Group
from .base import Loss


class SigLIPLoss(Loss):
    """The sigmoid loss of SigLIP. Arguments, formula and result: `sslkern.functional.siglip`.

    Scale and bias are learned, so each step passes them to `forward`.

    Example:
        >>> criterion = sslkern.SigLIPLoss()
        >>> log_scale, bias = (torch.nn.Parameter(torch.tensor(x)) for x in (2.3, -10.0))
        >>> loss = criterion(torch.randn(64, 32), torch.randn(64, 32), log_scale.exp(), bias)
    """

    def __init__(
        self,
        *,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            normalize=normalize, reduction=reduction, group=group, strategy=strategy, grad_reduce=grad_reduce
        )

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        return self._loss(functional.siglip, image, text, logit_scale, logit_bias, ids=ids)
