"""The losses as modules: `NTXentLoss(temperature=0.1)(z0, z1)` is `functional.nt_xent(z0, z1, temperature=0.1)`."""

from torch import Tensor, nn

from . import functional
from .functional._common import check_options, scale_of, unit
from .memory import FeatureQueue


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


class NNCLRLoss(_Loss):
    """NNCLR with its support set. Arguments, formula and result: `sslkern.functional.nnclr`.

    In training mode z0 enters the support set after each call. The set is the `FeatureQueue` `support`, saved in the
    `state_dict`, at first random; its rows are unit vectors.

    Args:
        dim: features per embedding.
        size: embeddings kept, the paper's best is 98304.

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
        group: None = None,
        strategy: str = "all_gather",
    ):
        options = dict(two_way=two_way, reduction=reduction, stats=stats, group=group, strategy=strategy)
        super().__init__(temperature, logit_scale, **options)
        self.support = FeatureQueue(dim, size)

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        p0: Tensor,
        p1: Tensor,
        *,
        ids: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        support = self.support.queue.t().to(z0.dtype)
        # Of the support nothing is left to normalise, and z only chooses.
        loss = functional.nnclr(
            z0,
            z1,
            unit(p0),
            unit(p1),
            support,
            self.temperature,
            logit_scale=logit_scale,
            ids=ids,
            normalize=False,
            **self.options,
        )
        if self.training:
            self.support.push(z0)
        return loss
