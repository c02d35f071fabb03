"""Alignment and uniformity: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
Uniformity on the Hypersphere", 2020."""

from typing import Any

import torch
from torch import Tensor

from ..common.numbers import FLOAT32_MAX, check_number, constant, log
from ..common.rows import dots, unit
from ..common.tensors import wide
from ..distributed import Group, Ranks, all_rows, over_ranks, ranks_of, similarity_lse, total_of
from .checks import check_alike, check_features, check_options, promoted
from .formulas import log_total_of, mean_of


def alignment_uniformity(
    z0: Tensor,
    z1: Tensor,
    alpha: float = 2.0,
    t: float = 2.0,
    uniformity_weight: float = 1.0,
    *,
    normalize: bool = True,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> Tensor:
    """alignment(z0, z1) + uniformity_weight * (uniformity(z0) + uniformity(z1)) / 2.

    Figure 6 of https://arxiv.org/abs/2005.10242. The pairs, of alignment (+) and uniformity (-):

                a0 a1  b0 b1        a = z0, b = z1
            a0   .  -   +  .
            b0   +  .   .  -

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        alpha, t, normalize: as in `alignment` and `uniformity`.
        uniformity_weight: how much uniformity counts.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.

    Returns:
        The loss, 0-d, in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> sslkern.functional.alignment_uniformity(z0, z1).backward()
    """
    ranks = None
    if group is not None:
        given = dict(z0=z0, z1=z1, alpha=alpha, t=t, uniformity_weight=uniformity_weight, normalize=normalize)
        ranks = ranks_of(group, strategy, grad_reduce, "alignment_uniformity", **given)
    check_options("mean", group, strategy, grad_reduce)
    uniformity_weight = check_number("uniformity_weight", uniformity_weight, 0)
    z0, z1 = promoted(z0, z1)
    options: dict[str, Any] = dict(normalize=normalize, group=ranks or group)
    pull = alignment(z0, z1, alpha, **options)
    spread = uniformity(z0, t, **options) + uniformity(z1, t, **options)
    return pull + uniformity_weight / 2 * spread


def alignment(
    z0: Tensor,
    z1: Tensor,
    alpha: float = 2.0,
    *,
    normalize: bool = True,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> Tensor:
    """How near views of a sample are (section 4.1.1): the mean over i of |z0_i - z1_i|^alpha.

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        alpha: at least 1.
        normalize: divide the rows by their norm first.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.

    Returns:
        0-d, in fp32 (fp64).

    Example:
        >>> z = torch.eye(4)
        >>> sslkern.functional.alignment(z, -3 * z).item()  # opposite: the square of 2
        4.0
    """
    ranks = None
    if group is not None:
        given = dict(z0=z0, z1=z1, alpha=alpha, normalize=normalize)
        ranks = ranks_of(group, strategy, grad_reduce, "alignment", **given)
    z0, z1 = promoted(z0, z1)
    check_features("z0", z0, ranks)
    check_alike("z1", z1, "z0", z0)
    alpha = check_number("alpha", alpha, 1)
    check_options("mean", group, strategy, grad_reduce, normalize=normalize)
    if normalize:
        z0, z1 = unit(z0), unit(z1)
    distance = torch.linalg.vector_norm(wide(z0) - wide(z1), dim=1)
    if torch.compiler.is_compiling():
        alpha = constant(alpha, distance, distance.dtype)
    return mean_of(distance.pow(alpha), ranks)


def uniformity(
    z: Tensor,
    t: float = 2.0,
    *,
    normalize: bool = True,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> Tensor:
    """How evenly rows cover the sphere (section 4.1.2): log of the mean of exp(-t |z_i - z_j|^2) over the pairs i != j.

    The distances are never stored: with |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y> it is a log-sum-exp of similarities.

    Args:
        z: [N, D], fp32, bf16, fp16 or fp64.
        t: a positive number.
        normalize: divide the rows by their norm first. Otherwise norms and dot products must not be so large that they
            leave no digits to their difference.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.

    Returns:
        0-d, in fp32 (fp64), between -4t and 0 for unit rows. A single row gives 0.

    Example:
        >>> z = torch.randn(256, 128, requires_grad=True)
        >>> sslkern.functional.uniformity(z).backward()
    """
    ranks = None
    if group is not None:
        ranks = ranks_of(group, strategy, grad_reduce, "uniformity", z=z, t=t, normalize=normalize)
    check_features("z", z, ranks)
    t = check_number("t", t, 1e-6, FLOAT32_MAX / 2)
    check_options("mean", group, strategy, grad_reduce, normalize=normalize)
    N = all_rows(z.shape[0], ranks)
    if normalize:  # the square of all lengths is 1: 2t, which it adds to all scores, is taken off at the end
        z = unit(z)
        row = similarity_lse(z, scale=2 * t, ranks=ranks)
    else:
        squares = dots(z, z)
        row = similarity_lse(z, scale=2 * t, k_bias=-t * squares, ranks=ranks) - t * squares
    if N == 1:
        return over_ranks(row.masked_fill(row == -torch.inf, 0).sum(), ranks)
    whole = log_total_of(row, ranks)
    if normalize:
        whole = torch.logaddexp(whole - 2 * t, _with_zeros(z.detach(), t, row.dtype, ranks))
    return whole - log(N * (N - 1), row)


def _with_zeros(z: Tensor, t: float, dtype: torch.dtype, ranks: Ranks | None) -> Tensor:
    """The logarithm of what rows of zeros among the unit rows z add to the sum of exp(2t <z_i, z_j> - 2t) over the
    pairs, where it takes all rows for unit rows: a row of zeros is at distance 1 from a unit row, and at 0 from another
    row of zeros."""
    zeros = total_of((torch.linalg.vector_norm(z, dim=1) < 0.5).sum().to(dtype), ranks)
    t = constant(t, zeros, dtype)
    to_units = (2 * zeros * (all_rows(len(z), ranks) - zeros)).log() - t + (-torch.expm1(-t)).log()
    to_zeros = (zeros * (zeros - 1)).log() + (-torch.expm1(-2 * t)).log()
    return torch.logaddexp(to_units, to_zeros)
