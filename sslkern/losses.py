"""The losses as modules: `NTXentLoss(temperature=0.1)(z0, z1)` is `functional.nt_xent(z0, z1, temperature=0.1)`."""

from torch import Tensor, nn

from . import functional
from .functional._common import check_options, scale_of
from .functional.deep_infomax import check_estimator


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


class SigLIPLoss(nn.Module):
    """The sigmoid loss of SigLIP. Arguments, formula and result: `sslkern.functional.siglip`.

    Scale and bias are learned, so each step passes them to `forward`.

    Example:
        >>> criterion = sslkern.SigLIPLoss()
        >>> log_scale, bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-10.0))
        >>> loss = criterion(torch.randn(64, 32), torch.randn(64, 32), log_scale.exp(), bias)
    """

    def __init__(self, *, normalize: bool = True, reduction: str = "mean"):
        super().__init__()
        check_options(reduction, None, "all_gather")
        self.normalize, self.reduction = normalize, reduction

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        options = dict(ids=ids, normalize=self.normalize, reduction=self.reduction)
        return functional.siglip(image, text, logit_scale, logit_bias, **options)

    def extra_repr(self) -> str:
        return f"normalize={self.normalize}, reduction={self.reduction!r}"


class DeepInfoMaxLoss(nn.Module):
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
    ):
        super().__init__()
        check_estimator(estimator)
        scale_of(temperature, logit_scale)
        self.estimator, self.temperature, self.logit_scale = estimator, temperature, logit_scale
        self.normalize = normalize

    def forward(self, features: Tensor, local_features: Tensor, *, ids: Tensor | None = None) -> Tensor:
        options = dict(logit_scale=self.logit_scale, ids=ids, normalize=self.normalize)
        return functional.deep_infomax(features, local_features, self.estimator, self.temperature, **options)

    def extra_repr(self) -> str:
        name = "temperature" if self.logit_scale is None else "logit_scale"
        return f"estimator={self.estimator!r}, {name}={getattr(self, name)!r}, normalize={self.normalize}"
