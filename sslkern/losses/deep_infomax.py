"""Deep InfoMax as a module."""

from torch import Tensor

from .. import functional
from ..distributed import Group
from ..functional.deep_infomax import check_estimator
from .base import ScaledLoss, listed


class DeepInfoMaxLoss(ScaledLoss):
    """Deep InfoMax with one of its three estimators. Arguments, formula and result: `sslkern.functional.deep_infomax`.

    A learned temperature is an `nn.Parameter`.

    Example:
        >>> criterion = sslkern.DeepInfoMaxLoss(estimator="infonce")
        >>> loss = criterion(torch.randn(16, 64), torch.randn(16, 49, 64))
    """

    def __init__(
        self,
        estimator: str = "jsd",
        temperature: float | Tensor = 1.0,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_estimator(estimator)
        super().__init__(
            temperature,
            logit_scale,
            normalize=normalize,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
        self.estimator = estimator

    def forward(self, features: Tensor, local_features: Tensor, *, ids: Tensor | None = None) -> Tensor:
        return self._loss(functional.deep_infomax, features, local_features, self.estimator, ids=ids)

    def extra_repr(self) -> str:
        shown = dict(normalize=self.options["normalize"])
        return listed(dict(estimator=self.estimator) | self._scale() | shown)
