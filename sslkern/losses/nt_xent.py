"""NT-Xent as a module, of two views and of several."""

from collections.abc import Sequence

from torch import Tensor

from .. import functional
from ..common.arguments import check_choice
from ..common.tensors import TensorOrTuple
from ..distributed import Group
from ..functional.nt_xent import POSITIVES
from .base import ScaledLoss


class NTXentLoss(ScaledLoss):
    """NT-Xent, the SimCLR loss. Arguments, formula and result: `sslkern.functional.nt_xent`.

    A learned temperature is an `nn.Parameter`; one that is computed anew for each step goes to `forward`.

    Example:
        >>> criterion = sslkern.NTXentLoss(temperature=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__(
            temperature,
            logit_scale,
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
            label_smoothing=label_smoothing,
        )

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> TensorOrTuple:
        return self._loss(functional.nt_xent, z0, z1, ids=ids, weights=weights, logit_scale=logit_scale)


class NTXentMultiViewLoss(ScaledLoss):
    """NT-Xent of several views. Arguments, formula and result: `sslkern.functional.nt_xent_multi_view`.

    Example:
        >>> criterion = sslkern.NTXentMultiViewLoss(temperature=0.1, positives="joint")
        >>> loss = criterion(torch.randn(4, 64, 32))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        *,
        positives: str = "separate",
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_choice("positives", positives, *POSITIVES)
        super().__init__(
            temperature,
            logit_scale,
            positives=positives,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        views: Tensor | Sequence[Tensor],
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        return self._loss(functional.nt_xent_multi_view, views, ids=ids, weights=weights, logit_scale=logit_scale)
