"""Debiased contrastive loss: Chuang et al., "Debiased Contrastive Learning", 2020; and with hard negatives: Robinson et
al., "Contrastive Learning with Hard Negative Samples", 2021."""

import math

import torch
from torch import Tensor

from ..common.equal import equal_ids
from ..common.numbers import check_finite, check_number, log
from ..common.sums import pair_loss, times
from ..distributed import Group, all_rows, copies, gather, ranks_of, similarity_lse
from ._pairs import two_views
from .checks import check_options, check_weights, scale_of
from .formulas import reduce


def debiased(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    tau_plus: float = 0.1,
    *,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Debiased contrastive loss (https://arxiv.org/abs/2007.00224): some negatives are of the same class.

    That share, tau_plus, is taken out of the sum of a row's M = 2N - 2 negatives, estimated by its positive p:

        loss_i = log(1 + G / exp(p))        G = max((sum_j exp(s_ij) - tau_plus M exp(p)) / (1 - tau_plus), M e^(-1/T))

    The lower bound is what M unit vectors reach at least. For tau_plus = 0 it is NT-Xent.

                a0 a1 a2  b0 b1 b2        a = z0, b = z1
            a0   .  -  -   +  -  -        + positive, - negative, of which a share is none, . left out
            b1   -  +  -   -  .  -

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        tau_plus: in [0, 1), the probability that two samples are of the same class.
        temperature, logit_scale, ids, normalize, reduction, group, strategy, grad_reduce, weights: as in `nt_xent`.
            Rows left out by `ids` do not count in M.

    Returns:
        The loss, 0-d, or for "none" [2N] with the rows of z0 first, in fp32 (fp64). A row without negatives adds 0 and
        counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> sslkern.functional.debiased(z0, z1, temperature=0.5, tau_plus=0.1).backward()
    """
    shared = group, strategy, grad_reduce
    options = logit_scale, ids, normalize, reduction, weights
    return _debiased("debiased", z0, z1, temperature, None, tau_plus, *options, *shared)


def hard_negative(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    beta: float = 1.0,
    tau_plus: float = 0.1,
    *,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Debiased contrastive loss with weights on hard negatives (https://arxiv.org/abs/2010.04592).

    `debiased` in which each negative has the weight exp(beta s_ij), divided by the mean of the row:

        sum_j exp(s_ij)   becomes   M sum_j exp((1 + beta) s_ij) / sum_j exp(beta s_ij)

    two log-sum-exps, at the scales (1 + beta) / T and beta / T. For beta = 0 it is `debiased`, where the pairs are
    shown.

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        beta: at least 0, how much hard negatives are preferred.
        tau_plus: in [0, 1), the probability that two samples are of the same class.
        temperature, logit_scale, ids, normalize, reduction, group, strategy, grad_reduce, weights: as in `debiased`.

    Returns, Raises: as `debiased`.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> sslkern.functional.hard_negative(z0, z1, temperature=0.5, beta=1.0, tau_plus=0.1).backward()
    """
    shared = group, strategy, grad_reduce
    options = logit_scale, ids, normalize, reduction, weights
    return _debiased("hard_negative", z0, z1, temperature, beta, tau_plus, *options, *shared)


def _debiased(
    name: str,
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    beta: float | None,
    tau_plus: float,
    logit_scale: float | Tensor | None,
    ids: Tensor | None,
    normalize: bool,
    reduction: str,
    weights: Tensor | None,
    group: Group,
    strategy: str,
    grad_reduce: str,
) -> Tensor:
    ranks = None
    if group is not None:
        given = dict(z0=z0, z1=z1, temperature=temperature, beta=beta, tau_plus=tau_plus, logit_scale=logit_scale)
        options = dict(ids=ids, normalize=normalize, reduction=reduction, weights=weights)
        ranks = ranks_of(group, strategy, grad_reduce, name, **given, **options)
    if name == "hard_negative":
        beta = check_number("beta", beta, 0)  # type: ignore[arg-type]  # refuses None
    z, ids, cosine = two_views(z0, z1, ids, normalize, ranks)
    N = z0.shape[0]
    views = copies(ranks, 2)
    tau_plus = check_number("tau_plus", tau_plus, 0, 1)
    check_options(reduction, group, strategy, grad_reduce)
    check_weights(weights, N, z0)
    scale = scale_of(temperature, logit_scale, z0, ranks)
    if beta is not None and not isinstance(scale, Tensor):
        check_finite("beta: (1 + beta) times the scale", (1 + beta) * scale)
    positive = times(cosine, scale)
    count = 2 * all_rows(N, ranks) - equal_ids(ids, gather(ids, views))[1]
    log_count = count.to(cosine.dtype).log()  # of M; -inf for a row without negatives
    if beta is None:
        negative = similarity_lse(z, scale=scale, q_ids=ids, ranks=views)
    else:
        hard, soft = (similarity_lse(z, scale=scale * power, q_ids=ids, ranks=views) for power in (1 + beta, beta))
        negative = log_count + hard - soft.masked_fill(soft == -torch.inf, 0)
    # log G. All of it in logarithms: exp(1 / T) overflows at T = 0.01.
    share = -math.inf
    if tau_plus > 0:
        share = log(tau_plus, cosine)
    gap = positive + (share + log_count) - negative
    more = (gap < 0) & (log_count != -torch.inf)  # what is taken out is less than all
    rest = negative + torch.log(-torch.expm1(gap.where(more, -1))) - log(1 - tau_plus, cosine)
    floor = log_count - abs(scale)  # type: ignore[operator]  # the abs of either is one
    estimate = torch.maximum(rest.masked_fill(~more, -torch.inf), floor)
    loss = reduce(pair_loss(estimate, positive).view(2, N), reduction, weights, ranks)
    if reduction == "none":
        return loss.view(-1)
    return loss
