"""The losses as modules: `NTXentLoss(temperature=0.1)(z0, z1)` is `functional.nt_xent(z0, z1, temperature=0.1)`."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import functional
from .functional._common import check_options, scale_of


class _Loss(nn.Module):
    def __init__(self, temperature, logit_scale, **options):
        super().__init__()
        check_options(options["reduction"], options["group"], options["strategy"])
        scale_of(temperature, logit_scale)
        self.temperature, self.logit_scale, self.options = temperature, logit_scale, options

    def extra_repr(self) -> str:
        scale = ("temperature", self.temperature) if self.logit_scale is None else ("logit_scale", self.logit_scale)
        return ", ".join(f"{name}={value!r}" for name, value in (scale, *self.options.items()))


class NTXentLoss(_Loss):
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
        group: None = None,
        strategy: str = "all_gather",
    ):
        options = dict(normalize=normalize, reduction=reduction, stats=stats, group=group, strategy=strategy)
        super().__init__(temperature, logit_scale, **options)

    def forward(
        self, z0: Tensor, z1: Tensor, *, ids: Tensor | None = None, logit_scale: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return functional.nt_xent(z0, z1, self.temperature, logit_scale=logit_scale, ids=ids, **self.options)


class InfoNCELoss(_Loss):
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
        group: None = None,
        strategy: str = "all_gather",
    ):
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
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        negatives: Tensor | None = None,
        *,
        ids: Tensor | None = None,
        negative_ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return functional.info_nce(
            query,
            key,
            negatives,
            self.temperature,
            logit_scale=logit_scale,
            ids=ids,
            negative_ids=negative_ids,
            **self.options,
        )


class MultipleNegativesRankingLoss(_Loss):
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
        group: None = None,
        strategy: str = "all_gather",
    ):
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
    ) -> Tensor | tuple[Tensor, Tensor]:
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return functional.mnrl(
            anchor,
            positive,
            negatives,
            self.temperature,
            logit_scale=logit_scale,
            ids=ids,
            negative_ids=negative_ids,
            guide=guide,
            **self.options,
        )


class CPCLoss(_Loss):
    """CPC's InfoNCE with its predictors. Arguments, formula and result: `sslkern.functional.cpc`.

    Args:
        context_dim, target_dim, steps: the sizes Dc, Dz, K of the parameter `predictors` [K, Dz, Dc].

    Example:
        >>> criterion = sslkern.CPCLoss(context_dim=64, target_dim=32, steps=12)
        >>> criterion(torch.randn(8, 50, 64), torch.randn(8, 50, 32)).backward()
    """

    def __init__(
        self,
        context_dim: int,
        target_dim: int,
        steps: int,
        temperature: float | Tensor = 1.0,
        *,
        logit_scale: float | Tensor | None = None,
        negatives: str = "all",
        normalize: bool = False,
        reduction: str = "mean",
        stats: bool = False,
        group: None = None,
        strategy: str = "all_gather",
    ):
        super().__init__(
            temperature,
            logit_scale,
            negatives=negatives,
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            group=group,
            strategy=strategy,
        )
        for name, size in (("context_dim", context_dim), ("target_dim", target_dim), ("steps", steps)):
            if not isinstance(size, int) or size < 1:
                raise ValueError(f"{name} must be a positive integer, not {size!r}")
        self.predictors = nn.Parameter(torch.empty(steps, target_dim, context_dim))
        for predictor in self.predictors:
            nn.init.kaiming_uniform_(predictor, a=5**0.5)  # as nn.Linear

    def forward(
        self, context: Tensor, targets: Tensor, *, logit_scale: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return functional.cpc(
            context, targets, self.predictors, self.temperature, logit_scale=logit_scale, **self.options
        )
