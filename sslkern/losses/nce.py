"""Losses against memory banks as modules, which keep the banks and what they estimate of Z."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..common.arguments import check_choice
from ..common.numbers import check_size
from ..common.tensors import TensorOrTuple
from ..distributed import Group, Ranks
from ..functional.checks import check_features, check_ids
from ..functional.formulas import rows_of, rows_of_views
from ..functional.nce import FORMS, checked_views, cmc_and_log_z, cmc_pairs, nce_and_log_z
from ..memory import MemoryBank, update_of
from .base import ScaledLoss, listed

_OPTIONS = "form", "normalize", "reduction", "stats"


class _BankLoss(ScaledLoss):
    """A loss against memory banks: how many negatives it samples, and log Z [pairs], which its first call estimates; a
    softmax has 0 there."""

    log_z: Tensor

    def __init__(
        self,
        pairs: int,
        negatives: int,
        temperature: float | Tensor,
        logit_scale: float | Tensor | None,
        **options: Any,
    ):
        check_choice("form", options["form"], *FORMS)
        super().__init__(temperature, logit_scale, **options)
        self.negatives = check_size("negatives", negatives, 0)
        self._estimated = options["form"] == "softmax"
        self.register_buffer("log_z", torch.full((pairs,), 0.0 if self._estimated else math.nan))

    def __setstate__(self, state: dict) -> None:
        """Also from before these modules kept their options in one place, as the others do."""
        if "sharing" in state:
            state = dict(state)
            state["options"] = {name: state.pop(name) for name in _OPTIONS if name in state}
            state["options"] |= zip(("group", "strategy", "grad_reduce"), state.pop("sharing"), strict=True)
        super().__setstate__(state)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._estimated = self.options["form"] == "softmax" or not bool(self.log_z.isnan().any())

    def _ranks(self, **given: Any) -> Ranks | None:
        return super()._ranks(**given, negatives=self.negatives, log_z_is_known=self._estimated)

    def _known_log_z(self) -> Tensor | None:
        return self.log_z if self._estimated and self.options["form"] == "nce" else None

    def _keep(self, log_z: Tensor | None) -> None:
        if log_z is not None and not self._estimated:
            self.log_z.copy_(log_z.detach())
            self._estimated = True

    def extra_repr(self) -> str:
        return listed(dict(negatives=self.negatives) | self._scale() | dict(form=self.options["form"]))


class NCELoss(_BankLoss):
    """Instance discrimination with its memory bank. Arguments, formula and result: `sslkern.functional.nce`.

    Samples the negatives, keeps the log Z that the first call estimates (the buffer `log_z`) and, in training mode,
    updates the bank (the `MemoryBank` `memory`) with the queries. All of it is in the `state_dict`.

    Args:
        size, dim, momentum, sharded: of the bank.
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
        sharded: bool = False,
    ):
        super().__init__(
            1,
            negatives,
            temperature,
            logit_scale,
            form=form,
            normalize=normalize,
            reduction=reduction,
            stats=stats,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
        self.memory = MemoryBank(size, dim, momentum, group, sharded)

    def forward(
        self,
        query: Tensor,
        sample: Tensor,
        *,
        index: Tensor | None = None,
        weights: Tensor | None = None,
        logit_scale: float | Tensor | None = None,
    ) -> TensorOrTuple:
        """query [N, D] of the samples `sample` int64 [N]; index [N, 1 + K] replaces what would be sampled."""
        given = dict(query=query, sample=sample, index=index, weights=weights, logit_scale=logit_scale)
        ranks = self._ranks(rows=rows_of(query), **given, bank=self.memory.bank)
        check_features("query", query, ranks)
        check_ids("sample", sample, query.shape[:1], query)
        index = self.memory.sample(sample, self.negatives) if index is None else index
        known = self._known_log_z()
        loss, share, log_z = self._loss(
            nce_and_log_z,
            query,
            self.memory.bank.to(query.dtype),
            index,
            log_z=None if known is None else known[0],
            weights=weights,
            logit_scale=logit_scale,
            group=ranks or self.options["group"],
        )
        self._keep(log_z)
        if self.training:
            update_of(ranks, self.memory, sample, query)
        return (loss, share) if self.options["stats"] else loss


class CMCLoss(_BankLoss):
    """Contrastive multiview coding with its memory banks. Arguments, formula and result: `sslkern.functional.cmc`.

    As `NCELoss`, with a bank for each view (`memories`) and a log Z for each ordered pair.

    Args:
        views: how many.
        size, dim, momentum, sharded: of each bank.
        negatives: K, sampled for each sample, the same for all pairs.

    Example:
        >>> criterion = sslkern.CMCLoss(views=2, size=50_000, dim=32, negatives=1024)
        >>> luminance, chroma = torch.randn(2, 64, 32, requires_grad=True)
        >>> criterion((luminance, chroma), torch.randint(50_000, (64,))).backward()
    """

    memories: Any  # an nn.ModuleList, of a MemoryBank for each view

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
        sharded: bool = False,
    ):
        pairs = len(cmc_pairs(views, graph))
        super().__init__(
            pairs,
            negatives,
            temperature,
            logit_scale,
            form=form,
            normalize=normalize,
            reduction=reduction,
            group=group,
            strategy=strategy,
            grad_reduce=grad_reduce,
        )
        self.graph = graph
        self.memories = nn.ModuleList(MemoryBank(size, dim, momentum, group, sharded) for _ in range(views))
        for number, memory in enumerate(self.memories if group is not None else ()):
            rows = memory.bank.rows if sharded else memory.bank
            rows.copy_(rows.roll(number, 0))  # which all begin with the same

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
        given: dict[str, Any] = dict(views=views, sample=sample, index=index, weights=weights, logit_scale=logit_scale)
        given |= dict(banks=[memory.bank for memory in self.memories], graph=self.graph)
        ranks = self._ranks(rows=rows_of_views(views), **given)
        views = checked_views(views, ranks)
        if len(views) != len(self.memories):
            raise ValueError(
                f"views must be {len(self.memories)} tensors [N, D], one for each memory, not {len(views)}"
            )
        check_ids("sample", sample, views[0].shape[:1], views[0])
        index = self.memories[0].sample(sample, self.negatives) if index is None else index
        banks = [memory.bank.to(views[0].dtype) for memory in self.memories]
        loss, log_z = self._loss(
            cmc_and_log_z,
            views,
            banks,
            index,
            graph=self.graph,
            log_z=self._known_log_z(),
            weights=weights,
            logit_scale=logit_scale,
            group=ranks or self.options["group"],
        )
        self._keep(log_z)
        if self.training:
            for memory, view in zip(self.memories, views, strict=True):
                update_of(ranks, memory, sample, view)
        return loss
