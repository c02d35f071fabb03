"""InfoNCE of info-nce-pytorch 0.1.4 (https://github.com/RElbers/info-nce-pytorch).

    from sslkern.compat.info_nce import InfoNCE, info_nce

It does not import info_nce. docs/migrate_info_nce.md has the differences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import functional
from ..common.arguments import check_choice
from ..common.autocast import autocast_active
from ..common.rows import EPS, dots, unit
from ..common.sums import pair_loss, times
from ..functional.checks import check_alike, check_pair, promoted, scale_of
from ..functional.formulas import reduce
from ..ops import logsumexp, sampled_similarity
from ._dense import few, warn_once

__all__ = ["InfoNCE", "info_nce"]

# Up to which, on a CPU, storing the scores is quicker, forward and backward; measured from 32 to 512 features. Within a
# batch there are N x N x D products, over shared negatives N x M scores, over those of each query N x M x D features.
FEW_PRODUCTS, FEW_SCORES, FEW_FEATURES = 2**22, 2**17, 2**17


class InfoNCE(nn.Module):
    """A query has to find its positive key among negatives. Formula: `sslkern.functional.info_nce`.

    Args:
        temperature: divides the similarities: a number, or a tensor, which may learn.
        reduction: "mean" or "sum" over the queries, or "none".
        negative_mode: "unpaired", all queries share negatives [M, D], or "paired", each has its own, [N, M, D]. Without
            negatives those of a query are the positive keys of the others.

    Example:
        >>> from sslkern.compat.info_nce import InfoNCE
        >>> query, positive_key = torch.randn(2, 32, 128, requires_grad=True)
        >>> InfoNCE(temperature=0.1)(query, positive_key, torch.randn(48, 128)).backward()
    """

    def __init__(self, temperature: float | Tensor = 0.1, reduction: str = "mean", negative_mode: str = "unpaired"):
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.negative_mode = negative_mode

    def forward(self, query: Tensor, positive_key: Tensor, negative_keys: Tensor | None = None) -> Tensor:
        options = self.temperature, self.reduction, self.negative_mode
        return info_nce(query, positive_key, negative_keys, *options)


def info_nce(
    query: Tensor,
    positive_key: Tensor,
    negative_keys: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    reduction: str = "mean",
    negative_mode: str = "unpaired",
) -> Tensor:
    """The loss of `InfoNCE`."""
    _check(query, positive_key, negative_keys, negative_mode)
    why = _why_dense(query, positive_key, negative_keys, temperature)
    if why:
        warn_once(info_nce, why)
    if why or _is_small(query, negative_keys):
        return _dense(query, positive_key, negative_keys, temperature, reduction)
    dtype = query.dtype
    if isinstance(temperature, Tensor):
        if temperature.ndim > 0:
            dtype = torch.promote_types(dtype, temperature.dtype)
        temperature = temperature.to(query.device)
    if negative_keys is None or negative_keys.ndim == 2:
        given = query, positive_key, negative_keys, temperature
        loss = functional.info_nce(*given, reduction=reduction, group="self")
    else:
        loss = _over_own(query, positive_key, negative_keys, temperature, reduction)
    return loss if autocast_active(query.device.type) else loss.to(dtype)


def transpose(x: Tensor) -> Tensor:
    """The last two dimensions, exchanged."""
    return x.mT


def normalize(*xs: Tensor | None) -> list[Tensor | None]:
    """Rows divided by their norm; None stays."""
    return [x if x is None else F.normalize(x, dim=-1) for x in xs]


def _check(query: Tensor, positive_key: Tensor, negative_keys: Tensor | None, negative_mode: str) -> None:
    given = [("query", query, 2), ("positive_key", positive_key, 2)]
    if negative_keys is not None:
        check_choice("negative_mode", negative_mode, "unpaired", "paired")
        given.append(("negative_keys", negative_keys, 3 if negative_mode == "paired" else 2))
    for name, x, dims in given:
        if x.ndim != dims:
            mode = f" where negative_mode is {negative_mode!r}" if name == "negative_keys" else ""
            raise ValueError(f"{name} must have {dims} dimensions{mode}, not {x.ndim}")
        if x.shape[-1] != query.shape[-1]:
            raise ValueError(f"{name} must have the {query.shape[-1]} features of query, not {x.shape[-1]}")
        if (dims == 3 or name == "positive_key") and len(x) != len(query):
            raise ValueError(f"{name} must have the {len(query)} rows of query, not {len(x)}")


def _why_dense(query: Tensor, key: Tensor, negatives: Tensor | None, temperature: float | Tensor) -> str | None:
    """What the fused loss cannot do, if anything, and what to change."""
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1:
            return f"temperature has {temperature.numel()} elements; pass one"
    elif temperature == 0:
        return "temperature is 0; pass another number"
    dtypes = {x.dtype for x in (query, key, negatives) if x is not None}
    if len(dtypes) > 1 and not autocast_active(query.device.type):
        return "query, positive_key and negative_keys have several types; convert them to one"
    return None


def _is_small(query: Tensor, negatives: Tensor | None) -> bool:
    """Whether all scores are to be stored: of a few, and of nothing, whose mean is NaN."""
    N = len(query)
    if N == 0:
        return True
    if negatives is None:
        return few(query, N * query.numel(), FEW_PRODUCTS)
    if negatives.ndim == 2:
        return few(query, N * len(negatives), FEW_SCORES)
    return few(query, negatives.numel(), FEW_FEATURES)


def _dense(query: Tensor, key: Tensor, negatives: Tensor | None, temperature: float | Tensor, reduction: str) -> Tensor:
    query, key = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
    targets = torch.arange(len(query), device=query.device)
    if negatives is None:
        scores = query @ key.T
    else:
        negatives = F.normalize(negatives, dim=-1)
        positive = (query * key).sum(1, keepdim=True)
        others = query @ negatives.T if negatives.ndim == 2 else (query.unsqueeze(1) @ negatives.mT).squeeze(1)
        scores, targets = torch.cat((positive, others), 1), torch.zeros_like(targets)
    return F.cross_entropy(scores / temperature, targets, reduction=reduction)


def _over_own(query: Tensor, key: Tensor, negatives: Tensor, temperature: float | Tensor, reduction: str) -> Tensor:
    """Each query over negatives of its own [N, M, D], of which no normalised copy is made: scores are divided by their
    norms."""
    query, key, negatives = promoted(query, key, negatives)
    query, key = check_pair("query", query, "positive_key", key)
    check_alike("negative_keys", negatives, "query", query, "[N, M, D]")
    check_choice("reduction", reduction, "mean", "sum", "none")
    scale, (N, M, D) = scale_of(temperature, None, query), negatives.shape
    query, key = unit(query), unit(key)
    dot = sampled_similarity(query, negatives.reshape(N * M, D), torch.arange(N * M, device=query.device).view(N, M))
    norm = torch.linalg.vector_norm(negatives, dim=-1, dtype=dot.dtype).clamp_min(EPS)
    losses = pair_loss(logsumexp(times(dot / norm, scale), -1), times(dots(query, key), scale))
    return reduce(losses, reduction)
