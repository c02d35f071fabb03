"""The losses as modules: `NTXentLoss(temperature=0.1)(z0, z1)` is `functional.nt_xent(z0, z1, temperature=0.1)`."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .common.arguments import check_choice, check_flags
from .common.numbers import FLOAT32_MAX, check_number, check_size
from .common.rows import unit
from .distributed import Group, Ranks, ranks_of
from .functional.checks import check_features, check_ids, check_options, scale_of
from .functional.cpc import NEGATIVES
from .functional.deep_infomax import check_estimator
from .functional.formulas import rows_of, rows_of_views
from .functional.matryoshka import checked_prefixes, loss_of_prefixes
from .functional.mnrl import check_directions, checked_margin
from .functional.nce import FORMS, checked_views, cmc_and_log_z, cmc_pairs, nce_and_log_z
from .functional.nt_xent import POSITIVES
from .functional.sup_con import FORMS as SUP_CON_FORMS
from .memory import FeatureQueue, MemoryBank, push_of, update_of

_SHARING = "group", "strategy", "grad_reduce"
_FLAGS = ("normalize", "stats", "two_way", "times_2t")
_NUMBERS = {  # options that are numbers, with the bounds that the functions ask for at each call
    "alpha": (1,),
    "beta": (0,),
    "label_smoothing": (0, 1),
    "sigma": (1e-6,),
    "t": (1e-6, FLOAT32_MAX / 2),
    "tau_plus": (0, 1),
    "uniformity_weight": (0,),
}


def _check(options: dict) -> None:
    """Options of a module, so that a mistake shows when it is made and not at its first call."""
    check_flags(**{name: value for name, value in options.items() if name in _FLAGS})
    for name, value in options.items():
        if name in _NUMBERS:
            check_number(name, value, *_NUMBERS[name])


def _listed(options: dict) -> str:
    """The options of a module for its `repr`, on one line: a tensor by its value now, and whether it learns."""
    return ", ".join(f"{name}={_on_one_line(value)}" for name, value in options.items())


def _scale(module) -> dict:
    """The one of temperature and logit_scale that counts."""
    name = "temperature" if module.logit_scale is None else "logit_scale"
    return {name: getattr(module, name)}


def _on_one_line(value) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    text = "..." if value.is_meta else f"{value.detach().item():.4g}" if value.numel() == 1 else str(list(value.shape))
    return f"{type(value).__name__}({text})"


class _Loss(nn.Module):
    def __init__(self, temperature, logit_scale, **options):
        super().__init__()
        check_options(options["reduction"], *(options[name] for name in _SHARING))
        _check(options)
        scale_of(temperature, logit_scale)
        self.temperature, self.logit_scale, self.options = temperature, logit_scale, options

    def _loss(self, loss_fn, *features: Tensor, logit_scale: float | Tensor | None, **per_call):
        """loss_fn with the options of the constructor; a logit_scale given to forward counts before its."""
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return loss_fn(*features, temperature=self.temperature, logit_scale=logit_scale, **self.options | per_call)

    def _ranks(self, **given) -> Ranks | None:
        """The ranks that share what forward was given, for what comes before or after the loss."""
        sharing = [self.options[name] for name in _SHARING]
        return None if sharing[0] is None else ranks_of(*sharing, type(self).__name__, **given, training=self.training)

    def extra_repr(self) -> str:
        return _listed(_scale(self) | self.options)


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
    ) -> Tensor | tuple[Tensor, Tensor]:
        return self._loss(functional.nt_xent, z0, z1, ids=ids, weights=weights, logit_scale=logit_scale)


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
    ) -> Tensor | tuple[Tensor, Tensor]:
        per_call = dict(negatives=negatives, ids=ids, negative_ids=negative_ids, weights=weights)
        return self._loss(functional.info_nce, query, key, logit_scale=logit_scale, **per_call)


class CLIPLoss(nn.Module):
    """The CLIP loss with its learned scale. Formula and result: `sslkern.functional.clip`.

    The parameter `log_scale` is the logarithm of what multiplies the similarities; each forward in training first
    clamps it between log(min_scale) and log(max_scale). A scale that is learned elsewhere goes to `forward`, already
    exponentiated.

    Args:
        logit_scale: where the scale starts, a positive number.
        max_scale: the most it may become.
        min_scale: the least it may become; 0: no bound, as in CLIP. OpenCLIP's is 1.
        normalize, reduction, stats, group, strategy, grad_reduce, label_smoothing: as in `sslkern.functional.clip`.

    Example:
        >>> criterion = sslkern.CLIPLoss()
        >>> criterion(torch.randn(64, 32), torch.randn(64, 32)).backward()  # criterion.log_scale has a gradient
    """

    def __init__(
        self,
        logit_scale: float = 1 / 0.07,
        max_scale: float = 100.0,
        *,
        min_scale: float = 0.0,
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
        label_smoothing: float = 0.0,
    ):
        super().__init__()
        check_options(reduction, group, strategy, grad_reduce)
        check_number("logit_scale", logit_scale, 1e-6)
        check_number("max_scale", max_scale, logit_scale)
        check_number("min_scale", min_scale, 0)
        if min_scale > logit_scale:
            raise ValueError(
                f"min_scale must not exceed logit_scale, where the scale starts: {min_scale} > {logit_scale}"
            )
        self.log_scale = nn.Parameter(torch.tensor(math.log(logit_scale)))
        self.max_log_scale = math.log(max_scale)
        self.min_log_scale = math.log(min_scale) if min_scale else None
        shared = dict(group=group, strategy=strategy, grad_reduce=grad_reduce)
        options = dict(normalize=normalize, reduction=reduction, stats=stats, label_smoothing=label_smoothing)
        self.options = options | shared
        _check(self.options)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if logit_scale is None:
            if self.training:
                functional.clamp_logit_scale_(self.log_scale, self.max_log_scale, self.min_log_scale)
            logit_scale = self.log_scale.exp()
        return functional.clip(image, text, logit_scale, ids=ids, weights=weights, **self.options)

    def extra_repr(self) -> str:
        return _listed(self.options)


class MoCoLoss(_Loss):
    """The loss of MoCo v1 and v2 with its queue. Formula and result: `sslkern.functional.moco`.

    `memory` is a `FeatureQueue`; each forward in training pushes the keys onto it after the loss. The loss runs in the
    type of the queue: fp32, or what `.to(dtype)` made of it.

    Args:
        dim, size: features per key, and keys that the queue keeps.
        group, strategy, grad_reduce: as in `sslkern.functional.moco`; the keys of all processes enter each queue.
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
    ):
        options = dict(normalize=normalize, reduction=reduction, stats=stats, label_smoothing=label_smoothing)
        super().__init__(temperature, logit_scale, **options, group=group, strategy=strategy, grad_reduce=grad_reduce)
        self.memory = FeatureQueue(dim, size, normalize, group)

    def forward(
        self, query: Tensor, key: Tensor, *, weights: Tensor | None = None, logit_scale: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        per_call = dict(weights=weights, logit_scale=logit_scale)
        ranks = self._ranks(query=query, key=key, **per_call)
        queue = self.memory.queue.t()
        for name, x in (("query", query), ("key", key), ("queue", queue)):
            check_features(name, x, ranks)
        query, key = query.to(queue.dtype), key.to(queue.dtype)
        per_call |= dict(ptr=self.memory.queue_ptr if self.training else None)
        return self._loss(functional.moco, query, key, queue=queue, group=ranks or self.options["group"], **per_call)


class MoCoV3Loss(_Loss):
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


class NTXentMultiViewLoss(_Loss):
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


class SupConLoss(_Loss):
    """Supervised contrastive loss. Arguments, formula and result: `sslkern.functional.sup_con`.

    Example:
        >>> criterion = sslkern.SupConLoss(temperature=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randint(10, (256,)))
    """

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        form: str = "out",
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_choice("form", form, *SUP_CON_FORMS)
        super().__init__(
            temperature,
            logit_scale,
            form=form,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        z: Tensor,
        labels: Tensor | None = None,
        *,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        return self._loss(functional.sup_con, z, labels, weights=weights, logit_scale=logit_scale)


class MILNCELoss(_Loss):
    """MIL-NCE: anchors with several positives each. Arguments, formula and result: `sslkern.functional.mil_nce`.

    A learned temperature is an `nn.Parameter`; one that is computed anew for each step goes to `forward`.

    Example:
        >>> criterion = sslkern.MILNCELoss(two_way=True)
        >>> loss = criterion(torch.randn(64, 32) / 8, torch.randn(64, 5, 32))
    """

    def __init__(
        self,
        temperature: float | Tensor = 1.0,
        *,
        two_way: bool = False,
        logit_scale: float | Tensor | None = None,
        normalize: bool = False,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            temperature,
            logit_scale,
            two_way=two_way,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )

    def forward(
        self,
        anchor: Tensor,
        positives: Tensor,
        *,
        valid: Tensor | None = None,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        per_call = dict(valid=valid, ids=ids, weights=weights)
        return self._loss(functional.mil_nce, anchor, positives, logit_scale=logit_scale, **per_call)


class _TwoViewLoss(_Loss):
    """loss_fn of two views z0, z1 [N, D]."""

    def forward(
        self,
        z0: Tensor,
        z1: Tensor,
        *,
        ids: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        return self._loss(self.loss_fn, z0, z1, ids=ids, weights=weights, logit_scale=logit_scale)


class DCLLoss(_TwoViewLoss):
    """Decoupled contrastive loss. Arguments, formula and result: `sslkern.functional.dcl`.

    Example:
        >>> criterion = sslkern.DCLLoss(temperature=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.dcl)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            temperature,
            logit_scale,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )


class DCLWLoss(_TwoViewLoss):
    """Decoupled contrastive loss with weighted positives. Arguments, formula and result: `sslkern.functional.dclw`.

    Example:
        >>> criterion = sslkern.DCLWLoss(temperature=0.1, sigma=0.5)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.dclw)

    def __init__(
        self,
        temperature: float | Tensor = 0.1,
        sigma: float = 0.5,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            temperature,
            logit_scale,
            sigma=sigma,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )


class DebiasedLoss(_TwoViewLoss):
    """Debiased contrastive loss. Arguments, formula and result: `sslkern.functional.debiased`.

    Example:
        >>> criterion = sslkern.DebiasedLoss(temperature=0.5, tau_plus=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.debiased)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        tau_plus: float = 0.1,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__(
            temperature,
            logit_scale,
            tau_plus=tau_plus,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )


class HardNegativeLoss(_TwoViewLoss):
    """Debiased loss with hard negatives. Arguments, formula and result: `sslkern.functional.hard_negative`.

    Example:
        >>> criterion = sslkern.HardNegativeLoss(temperature=0.5, beta=1.0, tau_plus=0.1)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    loss_fn = staticmethod(functional.hard_negative)

    def __init__(
        self,
        temperature: float | Tensor = 0.5,
        beta: float = 1.0,
        tau_plus: float = 0.1,
        *,
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        options = dict(beta=beta, tau_plus=tau_plus, normalize=normalize, reduction=reduction)
        super().__init__(temperature, logit_scale, **options, group=group, strategy=strategy, grad_reduce=grad_reduce)


class AlignmentUniformityLoss(nn.Module):
    """Alignment and uniformity. Arguments, formula and result: `sslkern.functional.alignment_uniformity`.

    Example:
        >>> criterion = sslkern.AlignmentUniformityLoss(alpha=2.0, t=2.0, uniformity_weight=1.0)
        >>> loss = criterion(torch.randn(256, 128), torch.randn(256, 128))
    """

    def __init__(
        self,
        alpha: float = 2.0,
        t: float = 2.0,
        uniformity_weight: float = 1.0,
        *,
        normalize: bool = True,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__()
        check_options("mean", group, strategy, grad_reduce)
        self.options = dict(alpha=alpha, t=t, uniformity_weight=uniformity_weight, normalize=normalize)
        _check(self.options)
        self.options |= dict(group=group, strategy=strategy, grad_reduce=grad_reduce)

    def forward(self, z0: Tensor, z1: Tensor) -> Tensor:
        return functional.alignment_uniformity(z0, z1, **self.options)

    def extra_repr(self) -> str:
        return _listed(self.options)


class MatryoshkaLoss(nn.Module):
    """A loss that also holds for prefixes of the features. Arguments and formula: `sslkern.functional.matryoshka`.

    Example:
        >>> criterion = sslkern.MatryoshkaLoss(sslkern.NTXentLoss(0.1), dims=[16, 32, 64])
        >>> loss = criterion(torch.randn(32, 64), torch.randn(32, 64))
    """

    def __init__(
        self,
        loss: Callable[..., Any],
        dims: Sequence[int],
        weights: Sequence[float] | None = None,
        normalize: bool = True,
    ):
        super().__init__()
        self.dims, self.weights = checked_prefixes(loss, dims, weights, normalize)
        self.loss, self.normalize = loss, normalize
        if isinstance(loss, nn.Module) and any(isinstance(m, (FeatureQueue, MemoryBank)) for m in loss.modules()):
            raise TypeError("loss must not keep features of its own, which are not cut; give them to it as an argument")

    def forward(self, *features: Tensor | Sequence[Tensor], **options) -> Tensor | tuple[Tensor, Tensor]:
        return loss_of_prefixes(self.loss, self.dims, self.weights, self.normalize, *features, **options)

    def extra_repr(self) -> str:
        return f"dims={self.dims}"


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
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        options = dict(two_way=two_way, reduction=reduction, stats=stats)
        super().__init__(temperature, logit_scale, **options, group=group, strategy=strategy, grad_reduce=grad_reduce)
        self.support = FeatureQueue(dim, size, group=group)

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
        features = dict(z0=z0, z1=z1, p0=p0, p1=p1)
        ranks = self._ranks(**features, ids=ids, logit_scale=logit_scale)
        for name, x in features.items():
            check_features(name, x, ranks)
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
            **self.options | dict(group=ranks or self.options["group"]),
        )
        if self.training:
            push_of(ranks, self.support, z0)
        return loss


class SigLIPLoss(nn.Module):
    """The sigmoid loss of SigLIP. Arguments, formula and result: `sslkern.functional.siglip`.

    Scale and bias are learned, so each step passes them to `forward`.

    Example:
        >>> criterion = sslkern.SigLIPLoss()
        >>> log_scale, bias = nn.Parameter(torch.tensor(2.3)), nn.Parameter(torch.tensor(-10.0))
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
        super().__init__()
        check_options(reduction, group, strategy, grad_reduce, normalize=normalize)
        self.options = dict(normalize=normalize, reduction=reduction)
        self.options |= dict(group=group, strategy=strategy, grad_reduce=grad_reduce)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor,
        *,
        ids: Tensor | None = None,
    ) -> Tensor:
        return functional.siglip(image, text, logit_scale, logit_bias, ids=ids, **self.options)

    def extra_repr(self) -> str:
        return _listed(self.options)


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
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        super().__init__()
        check_estimator(estimator)
        check_options("mean", group, strategy, grad_reduce, normalize=normalize)
        scale_of(temperature, logit_scale)
        self.estimator, self.temperature, self.logit_scale = estimator, temperature, logit_scale
        self.options = dict(normalize=normalize)
        self.options |= dict(group=group, strategy=strategy, grad_reduce=grad_reduce)

    def forward(self, features: Tensor, local_features: Tensor, *, ids: Tensor | None = None) -> Tensor:
        options = dict(logit_scale=self.logit_scale, ids=ids, **self.options)
        return functional.deep_infomax(features, local_features, self.estimator, self.temperature, **options)

    def extra_repr(self) -> str:
        shown = dict(normalize=self.options["normalize"])
        return _listed(dict(estimator=self.estimator) | _scale(self) | shown)


class _BankLoss(nn.Module):
    """A loss against memory banks: options, and log Z [pairs], estimated by the first call and then kept."""

    log_z: Tensor

    def __init__(
        self,
        pairs: int,
        negatives: int,
        temperature,
        logit_scale,
        form: str,
        normalize: bool,
        reduction: str,
        *sharing,
    ):
        super().__init__()
        check_options(reduction, *sharing, normalize=normalize)
        scale_of(temperature, logit_scale)
        negatives = check_size("negatives", negatives, 0)
        check_choice("form", form, *FORMS)
        self.negatives, self.temperature, self.logit_scale = negatives, temperature, logit_scale
        self.form, self.normalize, self.reduction, self.sharing = form, normalize, reduction, sharing
        self.register_buffer("log_z", torch.full((pairs,), math.nan))
        self._estimated = form == "softmax"

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self._estimated = self.form == "softmax" or not bool(self.log_z.isnan().any())

    def _scale(self, logit_scale, ranks: Ranks | None):
        return scale_of(self.temperature, self.logit_scale if logit_scale is None else logit_scale, None, ranks)

    def _ranks(self, rows: int, **given) -> Ranks | None:
        check_options(self.reduction, *self.sharing)
        if self.sharing[0] is None:
            return None
        state = dict(training=self.training, log_z_is_known=self._estimated)
        return ranks_of(*self.sharing, type(self).__name__, rows=rows, **given, **state)

    def _known_log_z(self) -> Tensor | None:
        return self.log_z if self._estimated and self.form == "nce" else None

    def _keep(self, log_z: Tensor | None) -> None:
        if not self._estimated:
            self.log_z.copy_(log_z.detach())
            self._estimated = True

    def extra_repr(self) -> str:
        return _listed(dict(negatives=self.negatives) | _scale(self) | dict(form=self.form))


class NCELoss(_BankLoss):
    """Instance discrimination with its memory bank. Arguments, formula and result: `sslkern.functional.nce`.

    Samples the negatives, keeps the log Z that the first call estimates (the buffer `log_z`) and, in training mode,
    updates the bank (the `MemoryBank` `memory`) with the queries. All of it is in the `state_dict`.

    Args:
        size, dim, momentum: of the bank.
        negatives: K, sampled for each query.

    Example:
        >>> criterion = sslkern.NCELoss(size=50_000, dim=32, negatives=1024)
        >>> query, sample = torch.randn(64, 32, requires_grad=True), torch.randint(50_000, (64,))
        >>> criterion(query, sample).backward()
    """

    def __init__(
        self,
        size: int,
        dim: int,
        negatives: int = 4096,
        temperature: float | Tensor = 0.07,
        *,
        momentum: float = 0.5,
        form: str = "nce",
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        stats: bool = False,
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_flags(stats=stats)
        sharing = group, strategy, grad_reduce
        super().__init__(1, negatives, temperature, logit_scale, form, normalize, reduction, *sharing)
        self.memory, self.stats = MemoryBank(size, dim, momentum, group), stats

    def forward(
        self,
        query: Tensor,
        sample: Tensor,
        *,
        index: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """query [N, D] of the samples `sample` int64 [N]; index [N, 1 + K] replaces what would be sampled."""
        given = dict(query=query, sample=sample, index=index, weights=weights, logit_scale=logit_scale)
        ranks = self._ranks(rows_of(query), **given)
        check_features("query", query, ranks)
        check_ids("sample", sample, query.shape[:1], query)
        index = self.memory.sample(sample, self.negatives) if index is None else index
        known = self._known_log_z()
        loss, share, log_z = nce_and_log_z(
            query,
            self.memory.bank.to(query.dtype),
            index,
            self._scale(logit_scale, ranks),
            form=self.form,
            log_z=None if known is None else known[0],
            weights=weights,
            normalize=self.normalize,
            reduction=self.reduction,
            stats=self.stats,
            ranks=ranks,
        )
        self._keep(log_z)
        if self.training:
            update_of(ranks, self.memory, sample, query)
        return (loss, share) if self.stats else loss


class CMCLoss(_BankLoss):
    """Contrastive multiview coding with its memory banks. Arguments, formula and result: `sslkern.functional.cmc`.

    As `NCELoss`, with a bank for each view (`memories`) and a log Z for each ordered pair.

    Args:
        views: how many.
        size, dim, momentum: of each bank.
        negatives: K, sampled for each sample, the same for all pairs.

    Example:
        >>> criterion = sslkern.CMCLoss(views=2, size=50_000, dim=32, negatives=1024)
        >>> luminance, chroma = torch.randn(2, 64, 32, requires_grad=True)
        >>> criterion((luminance, chroma), torch.randint(50_000, (64,))).backward()
    """

    def __init__(
        self,
        views: int,
        size: int,
        dim: int,
        negatives: int = 16384,
        temperature: float | Tensor = 0.07,
        *,
        graph: str = "full",
        momentum: float = 0.5,
        form: str = "nce",
        logit_scale: float | Tensor | None = None,
        normalize: bool = True,
        reduction: str = "mean",
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        pairs = len(cmc_pairs(views, graph))
        sharing = group, strategy, grad_reduce
        super().__init__(pairs, negatives, temperature, logit_scale, form, normalize, reduction, *sharing)
        self.graph = graph
        self.memories = nn.ModuleList(MemoryBank(size, dim, momentum, group) for _ in range(views))

    def forward(
        self,
        views: Sequence[Tensor],
        sample: Tensor,
        *,
        index: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> Tensor:
        """views: [N, D] each, of the samples `sample` int64 [N]; index [N, 1 + K] replaces what would be sampled."""
        given = dict(views=views, sample=sample, index=index, weights=weights, logit_scale=logit_scale)
        ranks = self._ranks(rows_of_views(views), **given)
        views = checked_views(views, ranks)
        if len(views) != len(self.memories):
            raise ValueError(
                f"views must be {len(self.memories)} tensors [N, D], one for each memory, not {len(views)}"
            )
        check_ids("sample", sample, views[0].shape[:1], views[0])
        index = self.memories[0].sample(sample, self.negatives) if index is None else index
        banks = [memory.bank.to(views[0].dtype) for memory in self.memories]
        loss, log_z = cmc_and_log_z(
            views,
            banks,
            index,
            self._scale(logit_scale, ranks),
            self.graph,
            self._known_log_z(),
            self.form,
            weights,
            self.normalize,
            self.reduction,
            ranks,
        )
        self._keep(log_z)
        if self.training:
            for memory, view in zip(self.memories, views, strict=True):
                update_of(ranks, memory, sample, view)
        return loss


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
        group: Group = None,
        strategy: str = "auto",
        grad_reduce: str = "mean",
    ):
        check_choice("negatives", negatives, *NEGATIVES)
        super().__init__(
            temperature,
            logit_scale,
            negatives=negatives,
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
        sizes = ("steps", steps), ("target_dim", target_dim), ("context_dim", context_dim)
        self.predictors = nn.Parameter(torch.empty([check_size(*size) for size in sizes]))
        for predictor in self.predictors:
            nn.init.kaiming_uniform_(predictor, a=5**0.5)  # as nn.Linear

    def forward(
        self, context: Tensor, targets: Tensor, *, logit_scale: float | Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        logit_scale = self.logit_scale if logit_scale is None else logit_scale
        return functional.cpc(
            context, targets, self.predictors, self.temperature, logit_scale=logit_scale, **self.options
        )
