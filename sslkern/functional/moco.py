"""MoCo: He et al., "Momentum Contrast for Unsupervised Visual Representation Learning", 2019; v2: Chen et al.,
"Improved Baselines with Momentum Contrastive Learning", 2020, the same loss; v3: Chen et al., "An Empirical Study of
Training Self-Supervised Vision Transformers", 2021."""

from typing import Any

from torch import Tensor

from ..common.arguments import describe
from ..common.numbers import check_number
from ..common.tensors import TensorOrTuple
from ..distributed import Group, gather, push_rows, ranks_of, rows_and_shard, with_rows, within
from ..ops.queue_push import check_push, queue_push_
from .checks import check_alike, check_features, check_options, check_weights, promoted, scale_of
from .formulas import reduce
from .info_nce import info_nce, over_bank


def moco(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor = 0.07,
    *,
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    stats: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    ptr: Tensor | None = None,
) -> TensorOrTuple:
    """The loss of MoCo v1 (eq. 1 of https://arxiv.org/abs/1911.05722) and v2 (https://arxiv.org/abs/2003.04297).

    Each query has to find its key, which the momentum encoder made of the other view, among the keys of earlier
    batches. Keys and queue get no gradient, and the queue may be overwritten before the backward. A key that requires
    one is detached, as by the `no_grad` of the published code; `info_nce(query, key, queue)` lets it learn.

                k0 k1 k2   n0 n1 .. nK        n: the queue; + positive, - negative, . left out
            q0   +  .  .    -  -     -
            q1   .  +  .    -  -     -

    Args:
        query, key: [N, D], row i of both are views of sample i. fp32, bf16, fp16 or fp64.
        queue: [K, D], the keys as they are to be compared: `FeatureQueue` has normalised them. Its buffer (D, K) is
            passed as `memory.queue.t()`. In the type of query; inside autocast in any, as the key may be.
        normalize: divide query and key, but not the queue, by their norm.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`. The queue is the same on all of
            them, as `FeatureQueue(..., group=...)` keeps it, and nothing but sums is exchanged; or each has a part of
            it, of `FeatureQueue(..., group=..., sharded=True)`, and queries are.
        temperature, logit_scale, reduction, stats, weights, label_smoothing: as in `info_nce`.
        ptr: int64 [1], the row of the queue to write next, `memory.queue_ptr`: after the loss the keys are pushed onto
            the queue, as `memory.push(key)` does, which for small batches on a GPU takes no launch of its own then.
            With a group the keys of all its processes are pushed. None: the queue stays as it is.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64); with `stats` also the share of queries that find their key.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> memory = sslkern.FeatureQueue(dim=128, size=4096)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss = sslkern.functional.moco(query, key, memory.queue.t())
        >>> memory.push(key)  # also allowed before the backward
        >>> loss.backward()
    """
    ranks = None
    if group is not None:
        given = dict(query=query, key=key, queue=queue, temperature=temperature, logit_scale=logit_scale)
        options: dict[str, Any] = dict(normalize=normalize, reduction=reduction, stats=stats)
        options |= dict(label_smoothing=label_smoothing)
        ranks = ranks_of(group, strategy, grad_reduce, "moco", **given, weights=weights, ptr=ptr, **options)
    given_queue, shard = rows_and_shard("queue", queue, ranks)
    query, key, queue = promoted(query, key, given_queue)
    check_features("query", query, ranks)
    check_alike("key", key, "query", query)
    check_alike("queue", queue, "query", query, "[K, D]")
    if queue.ndim != 2:
        raise ValueError(f"queue must be [K, {query.shape[1]}], not {describe(queue)}")
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize, stats=stats)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
    check_weights(weights, query.shape[0], query)
    if ptr is not None:
        check_push(given_queue, ptr, key, normalize)
    scale, key, queue = scale_of(temperature, logit_scale, query, ranks), key.detach(), queue.detach()
    options = dict(normalize=normalize, unit_bank=False, reduction=reduction, stats=stats, weights=weights)
    options |= dict(label_smoothing=label_smoothing, ranks=ranks)
    if ranks is None and queue.dtype == given_queue.dtype:
        return over_bank(query, key, queue, scale, **options, ptr=ptr)
    # The keys of all ranks are pushed, and onto the queue that was given: promoted, it is a copy.
    result = over_bank(query, key, with_rows(shard, queue), scale, **options)
    if ptr is not None and ranks is not None and shard is not None:
        push_rows(shard, ptr, key, normalize, ranks)
    elif ptr is not None:
        queue_push_(given_queue, ptr, gather(key, ranks), normalize)
    return result


def moco_v3(
    query0: Tensor,
    query1: Tensor,
    key0: Tensor,
    key1: Tensor,
    temperature: float | Tensor = 0.2,
    *,
    times_2t: bool = True,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """The loss of MoCo v3 (algorithm 1 of https://arxiv.org/abs/2104.02057): in-batch InfoNCE, of both views.

        loss_i = 2T (l(query0_i, key1) + l(query1_i, key0))

    with l the cross-entropy of the own key among the keys of the batch. Keys get no gradient: those that require one
    are detached, as by the `no_grad` of the published code; `info_nce(query0, key1)` lets them learn.

                c0 c1 c2        q: query0, c: key1; the same for query1 and key0
            q0   +  -  -        + positive, - negative
            q1   -  +  -

    Args:
        query0, query1: [N, D], both views through encoder and predictor. fp32, bf16, fp16 or fp64.
        key0, key1: [N, D], both views through the momentum encoder.
        times_2t: multiply by twice the temperature as published, or not.
        temperature, logit_scale, ids, normalize, reduction, weights, label_smoothing: as in `info_nce`.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64). A row without negatives adds 0 and counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> queries, keys = torch.randn(2, 64, 32, requires_grad=True), torch.randn(2, 64, 32)
        >>> sslkern.functional.moco_v3(*queries, *keys, temperature=0.2).backward()
    """
    ranks = None
    if group is not None:
        given: dict[str, Any] = dict(
            query0=query0, query1=query1, key0=key0, key1=key1, temperature=temperature, times_2t=times_2t
        )
        options: dict[str, Any] = dict(
            logit_scale=logit_scale, ids=ids, normalize=normalize, reduction=reduction, weights=weights
        )
        given |= options | dict(label_smoothing=label_smoothing)
        ranks = ranks_of(group, strategy, grad_reduce, "moco_v3", **given)
    query0, query1, key0, key1 = promoted(query0, query1, key0, key1)
    check_features("query0", query0, ranks)
    for name, x in (("query1", query1), ("key0", key0), ("key1", key1)):
        check_alike(name, x, "query0", query0)
    check_options(reduction, group, strategy, grad_reduce, times_2t=times_2t, normalize=normalize)
    check_weights(weights, query0.shape[0], query0)
    scale = scale_of(temperature, logit_scale, query0, ranks)
    if times_2t and isinstance(scale, float) and scale == 0:
        raise ValueError("logit_scale must not be 0 with times_2t=True, which divides by it")
    options = dict(logit_scale=scale, ids=ids, normalize=normalize, label_smoothing=label_smoothing, reduction="none")
    options |= dict(group=within(ranks) or group)
    losses = info_nce(query0, key1.detach(), **options) + info_nce(query1, key0.detach(), **options)
    if times_2t:
        losses = losses * (2 / scale)
    return reduce(losses, reduction, weights, ranks)
