"""MoCo as modules: v1 and v2 with their queue, and v3."""

from torch import Tensor

from .. import functional
from ..common.tensors import TensorOrTuple
from ..distributed import Group, rows_and_shard
from ..functional.checks import check_features
from ..memory import FeatureQueue
from .base import ScaledLoss


class MoCoLoss(ScaledLoss):
    """The loss of MoCo v1 and v2 with its queue. Formula and result: `sslkern.functional.moco`.

    `memory` is a `FeatureQueue`; each forward in training pushes the keys onto it after the loss. The loss runs in the
    type of the queue: fp32, or what `.to(dtype)` made of it.

    Args:
        dim, size: features per key, and keys that the queue keeps.
        group, strategy, grad_reduce: as in `sslkern.functional.moco`; the keys of all processes enter each queue.
        sharded: each of them keeps a part of the queue, as in `FeatureQueue`.
        temperature, logit_scale, normalize, reduction, stats, label_smoothing: as in `sslkern.functional.moco`.

    Example:
        >>> criterion = sslkern.MoCoLoss(dim=128, size=4096)
        >>> loss = criterion(torch.randn(32, 128, requires_grad=True), torch.randn(32, 128))
        >>> loss.backward()
    """

    def __init__(
        self,
        dim: int,
        size: int = 65536,
        temperature: float | Tensor = 0.07,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        label_smoothing: float = 0.0,
        sharded: bool = False,
    ):
        options = dict(normalize=normalize, reduction=reduction, stats=stats, label_smoothing=label_smoothing)
        super().__init__(temperature, logit_scale, **options, group=group, strategy=strategy, grad_reduce=grad_reduce)
        self.memory = FeatureQueue(dim, size, normalize, group, sharded)

    def forward(
        self, query: Tensor, key: Tensor, *, weights: Tensor | None = None, logit_scale: float | Tensor | None = None
    ) -> TensorOrTuple:
        per_call = dict(weights=weights, logit_scale=logit_scale)
        queue = self.memory.queue.t()
        ranks = self._ranks(query=query, key=key, queue=queue, **per_call)
        for name, x in (("query", query), ("key", key), ("queue", rows_and_shard("queue", queue, ranks)[0])):
            check_features(name, x, ranks)
        query, key = query.to(queue.dtype), key.to(queue.dtype)
        per_call |= dict(ptr=self.memory.queue_ptr if self.training else None)
        return self._loss(functional.moco, query, key, queue=queue, group=ranks or self.options["group"], **per_call)


class MoCoV3Loss(ScaledLoss):
    """The loss of MoCo v3. Arguments, formula and result: `sslkern.functional.moco_v3`.

    Example:
        >>> criterion = sslkern.MoCoV3Loss(temperature=0.2)
        >>> queries, keys = torch.randn(2, 64, 32), torch.randn(2, 64, 32)
        >>> loss = criterion(*queries, *keys)
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.2,
        *,
        times_2t: bool = True,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        label_smoothing: float = 0.0,
    ):
        options = dict(normalize=normalize, reduction=reduction, label_smoothing=label_smoothing)
        super().__init__(
            temperature,
            logit_scale,
            times_2t=times_2t,
            **options,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        query0: Tensor,
        query1: Tensor,
        key0: Tensor,
        key1: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        features = query0, query1, key0, key1
        return self._loss(functional.moco_v3, *features, ids=ids, weights=weights, logit_scale=logit_scale)
