"""InfoNCE as a module."""

from torch import Tensor

from .. import functional
from ..common.arguments import check_flags
from ..common.tensors import TensorOrTuple
from ..distributed import Group
from .base import ScaledLoss


class InfoNCELoss(ScaledLoss):
    """InfoNCE, the loss of CPC, MoCo and CLIP. Arguments, formula and result: `sslkern.functional.info_nce`.

    A learned temperature is an `nn.Parameter`; one that is computed anew for each step goes to `forward`.

    Example:
        >>> criterion = sslkern.InfoNCELoss(two_way=True)
        >>> loss = criterion(torch.randn(64, 32), torch.randn(64, 32), logit_scale=torch.tensor(2.66).exp())
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        in_batch: bool | None = None,
        two_way: bool = False,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        label_smoothing: float = 0.0,
    ):
        check_flags(in_batch=in_batch is None or in_batch)
        super().__init__(
            temperature,
            logit_scale,
            in_batch=in_batch,
            two_way=two_way,
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
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> TensorOrTuple:
        per_call = dict(negatives=negatives, ids=ids, negative_ids=negative_ids, weights=weights)
        return self._loss(functional.info_nce, query, key, logit_scale=logit_scale, **per_call)
