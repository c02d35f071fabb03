"""CPC: van den Oord et al., "Representation Learning with Contrastive Predictive Coding", 2018."""

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import FLOATS, check_choice, check_dense, check_devices, describe
from ..common.autocast import cat, product, stack
from ..common.rows import dots, unit
from ..common.sums import mean, pair_loss, times, total
from ..common.tensors import TensorOrTuple
from ..distributed import (
    Group,
    Ranks,
    all_rows,
    copies,
    over_ranks,
    ranks_of,
    replicated,
    row_ids,
)
from ._pairs import row_and_best
from .checks import check_features, check_options, promoted, scale_of
from .formulas import reduce, tie, wins

NEGATIVES = ("all", "sample", "time")


def cpc(
    context: Tensor,
    targets: Tensor,
    predictors: Tensor,
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
) -> TensorOrTuple:
    """CPC's InfoNCE (eq. 3 and 4 of https://arxiv.org/abs/1807.03748): the context predicts K steps ahead.

    The prediction W_k c_t of step k = 1 .. K is to be more similar to its target z_(t+k) than to other targets.
    What they are for step k = 2 from t = 1 of sample a, of T = 5 (`+` positive, `-` negative):

                          z of sample a        z of sample b
                   time   0  1  2  3  4        0  1  2  3  4
        "all"             -  -  -  +  -        -  -  -  -  -     any time of any sample
        "sample"                   +                    -        the same time of other samples
        "time"            -  -  -  +  -                          other times of the same sample

    Predictions with nothing left to predict, t + k >= T, are left out; the rest, of all steps, make one launch of
    `similarity_lse`: with groups of one time for "sample", of one sample for "time".

    Args:
        context: [N, T, Dc], c_t, what an autoregressive model made of the input up to t.
        targets: [N, T, Dz], z_t, the encoded input, in the type of context: fp32, bf16, fp16 or fp64.
        predictors: [K, Dz, Dc], the matrices W_k, 0 < K < T; cast to the type of context.
        temperature: divides the scores z^T W c: a nonzero number, or a tensor with one element that gets a gradient.
        logit_scale: multiplies them instead and replaces `temperature`; already exponentiated.
        negatives: "all", "sample" or "time", see above.
        normalize: divide predictions and targets by their norm first (cosine similarity).
        reduction: over the K losses of the steps, each of them the mean over its N (T - k) predictions: "mean", "sum",
            or "none".
        stats: also return the share of predictions that are most similar to their target, of each step; a tie is no
            win, as in `info_nce`. (An argmax over scores that begin with the positive, as in CPC_audio, counts it.)
        group, strategy, grad_reduce: the processes that share a batch, each with its own samples, as in `nt_xent`;
            predictors are the same on all of them, and so are the losses of the steps.

    Returns:
        The loss, 0-d, or for "none" [K], in fp32 (fp64). With `stats` a pair of it and the shares [K] without
        gradient. A prediction without negatives adds 0 and counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> context, targets = torch.randn(8, 50, 64, requires_grad=True), torch.randn(8, 50, 32)
        >>> predictors = torch.randn(12, 32, 64) / 8
        >>> losses, accuracy = sslkern.functional.cpc(context, targets, predictors, reduction="none", stats=True)
        >>> losses.mean().backward()
    """
    ranks = None
    if group is not None:
        given: dict[str, Any] = dict(context=context, targets=targets, predictors=predictors, temperature=temperature)
        given |= dict(logit_scale=logit_scale, negatives=negatives)
        options = dict(normalize=normalize, reduction=reduction, stats=stats)
        ranks = ranks_of(group, strategy, grad_reduce, "cpc", **given, **options)
    context, targets = promoted(context, targets)
    _check(context, targets, predictors, negatives, ranks)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize, stats=stats)
    scale, predictors = scale_of(temperature, logit_scale, context, ranks), replicated(predictors, ranks)
    (N, T, _), (K, Dz, _) = context.shape, predictors.shape

    every_step = predictors.to(context.dtype).flatten(0, 1)  # [K Dz, Dc]
    predicted = product(context.flatten(0, 1), every_step.T).view(N, T, K, Dz)
    # The predictions that have a target, step by step: S = sum_k (T - k) for each sample, and the targets' times.
    counts = [T - k for k in range(1, K + 1)]
    query = cat([predicted[:, :count, k] for k, count in enumerate(counts)], 1)  # [N, S, Dz]
    time = torch.cat([torch.arange(T - count, T, device=targets.device) for count in counts])  # [S]
    if normalize:
        query, targets = unit(query), unit(targets)
    target = cat([targets[:, T - count :] for count in counts], 1)  # [N, S, Dz]
    positive = times(dots(query, target), scale)  # [N, S]
    room = tie(scale, query, target, normalize) if stats else 0.0

    key, q_ids, k_ids = targets, time, torch.arange(T, device=targets.device)
    spread = None  # "time": N groups, each of keys that are here
    if negatives == "all":
        start = T * row_ids(N, targets.device, ranks)
        query, key, spread = query.flatten(0, 1), targets.flatten(0, 1), copies(ranks, T)
        q_ids, k_ids = (start.unsqueeze(1) + time).flatten(), row_ids(N * T, targets.device, spread)
    elif negatives == "sample":  # S groups
        query, key, spread = query.transpose(0, 1), target.transpose(0, 1), ranks
        q_ids = k_ids = row_ids(N, targets.device, ranks)
    row, best = row_and_best(query, key, scale, q_ids=q_ids, k_ids=k_ids, need_best=stats, ranks=spread)

    loss = reduce(_by_step(pair_loss(_by_sample(row, positive, negatives), positive), counts, ranks), reduction)
    if best is None:
        return loss
    won = wins(_by_sample(best, positive, negatives), positive, room)
    return loss, _by_step(won, counts, ranks)


def _by_sample(x: Tensor, positive: Tensor, negatives: str) -> Tensor:
    """x of all predictions, as their positives [N, S]; with negatives "sample" it came as [S, N]."""
    return x.T if negatives == "sample" else x.view_as(positive)


def _by_step(x: Tensor, counts: list[int], ranks: Ranks | None) -> Tensor:
    """[K] means of x [N, S], over the samples of all ranks."""
    steps = x.split(counts, 1)
    if ranks is None:
        return stack([mean(step) for step in steps])
    sums, N = over_ranks(stack([total(step) for step in steps]), ranks), all_rows(x.shape[0], ranks)
    return stack([of_step / (N * count) for of_step, count in zip(sums.unbind(), counts, strict=True)])


def _check(context: Tensor, targets: Tensor, predictors: Tensor, negatives: str, ranks: Ranks | None) -> None:
    for name, x in (("context", context), ("targets", targets)):
        check_dense(name, x)
        if not isinstance(x, Tensor) or x.ndim != 3:
            raise ValueError(f"{name} must be a tensor [N, T, D], not {describe(x)}")
        check_features(name, x.flatten(0, 1), ranks)
    if targets.shape[:2] != context.shape[:2]:
        wanted = [*context.shape[:2], "Dz"]
        raise ValueError(f"targets must be a tensor {wanted} to go with context, not {describe(targets)}")
    if targets.dtype != context.dtype:
        raise TypeError(f"targets must have the dtype of context, {context.dtype}, not {targets.dtype}; convert one")
    T, Dc, Dz = *context.shape[1:], targets.shape[2]
    check_dense("predictors", predictors)
    if not isinstance(predictors, Tensor) or predictors.ndim != 3 or predictors.shape[1:] != (Dz, Dc):
        raise ValueError(f"predictors must be a tensor [K, {Dz}, {Dc}], not {describe(predictors)}")
    if not 0 < predictors.shape[0] < T:
        raise ValueError(f"predictors must be for 1 to {T - 1} steps, as T is {T}, not for {predictors.shape[0]}")
    if predictors.dtype not in FLOATS:
        raise TypeError(f"predictors must be floating point, not {predictors.dtype}; convert it with .float()")
    check_devices("context", context, targets=targets, predictors=predictors)
    check_choice("negatives", negatives, *NEGATIVES)
