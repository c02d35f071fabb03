"""NNCLR: Dwibedi et al., "With a Little Help from My Friends", nearest-neighbour contrastive learning, 2021."""

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import check_flags
from ..common.autocast import cat
from ..common.rows import unit
from ..common.tensors import TensorOrTuple
from ..distributed import Group, Ranks, Shard, copies, nearest_over_shards, ranks_of, rows_and_shard
from ..ops import similarity_topk
from .checks import check_alike, check_features, check_options, promoted
from .info_nce import info_nce


def nnclr(
    z0: Tensor,
    z1: Tensor,
    p0: Tensor,
    p1: Tensor,
    support: Tensor,
    temperature: float | Tensor = 0.1,
    *,
    two_way: bool = False,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    stats: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> TensorOrTuple:
    """The NNCLR loss (eq. 3 of https://arxiv.org/abs/2104.14548) of two views of the same N samples.

    Each embedding is replaced by its nearest neighbour among earlier embeddings, and the prediction from the other view
    has to find it:

                                  p1_0   p1_1   p1_2
        nearest support to z0_0    +      -      -       and likewise the neighbours of z1 with p0;
        nearest support to z0_1    -      +      -       + positive, - negative
        nearest support to z0_2    -      -      +

    Args:
        z0, z1: [N, D], the projections of the views; they choose the neighbours and get no gradient. fp32, bf16, fp16
            or fp64.
        p0, p1: [N, D], the predictions from z0 and z1.
        support: [K, D], the support set (`FeatureQueue.queue.t()`), without gradient.
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        two_way: also let each neighbour be found by its prediction among all neighbours, and take the mean.
        logit_scale: multiplies the similarities instead and replaces `temperature`; already exponentiated.
        ids: int64 [N]; samples with equal ids are not negatives of each other. Default: all differ.
        normalize: divide all rows by their norm first. Without it, neighbours are nearest by dot product.
        reduction: "mean" or "sum" over the N samples, or "none".
        stats: also return the share of rows whose positive beats every negative; a tie is no win, as in `info_nce`.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`. The support set is the same on
            all of them, as `FeatureQueue(..., group=...)` keeps it, or sharded over them.

    Returns:
        The mean of the losses of both views, 0-d, or for "none" [N], in fp32 (fp64). With `stats` a pair of it and the
        share, 0-d without gradient. A row without negatives adds 0 and counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> memory = sslkern.FeatureQueue(dim=32, size=4096)
        >>> z0, z1, p0, p1 = torch.randn(4, 64, 32, requires_grad=True)
        >>> loss = sslkern.functional.nnclr(z0, z1, p0, p1, memory.queue.t())
        >>> memory.push(z0)
        >>> loss.backward()
    """
    ranks = None
    if group is not None:
        given = dict(z0=z0, z1=z1, p0=p0, p1=p1, support=support, temperature=temperature, two_way=two_way)
        options: dict[str, Any] = dict(
            logit_scale=logit_scale, ids=ids, normalize=normalize, reduction=reduction, stats=stats
        )
        ranks = ranks_of(group, strategy, grad_reduce, "nnclr", **given, **options)
    support, shard = rows_and_shard("support", support, ranks)
    z0, z1, p0, p1, support = promoted(z0, z1, p0, p1, support)
    check_features("z0", z0, ranks)
    for name, x in (("z1", z1), ("p0", p0), ("p1", p1)):
        check_alike(name, x, "z0", z0)
    check_options(reduction, group, strategy, grad_reduce, two_way=two_way, normalize=normalize, stats=stats)
    near0, near1 = _nearest(cat((z0, z1)), support, normalize, ranks, shard).view(2, *z0.shape)
    options = dict(two_way=two_way, logit_scale=logit_scale, ids=ids, normalize=normalize, reduction=reduction)
    options |= dict(stats=stats, group=ranks or group)
    first, second = (info_nce(*pair, None, temperature, **options) for pair in ((near0, p1), (near1, p0)))
    if stats:
        return tuple((a + b) / 2 for a, b in zip(first, second, strict=True))
    return (first + second) / 2


def nearest_neighbors(z: Tensor, support: Tensor, *, normalize: bool = True) -> Tensor:
    """The row of a support set that is nearest to each embedding (eq. 4 of https://arxiv.org/abs/2104.14548).

    Args:
        z: [N, D], fp32, bf16, fp16 or fp64.
        support: [K, D], the type of z.
        normalize: compare by cosine; else by dot product. The rows themselves come back as they are.

    Returns:
        [N, D], rows of support, without gradient. Of equally near ones the first; for a z with NaN, the last.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Example:
        >>> z, support = torch.randn(64, 32), torch.randn(4096, 32)
        >>> sslkern.functional.nearest_neighbors(z, support).shape
        torch.Size([64, 32])
    """
    z, support = promoted(z, support)
    return _nearest(z, support, normalize)


def _nearest(
    z: Tensor, support: Tensor, normalize: bool, ranks: Ranks | None = None, shard: Shard | None = None
) -> Tensor:
    """support: all of it, or the rows here of a shard; of that z are two views of each sample."""
    check_features("z", z, ranks)
    check_features("support", support)
    check_alike("support", support, "z", z, "[K, D]")
    check_flags(normalize=normalize)
    if shard is not None and (pairs := copies(ranks, 2)) is not None:
        return nearest_over_shards(z, shard.of(support), normalize, pairs)
    with torch.no_grad():
        # The length of z does not change which is nearest.
        _, index = similarity_topk(z, unit(support) if normalize else support, 1)
        return support[index[:, 0]]
