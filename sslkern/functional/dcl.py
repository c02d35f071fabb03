"""DCL: Yeh et al., "Decoupled Contrastive Learning", 2021."""

import torch
from torch import Tensor

from ..common.numbers import check_number
from ..common.sums import times
from ..distributed import Group, all_rows, copies, gather, ranks_of, rows_here, similarity_lse
from ._pairs import two_views
from .checks import check_options, check_weights, scale_of
from .formulas import reduce


def dcl(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
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
    """Decoupled contrastive loss (eq. 6 of https://arxiv.org/abs/2110.06848): NT-Xent with no positive in denominators.

        loss_i = - positive_i + log sum_j exp(s_ij)        j over the negatives only

    so that an easy positive does not take the gradient of the negatives away. The loss may be negative.

                a0 a1 a2  b0 b1 b2        a = z0, b = z1; + positive, which is in no denominator,
            a0   .  -  -   +  -  -        - negative, . left out
            b1   -  +  -   -  .  -

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        temperature, logit_scale, ids, normalize, reduction, group, strategy, grad_reduce, weights: as in `nt_xent`.

    Returns:
        The loss, 0-d, or for "none" [2N] with the rows of z0 first, in fp32 (fp64). A row without negatives adds 0 and
        counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> sslkern.functional.dcl(z0, z1, temperature=0.1).backward()
    """
    shared = group, strategy, grad_reduce
    return _decoupled("dcl", z0, z1, temperature, None, logit_scale, ids, normalize, reduction, weights, *shared)


def dclw(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.1,
    sigma: float = 0.5,
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
    """DCL with the weights of https://arxiv.org/abs/2110.06848 on the positives: views far apart count more.

        loss_i = - w_i positive_i + log sum_j exp(s_ij)        w_i = 2 - exp(<a_i, b_i> / sigma) / mean of the same

    The weights, of mean 1, get no gradient. Which pairs count: see `dcl`.

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        sigma: a positive number; the smaller, the more the weights differ.
        temperature, logit_scale, ids, normalize, reduction, group, strategy, grad_reduce, weights: as in `nt_xent`.
            (`weights` are those of samples, and do not enter w.)

    Returns, Raises: as `dcl`.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> sslkern.functional.dclw(z0, z1, temperature=0.1, sigma=0.5).backward()
    """
    shared = group, strategy, grad_reduce
    return _decoupled("dclw", z0, z1, temperature, sigma, logit_scale, ids, normalize, reduction, weights, *shared)


def _decoupled(
    name: str,
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor,
    sigma: float | None,
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
        given = dict(z0=z0, z1=z1, temperature=temperature, sigma=sigma, logit_scale=logit_scale, ids=ids)
        options = dict(normalize=normalize, reduction=reduction, weights=weights)
        ranks = ranks_of(group, strategy, grad_reduce, name, **given, **options)
    if name == "dclw":
        sigma = check_number("sigma", sigma, 1e-6)  # type: ignore[arg-type]  # refuses None
    z, ids, cosine = two_views(z0, z1, ids, normalize, ranks)
    N = z0.shape[0]
    check_options(reduction, group, strategy, grad_reduce)
    check_weights(weights, N, z0)
    scale = scale_of(temperature, logit_scale, z0, ranks)
    negative = similarity_lse(z, scale=scale, q_ids=ids, ranks=copies(ranks, 2))
    positive = times(cosine, scale)
    if sigma is not None:
        shares = torch.softmax(gather(cosine[:N].detach() / sigma, ranks), 0)
        pull = 2 - all_rows(N, ranks) * rows_here(shares, N, ranks)
        positive = pull.repeat(2) * positive
    losses = (negative - positive).masked_fill(negative == -torch.inf, 0)
    loss = reduce(losses.view(2, N), reduction, weights, ranks)
    if reduction == "none":
        return loss.view(-1)
    return loss
