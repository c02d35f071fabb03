"""Hjelm et al., "Learning deep representations by mutual information estimation and maximization" (DIM), 2018."""

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import check_choice, describe
from ..common.rows import dots, unit
from ..common.sums import pair_loss, softplus, times
from ..distributed import Group, copies, gather, over_ranks, ranks_of, similarity_lse, similarity_softplus
from ._pairs import own_ids
from .checks import check_alike, check_features, check_options, promoted, scale_of
from .formulas import log_total_of, mean_of


def deep_infomax(
    features: Tensor,
    local_features: Tensor,
    estimator: str = "jsd",
    temperature: float | Tensor = 1.0,
    *,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> Tensor:
    """Minus an estimate of the mutual information between images and the parts that they are made of.

    The score `t` of an image and a location is the dot product of their features over `temperature` (section 4 of
    https://arxiv.org/abs/1808.06670, "encode-and-dot"). P are the scores of the L locations of the own image, Q those
    of all locations of the other images:

                    locations of  image 0   image 1   image 2
        features of image 0       + + + +   - - - -   - - - -
        features of image 1       - - - -   + + + +   - - - -      + P, positive; - Q, negative
        features of image 2       - - - -   - - - -   + + + +

        "jsd"      E_P[softplus(-t)] + E_Q[softplus(t)]                           (eq. 4, Jensen-Shannon)
        "infonce"  E_P[log(exp(t) + sum over Q of this image of exp(t')) - t]     (eq. 5, noise contrastive)
        "dv"       log E_Q[exp(t)] - E_P[t]                                       (eq. 2, Donsker-Varadhan)

    The scores of Q are never stored.

    Args:
        features: [N, D], one row per image. fp32, bf16, fp16 or fp64; sums run in fp32 (fp64).
        local_features: [N, L, D], those of the L locations of each image; a map [N, D, H, W] is passed as
            `map.flatten(2).transpose(1, 2)`. Or [N, D]: another view or layer of each image, L = 1.
        estimator: "jsd", "infonce" or "dv". DV estimates the information in nats, the others only order it.
        temperature: divides the scores: a nonzero number, or a tensor with one element that gets a gradient.
        logit_scale: multiplies them instead and replaces `temperature`; already exponentiated.
        ids: int64 [N]; images with equal ids are not negatives of each other. Default: all differ.
        normalize: divide the features by their norm first (cosine similarity).
        group, strategy, grad_reduce: the processes that share a batch, each with its own images, as in `nt_xent`.

    Returns:
        The loss, 0-d, in fp32 (fp64). Without any negatives "infonce" and "dv" are 0, and "jsd" has its first term.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> images, maps = torch.randn(16, 64, requires_grad=True), torch.randn(16, 64, 7, 7)
        >>> loss = sslkern.functional.deep_infomax(images, maps.flatten(2).transpose(1, 2), "jsd")
        >>> loss.backward()
    """
    ranks = None
    if group is not None:
        given = dict(features=features, local_features=local_features, estimator=estimator, temperature=temperature)
        options: dict[str, Any] = dict(logit_scale=logit_scale, ids=ids, normalize=normalize)
        ranks = ranks_of(group, strategy, grad_reduce, "deep_infomax", **given, **options)
    features, local_features = promoted(features, local_features)
    check_features("features", features, ranks)
    check_estimator(estimator)
    check_options("mean", group, strategy, grad_reduce, normalize=normalize)
    N, D = features.shape
    check_alike("local_features", local_features, "features", features, "[N, L, D] or [N, D]")
    if local_features.ndim not in (2, 3) or local_features.shape[0] != N or 0 in local_features.shape[1:-1]:
        wanted = f"[{N}, L, {D}] with L > 0 or [{N}, {D}]"
        raise ValueError(f"local_features must be a tensor {wanted}, not {describe(local_features)}")
    scale = scale_of(temperature, logit_scale, features, ranks)
    images = own_ids(ids, features, ranks)

    if normalize:
        features, local_features = unit(features), unit(local_features)
    if local_features.ndim == 2:
        local_features = local_features.unsqueeze(1)
    L = local_features.shape[1]
    own = times(dots(local_features, features.unsqueeze(1)), scale)  # [N, L], the scores P
    options = dict(q_ids=images, k_ids=images.unsqueeze(1).expand(N, L).reshape(-1), ranks=copies(ranks, L))
    locations = local_features.reshape(N * L, D)
    if estimator == "infonce":
        row = similarity_lse(features, locations, scale, **options)
        return mean_of(pair_loss(row.unsqueeze(1), own), ranks)
    count = (_different_pairs(gather(images, ranks)) * L).to(own.dtype)
    if estimator == "jsd":
        negative = over_ranks(similarity_softplus(features, locations, scale, **options), ranks)
        return mean_of(softplus(-own), ranks) + negative / count.clamp_min(1)
    nothing = count == 0
    total = log_total_of(similarity_lse(features, locations, scale, **options).masked_fill(nothing, 0), ranks)
    return (total - count.clamp_min(1).log() - mean_of(own, ranks)).masked_fill(nothing, 0)


def check_estimator(estimator: str) -> None:
    check_choice("estimator", estimator, "jsd", "infonce", "dv")


def _different_pairs(ids: Tensor) -> Tensor:
    """How many of the N^2 pairs have different ids, 0-d."""
    ordered = ids.sort().values
    equal = torch.searchsorted(ordered, ids, right=True) - torch.searchsorted(ordered, ids)
    return ids.numel() ** 2 - equal.sum()
