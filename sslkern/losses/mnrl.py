"""Multiple negatives ranking as a module."""

from collections.abc import Sequence

from torch import Tensor

from .. import functional
from ..common.tensors import TensorOrTuple
from ..distributed import Group
from ..functional.checks import scale_of
from ..functional.mnrl import check_directions, checked_margin
from .base import ScaledLoss


class MultipleNegativesRankingLoss(ScaledLoss):
    """Multiple negatives ranking, for text retrieval. Arguments, formula and result: `sslkern.functional.mnrl`.

    Example:
        >>> criterion = sslkern.MultipleNegativesRankingLoss(directions=("query_to_doc", "query_to_query"))
        >>> loss = criterion(torch.randn(64, 32), torch.randn(64, 32), negatives=torch.randn(64, 3, 32))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.05,
        *,
        logit_scale: float | Tensor | None = None,
        directions: Sequence[str] = ("query_to_doc",),
        partition: str = "joint",
        margin: float | None = None,
        margin_strategy: str = "absolute",
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_directions(directions, partition)
        checked_margin(margin, margin_strategy, scale_of(temperature, logit_scale), ())  # with a guide or without
        super().__init__(
            temperature,
            logit_scale,
            directions=directions,
            partition=partition,
            margin=margin,
            margin_strategy=margin_strategy,
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negatives: Tensor | Sequence[Tensor] | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        guide: Sequence[Tensor] | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> TensorOrTuple:
        per_call = dict(ids=ids, negative_ids=negative_ids, guide=guide)
        return self._loss(functional.mnrl, anchor, positive, negatives, logit_scale=logit_scale, **per_call)
