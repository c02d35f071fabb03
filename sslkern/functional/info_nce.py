"""InfoNCE: van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (CPC), 2018."""

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import check_flags, describe
from ..common.autocast import product, stack
from ..common.numbers import check_number
from ..common.rows import dots, unit
from ..common.sums import pair_loss, times
from ..common.tensors import TensorOrTuple, transformed, wide
from ..distributed import (
    Group,
    Ranks,
    Shard,
    lse_over_shards,
    pair_contrast_over,
    ranks_of,
    replicated,
    rows_and_shard,
    total_of,
    with_rows,
)
from ..ops import queue_push_
from ..ops.pair_contrast import pair_contrast
from ._pairs import above_mean, over_different, own_ids, row_and_best
from .checks import check_alike, check_ids, check_options, check_pair, check_weights, promoted, scale_of
from .formulas import at_once_of, beaten, logaddexp, reduce, tie


def info_nce(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    in_batch: bool | None = None,
    two_way: bool = False,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    negative_ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    stats: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> TensorOrTuple:
    """InfoNCE (eq. 4 of https://arxiv.org/abs/1807.03748): each query has to find its key among negatives.

    The negatives are the other keys of the batch (CPC; with `two_way` CLIP, https://arxiv.org/abs/2103.00020), given
    ones such as a queue (MoCo, eq. 1 of https://arxiv.org/abs/1911.05722), or both. The similarities are never stored,
    and negatives that need no gradient may be overwritten before the backward.

                k0 k1 k2   n0 n1        + positive, - negative
            q0   +  -  -    -  -        k: in_batch, n: negatives
            q1   -  +  -    -  -

    Args:
        query, key: [N, D], row i of key is the positive of row i of query. fp32, bf16, fp16 or fp64; of
            several types, which only autocast allows, the loss is computed in the widest.
        negatives: [M, D] for all queries, or [N, M, D] with their own for each. A queue stored as (D, M) is passed
            as `queue.t()`.
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        in_batch: whether the other keys are negatives. None: only if no `negatives` are given.
        two_way: the mean of the losses query -> key and key -> query, from one pass. Not with `negatives`.
        logit_scale: multiplies the similarities instead and replaces `temperature`; already exponentiated.
        ids: int64 [N]; rows with equal ids are not negatives of each other (a caption's hash, a label). Default: all
            differ.
        negative_ids: int64 [M] or [N, M]; a negative with the id of a row is none for that row. Needs `ids`.
        normalize: divide all rows by their norm first (cosine similarity).
        reduction: "mean" or "sum" over the N rows, or "none".
        stats: also return the share of rows whose positive beats every negative (with `two_way`, of both directions); a
            tie, up to rounding, is no win, so that a collapsed encoder has a share of 0.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`. `negatives` [M, D] are the same
            on all of them, or those of a memory that is sharded over them; [N, M, D] and all others have this process's
            rows.
        weights: floating point [N], w_i for row i: "mean" is sum w_i l_i / sum w_i.
        label_smoothing: in [0, 1), the share of the target that is spread over the positive and all negatives.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64). With `stats` a pair of it and the share, 0-d without
        gradient. A row without negatives adds 0 and counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> images, texts = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32)
        >>> sslkern.functional.info_nce(images, texts, two_way=True, logit_scale=14.0).backward()  # CLIP
        >>> queue = torch.randn(4096, 32)
        >>> loss = sslkern.functional.info_nce(images, texts, queue, temperature=0.07)  # MoCo
    """
    ranks = None
    if group is not None:
        given = dict(query=query, key=key, negatives=negatives, temperature=temperature, logit_scale=logit_scale)
        given |= dict(ids=ids, negative_ids=negative_ids, weights=weights, in_batch=in_batch, two_way=two_way)
        options: dict[str, Any] = dict(normalize=normalize, reduction=reduction, stats=stats)
        options |= dict(label_smoothing=label_smoothing)
        ranks = ranks_of(group, strategy, grad_reduce, "info_nce", **given, **options)
    shard = None
    if negatives is not None:
        negatives, shard = rows_and_shard("negatives", negatives, ranks)
        negative_ids, shard_of_ids = rows_and_shard("negative_ids", negative_ids, ranks)
        if negative_ids is not None and (shard is None) != (shard_of_ids is None):
            raise ValueError("negatives and negative_ids must both be those of a sharded memory, or none of them")
        query, key, negatives = promoted(query, key, negatives)
    query, key = check_pair("query", query, "key", key, ranks)
    check_options(reduction, group, strategy, grad_reduce, two_way=two_way, normalize=normalize, stats=stats)
    scale = scale_of(temperature, logit_scale, query, ranks)
    if negatives is not None:
        _check_negatives(negatives, query, two_way)
    if in_batch is None:
        in_batch = negatives is None
    else:
        check_flags(in_batch=in_batch)
    if not in_batch and negatives is None:
        raise ValueError("in_batch=False leaves no negatives; pass negatives or leave in_batch out")
    label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
    if weights is not None:
        check_weights(weights, query.shape[0], query)
    if ids is not None:
        check_ids("ids", ids, query.shape[:1], query)
    if negative_ids is not None:
        if ids is None or negatives is None:
            raise ValueError("negative_ids needs negatives and ids: the ids of the rows to compare them with")
        check_ids("negative_ids", negative_ids, tuple(negatives.shape[:-1]), query)
    if shard is not None and negative_ids is not None and label_smoothing > 0:
        raise ValueError("label_smoothing must be 0 with the negative_ids of a sharded memory, which it would sum over")

    options = dict(normalize=normalize, reduction=reduction, stats=stats, weights=weights)
    options |= dict(label_smoothing=label_smoothing, ranks=ranks)
    if negatives is None:
        return _over_batch(query, key, scale, ids, two_way, **options)
    learns = negatives.requires_grad or transformed()
    negatives = with_rows(shard, negatives)
    if negative_ids is not None:
        negative_ids = with_rows(shard, negative_ids)
    if negatives.ndim == 2 and negative_ids is None and not in_batch and not learns:
        return over_bank(query, key, negatives, scale, unit_bank=normalize, **options)
    return _over_given(query, key, negatives, scale, ids, negative_ids, in_batch, unit_negatives=normalize, **options)


def _over_batch(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor,
    ids: Tensor | None,
    two_way: bool,
    *,
    normalize: bool,
    reduction: str,
    stats: bool,
    weights: Tensor | None,
    label_smoothing: float,
    ranks: Ranks | None,
) -> TensorOrTuple:
    """The loss over the other keys of the batch, one way or both."""
    at_once = at_once_of(reduction, weights, label_smoothing, ranks)
    mode = "two_way" if two_way else "one_way"
    contrast = pair_contrast if ranks is None else pair_contrast_over(ranks)
    losses, positive, best = contrast(query, key, scale, ids, mode, normalize, stats, None, at_once)
    room = tie(scale, query, key, normalize) if stats else 0.0
    if label_smoothing > 0:
        if normalize:
            query, key = unit(query), unit(key)
        ids, cosine = own_ids(ids, query, ranks), dots(query, key)
        smooth = [above_mean(cosine, *over_different(query, key, ids, ids, ranks))]
        if two_way:
            smooth.append(above_mean(cosine, *over_different(key, query, ids, ids, ranks)))
        losses = losses + label_smoothing * scale * stack(smooth)
    if at_once == "none":
        if reduction != "mean" or weights is not None:  # else one mean serves for both ways and the rows
            losses = losses.mean(0)
        losses = reduce(losses, reduction, weights, ranks)
    if best is not None:
        return losses, beaten(best, positive, room, ranks)
    return losses


def over_bank(
    query: Tensor,
    key: Tensor,
    bank: Tensor | Shard,
    scale: float | Tensor,
    *,
    normalize: bool,
    unit_bank: bool,
    reduction: str,
    stats: bool,
    weights: Tensor | None,
    label_smoothing: float,
    ptr: Tensor | None = None,
    ranks: Ranks | None = None,
) -> TensorOrTuple:
    """The loss of queries over rows of a bank that get no gradient, which are normalised first where `unit_bank` says
    so. With a ptr the keys are pushed onto the bank then, unless it is sharded."""
    if isinstance(bank, Shard):
        given: dict[str, Any] = dict(normalize=normalize, reduction=reduction, stats=stats, weights=weights)
        given |= dict(unit_negatives=unit_bank, label_smoothing=label_smoothing, ranks=ranks)
        return _over_given(query, key, bank, scale, None, None, False, **given)
    if query.shape[0] == 0:  # a rank without rows, which takes part in the sums over ranks
        positive = times(dots(query, key), scale)
        loss = reduce(positive, reduction, weights, ranks)
        if stats:
            return loss, beaten(positive.detach(), positive, 0.0, ranks)
        return loss
    at_once = at_once_of(reduction, weights, label_smoothing, ranks)
    within = ptr  # the push, in the launches of the loss
    if label_smoothing > 0:  # which reads the bank once more
        within = None
        if unit_bank:
            bank, unit_bank = unit(bank), False
    options = "one_way", normalize, stats, bank, at_once, unit_bank, within
    loss, positive, best = pair_contrast(query, key, scale, None, *options)
    if label_smoothing > 0:
        q, k = query, key
        if normalize:
            q, k = unit(q), unit(k)
        above = above_mean(dots(q, k), *_sum_over_negatives(q, bank, None, None, ranks))
        loss = loss + label_smoothing * scale * above
        if ptr is not None:
            queue_push_(bank, ptr, key, normalize)
    if at_once == "none":
        loss = reduce(loss.squeeze(0), reduction, weights, ranks)
    if best is not None:
        return loss, beaten(best.squeeze(0), positive, tie(scale, query, key, normalize), ranks)
    return loss


def _over_given(
    query: Tensor,
    key: Tensor,
    negatives: Tensor | Shard,
    scale: float | Tensor,
    ids: Tensor | None,
    negative_ids: Tensor | Shard | None,
    in_batch: bool,
    *,
    normalize: bool,
    unit_negatives: bool,
    reduction: str,
    stats: bool,
    weights: Tensor | None,
    label_smoothing: float,
    ranks: Ranks | None,
) -> TensorOrTuple:
    """The loss over given negatives and, with `in_batch`, the other keys of the batch."""
    row_ids = own_ids(ids, query, ranks)
    if negatives.ndim == 2:
        negatives = replicated(negatives, ranks)
    if normalize:
        query, key = unit(query), unit(key)
    if unit_negatives:
        negatives = negatives.of(unit(negatives.rows)) if isinstance(negatives, Shard) else unit(negatives)
    cosine = dots(query, key)
    positive = times(cosine, scale)
    negative, best = _lse_over_negatives(query, negatives, scale, ids, negative_ids, stats, ranks)
    if in_batch:
        others, best_other = row_and_best(query, key, scale, q_ids=row_ids, k_ids=row_ids, need_best=stats, ranks=ranks)
        negative = logaddexp(negative, others)
        if best is not None and best_other is not None:
            best = torch.maximum(best, best_other)
    losses = pair_loss(negative, positive)
    if label_smoothing > 0:
        total, count = _sum_over_negatives(query, negatives, ids, negative_ids, ranks)
        if in_batch:
            others, number = over_different(query, key, row_ids, row_ids, ranks)
            total, count = total + others, count + number
        losses = losses + label_smoothing * scale * above_mean(cosine, total, count)
    loss = reduce(losses, reduction, weights, ranks)
    if best is not None:
        return loss, beaten(best, positive, tie(scale, query, key, normalize), ranks)
    return loss


def _check_negatives(negatives: Tensor, query: Tensor, two_way: bool) -> None:
    if two_way:
        raise ValueError("two_way=True cannot be combined with negatives: they have no direction key -> query")
    N, D = query.shape
    check_alike("negatives", negatives, "query", query, "[M, D] or [N, M, D]")
    if negatives.ndim not in (2, 3) or (negatives.ndim == 3 and negatives.shape[0] != N):
        raise ValueError(f"negatives must be [M, {D}] or [{N}, M, {D}], not {describe(negatives)}")


def _lse_over_negatives(
    query: Tensor,
    negatives: Tensor | Shard,
    scale: float | Tensor,
    ids: Tensor | None,
    negative_ids: Tensor | Shard | None,
    need_best: bool,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor | None]:
    """The log-sum-exp [N] over the given negatives and, where needed, their best score [N]."""
    if negative_ids is None:
        ids = None
    if isinstance(negatives, Shard):
        options: dict[str, Any] = dict(q_ids=ids, k_ids=negative_ids, best=need_best, ranks=ranks)
        out = lse_over_shards(query, negatives, scale, **options)
        return (out[0], out[1]) if need_best else (out, None)
    if negatives.ndim == 2:
        return row_and_best(query, negatives, scale, q_ids=ids, k_ids=negative_ids, need_best=need_best)
    if ids is not None:
        ids = ids.unsqueeze(1)
    # N problems of one row each.
    query = query.unsqueeze(1)
    row, best = row_and_best(query, negatives, scale, q_ids=ids, k_ids=negative_ids, need_best=need_best)
    return row.reshape(-1), None if best is None else best.reshape(-1)


def _sum_over_negatives(
    query: Tensor,
    negatives: Tensor | Shard,
    ids: Tensor | None,
    negative_ids: Tensor | Shard | None,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor | int]:
    """The sum [N] of the cosines with the given negatives, and their number."""
    if isinstance(negatives, Shard):
        return dots(query, total_of(wide(negatives.rows).sum(0), ranks)), negatives.size
    if negatives.ndim == 3 and ids is not None and isinstance(negative_ids, Tensor):
        counts, negatives = ids.unsqueeze(1) != negative_ids, wide(negatives)
        total = product(counts.unsqueeze(1).to(negatives.dtype), negatives).squeeze(1)
        return dots(query, total), counts.sum(1)
    if negatives.ndim == 3:
        return dots(query, wide(negatives).sum(1)), negatives.shape[1]
    if ids is not None and isinstance(negative_ids, Tensor):
        return over_different(query, negatives, ids, negative_ids)
    return dots(query, wide(negatives).sum(0)), negatives.shape[0]
