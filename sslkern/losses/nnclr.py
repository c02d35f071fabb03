"""NNCLR as a module, with its support set."""

from torch import Tensor

from .. import functional
from ..common.rows import unit
from ..common.tensors import TensorOrTuple
from ..distributed import Group
from ..functional.checks import check_features
from ..memory import FeatureQueue, push_of
from .base import ScaledLoss


class NNCLRLoss(ScaledLoss):
    """NNCLR with its support set. Arguments, formula and result: `sslkern.functional.nnclr`.

    In training mode z0 enters the support set after each call. The set is the `FeatureQueue` `support`, saved in the
    `state_dict`, at first random; its rows are unit vectors.

    Args:
        dim: features per embedding.
        size: of the support set; 98304 was the best in the paper.
        sharded: each process of the group keeps a part of it, as in `FeatureQueue`.

    Example:
        >>> criterion = sslkern.NNCLRLoss(dim=32, size=4096)
        >>> z0, z1, p0, p1 = torch.randn(4, 64, 32, requires_grad=True)
        >>> criterion(z0, z1, p0, p1).backward()
    """

    def __init__(
        self,
        dim: int,
        size: int = 98304,
        temperature: float | Tensor = 0.1,
        *,
        two_way: bool = False,
        logit_scale: float | Tensor | None = None,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        sharded: bool = False,
    ):
        options = dict(two_way=two_way, reduction=reduction, stats=stats)
        super().__init__(temperature, logit_scale, **options, group=group, strategy=strategy, grad_reduce=grad_reduce)
        self.support = FeatureQueue(dim, size, group=group, sharded=sharded)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        p0: Tensor,
        p1: Tensor,
        *,
        ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> TensorOrTuple:
        features = dict(z0=z0, z1=z1, p0=p0, p1=p1)
        ranks = self._ranks(**features, support=self.support.queue, ids=ids, logit_scale=logit_scale)
        for name, x in features.items():
            check_features(name, x, ranks)
        support = self.support.queue.t().to(z0.dtype)
        # Of the support nothing is left to normalise, and z only chooses.
        loss = self._loss(
            functional.nnclr,
            z0,
            z1,
            unit(p0),
            unit(p1),
            support,
            ids=ids,
            normalize=False,
            group=ranks or self.options["group"],
            logit_scale=logit_scale,
        )
        if self.training:
            push_of(ranks, self.support, z0)
        return loss
