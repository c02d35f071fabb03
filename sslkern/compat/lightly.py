"""The contrastive losses and the memory banks of lightly 1.6.0 (https://github.com/lightly-ai/lightly).

    from sslkern.compat.lightly import NTXentLoss, MemoryBankModule

It is lightly.loss and lightly.models.modules, and does not import lightly. docs/migrate_lightly.md has the differences.
"""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from ..common.autocast import cat
from ..common.rows import dots, unit
from ..common.sums import pair_loss, times
from ..distributed import Ranks, copies, gather, ranks_of, row_ids, similarity_lse
from ..functional import nt_xent
from ..functional.checks import check_alike, check_pair, promoted, scale_of
from ..functional.info_nce import over_bank
from ..ops import similarity_topk
from ._types import typed_as

EPS = 1e-8  # temperatures nearer to 0 are refused


def _ranks(gather_distributed: bool, what: str, **given: Tensor) -> Ranks | None:
    """Those that share the batch. A rank has the loss of its own rows, and the gradient of each row is the sum of what
    all of them make of it, so that what DDP averages is the gradient of their mean."""
    return ranks_of("world", "auto", "sum", what, **given) if gather_distributed else None


def _check_distributed(gather_distributed: bool) -> None:
    if gather_distributed and not torch.distributed.is_available():
        raise ValueError("gather_distributed must be False in a PyTorch without torch.distributed")


# ---- memory banks ----------------------------------------------------------------------------------------------------


class MemoryBankModule(nn.Module):
    """The features of the last batches, `bank` (K, D), and `bank_ptr` (1,), the row to write next; neither is saved.

    A batch that would pass the end is cut there, and the next one starts at the first row.

    Args:
        size: (K, D), or 0 for no bank. K alone, as lightly took it before 1.6: the first batch decides on D.
        gather_distributed: write the features of all ranks, in their order.
        feature_dim_first: whether the bank is returned as (D, K).
    """

    bank: Tensor
    bank_ptr: Tensor

    def __init__(self, size: int | Sequence[int], gather_distributed: bool = False, feature_dim_first: bool = True):
        super().__init__()
        sizes = (size,) if isinstance(size, int) else tuple(size)
        if any(x < 0 for x in sizes):
            raise ValueError(f"Illegal memory bank size {size}, all entries must be non-negative.")
        if len(sizes) != 2 and not isinstance(size, int) and sizes != (0,):
            raise ValueError(f"Illegal memory bank size {size}, it must be (K, D), or 0 for no bank")
        if isinstance(size, int) and size > 0:
            warnings.warn(
                f"Memory bank size 'size={size}' does not specify feature dimension. It is recommended to set the"
                " feature dimension with 'size=(n, dim)' when creating the memory bank. Distributed training might fail"
                " if the feature dimension is not set.",
                stacklevel=2,
            )
        self.size = sizes
        self.gather_distributed, self.feature_dim_first = gather_distributed, feature_dim_first
        self.register_buffer("bank", torch.empty(sizes, dtype=torch.float), persistent=False)
        self.register_buffer("bank_ptr", torch.empty(1, dtype=torch.long), persistent=False)
        if len(sizes) == 2:
            self._init_memory_bank(sizes)

    def forward(
        self, output: Tensor, labels: Tensor | None = None, update: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """output, and the bank as it was before output was written to it, if `update` says so. labels: not used."""
        bank = self.rows(output)
        if bank is None:
            return output, None
        bank = bank.clone()
        if update:
            self._dequeue_and_enqueue(output)
        return output, bank.transpose(0, -1) if self.feature_dim_first else bank

    def rows(self, output: Tensor) -> Tensor | None:
        """The bank itself [K, D], to be read before it is written; None where there is none."""
        if self.size[0] == 0:
            return None
        if self.bank.ndim == 1:
            self._init_memory_bank((*self.size, *output.shape[1:]))
        return self.bank.detach()

    @torch.no_grad()
    def _init_memory_bank(self, size: tuple[int, ...]) -> None:
        self.bank = unit(torch.randn(size).type_as(self.bank))
        self.bank_ptr = torch.zeros_like(self.bank_ptr)

    @torch.no_grad()
    def _dequeue_and_enqueue(self, batch: Tensor) -> None:
        batch = gather(batch, _ranks(self.gather_distributed, "MemoryBankModule", batch=batch))
        first, size = int(self.bank_ptr), self.size[0]
        end = min(first + len(batch), size)
        self.bank[first:end] = batch[: end - first]
        self.bank_ptr.fill_(end % size)


class NNMemoryBankModule(MemoryBankModule):
    """The support set of NNCLR: returns for each row of a batch the nearest of the bank, which is not normalised.

    Example:
        >>> from sslkern.compat.lightly import NNMemoryBankModule, NTXentLoss
        >>> criterion, nearest = NTXentLoss(), NNMemoryBankModule(size=(4096, 32))
        >>> (z0, p0), (z1, p1) = torch.randn(2, 2, 64, 32, requires_grad=True)
        >>> z0, z1 = nearest(z0.detach(), update=False), nearest(z1.detach(), update=True)
        >>> (0.5 * (criterion(z0, p1) + criterion(z1, p0))).backward()
    """

    def __init__(self, size: int | Sequence[int]):
        super().__init__(size)

    def forward(self, output: Tensor, update: bool = False) -> Tensor:  # type: ignore[override]  # as there
        bank = self.rows(output)
        assert bank is not None, "size must be (K, D) with rows to choose from"
        bank = bank.to(output.device)
        with torch.no_grad():
            query, keys = promoted(unit(output), unit(bank))
            _, index = similarity_topk(query, keys, 1)
            nearest = bank.index_select(0, index.squeeze(1))
        if update:
            self._dequeue_and_enqueue(output)
        return nearest


# ---- losses ----------------------------------------------------------------------------------------------------------


class NTXentLoss(nn.Module):
    """The loss of SimCLR, or with a memory bank that of MoCo. Formula: `sslkern.functional.nt_xent`, `moco`.

    Args:
        temperature: divides the similarities; it may be negative.
        memory_bank_size: (K, D) of `MemoryBankModule`, whose rows are the negatives then. out1 is written to it after
            the loss, where out0 requires a gradient.
        gather_distributed: take the negatives of all ranks, or write the features of all to the memory bank.

    Example:
        >>> from sslkern.compat.lightly import NTXentLoss
        >>> out0, out1 = torch.randn(2, 256, 128, requires_grad=True)
        >>> NTXentLoss(temperature=0.1)(out0, out1).backward()
    """

    def __init__(
        self,
        temperature: float = 0.5,
        memory_bank_size: int | Sequence[int] = 0,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.memory_bank = MemoryBankModule(memory_bank_size, gather_distributed)
        self.temperature = temperature
        self.gather_distributed = gather_distributed
        if abs(temperature) < EPS:
            raise ValueError(f"temperature must not be nearer to 0 than {EPS}, not {temperature}")
        _check_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        bank = self.memory_bank.rows(out1)
        if bank is not None:
            return typed_as(self._over_bank(out0, out1, bank.to(out0.device)), out0)
        ranks = _ranks(self.gather_distributed, "NTXentLoss", out0=out0, out1=out1)
        if ranks is None:
            return typed_as(nt_xent(out0, out1, self.temperature, group="self"), out0)
        negative, positive, _ = _negatives_and_positives(out0, out1, self.temperature, ranks)
        return typed_as(pair_loss(negative, positive).mean(), out0)

    def _over_bank(self, out0: Tensor, out1: Tensor, bank: Tensor) -> Tensor:
        query, key, bank = promoted(out0, out1, bank)
        query, key = check_pair("out0", query, "out1", key)
        check_alike("memory_bank", bank, "out0", query, "[K, D]")
        scale = scale_of(self.temperature, None, query)
        options: dict[str, Any] = dict(reduction="mean", stats=False, weights=None, label_smoothing=0.0)
        loss = over_bank(query, key, bank, scale, normalize=True, unit_bank=False, **options)
        if out0.requires_grad and torch.is_grad_enabled():
            self.memory_bank._dequeue_and_enqueue(unit(out1.detach()))
        return loss


class DCLLoss(nn.Module):
    """The decoupled loss, with weights of the positives by any function. Formula: `sslkern.functional.dcl`, `dclw`.

    Args:
        temperature: divides the similarities.
        weight_fn: the weights [N] of the positives of out0, from out0 and out1 [N, D], normalised; those of out1 from
            both in the other order.
        gather_distributed: take the negatives of all ranks.
    """

    def __init__(
        self,
        temperature: float = 0.1,
        weight_fn: Callable[[Tensor, Tensor], Tensor] | None = None,
        gather_distributed: bool = False,
    ):
        super().__init__()
        self.temperature = temperature
        self.weight_fn = weight_fn
        self.gather_distributed = gather_distributed
        _check_distributed(gather_distributed)

    def forward(self, out0: Tensor, out1: Tensor) -> Tensor:
        ranks = _ranks(self.gather_distributed, type(self).__name__, out0=out0, out1=out1)
        # Of one sample alone there is no negative: -inf, and so is the loss.
        negative, positive, (x, y) = _negatives_and_positives(out0, out1, self.temperature, ranks)
        if not self.weight_fn:
            return typed_as((negative - positive).mean(), out0)
        weighted = positive * self.weight_fn(x, y), positive * self.weight_fn(y, x)
        loss = 0.5 * ((negative[0] - weighted[0]).mean() + (negative[1] - weighted[1]).mean())
        return typed_as(loss, out0)


def _negatives_and_positives(
    out0: Tensor, out1: Tensor, temperature: float | Tensor, ranks: Ranks | None
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """The log-sum-exp of the negatives [2, N], the scores of the positives [N], and out0 and out1, normalised."""
    out0, out1 = check_pair("out0", out0, "out1", out1, ranks)
    scale = scale_of(temperature, None, out0)
    x, y = unit(out0), unit(out1)
    z, ids = cat((x, y)), row_ids(x.shape[0], x.device, ranks).repeat(2)
    if ranks is not None and isinstance(scale, Tensor) and scale.requires_grad:
        # Its gradient is that of the loss of this rank: none of its pairs is left to another one, as with k=None.
        negative = similarity_lse(z, z, scale, q_ids=ids, k_ids=ids, ranks=copies(ranks, 2))
    else:
        negative = similarity_lse(z, scale=scale, q_ids=ids, ranks=copies(ranks, 2))
    return negative.view(2, -1), times(dots(x, y), scale), (x, y)


class DCLWLoss(DCLLoss):
    """The decoupled loss with the weights of its paper, `negative_mises_fisher_weights`.

    Args:
        temperature, gather_distributed: as in `DCLLoss`. The mean of the weights is 1 over the samples of a rank.
        sigma: the smaller, the more the weights differ.

    Example:
        >>> from sslkern.compat.lightly import DCLWLoss
        >>> out0, out1 = torch.randn(2, 256, 128, requires_grad=True)
        >>> DCLWLoss(sigma=0.5)(out0, out1).backward()
    """

    def __init__(self, temperature: float = 0.1, sigma: float = 0.5, gather_distributed: bool = False):
        super().__init__(temperature, functools.partial(negative_mises_fisher_weights, sigma=sigma), gather_distributed)


def negative_mises_fisher_weights(out0: Tensor, out1: Tensor, sigma: float = 0.5) -> Tensor:
    """2 - N softmax(<out0_i, out1_i> / sigma), [N], without gradient."""
    cosine = dots(out0.detach(), out1.detach())
    return (2 - out0.shape[0] * torch.softmax(cosine / sigma, 0)).to(out0.dtype)
