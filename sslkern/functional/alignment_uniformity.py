"""Alignment and uniformity: Wang and Isola, "Understanding Contrastive Representation Learning through Alignment and
Uniformity on the Hypersphere", 2020."""

import torch
from torch import Tensor

from ..common.arguments import check_flags
from ..common.numbers import FLOAT32_MAX, check_number, constant, log
from ..common.rows import dots, unit
from ..common.sums import log_total, mean
from ..common.tensors import wide
from ..ops import similarity_lse
from .checks import check_alike, check_features, promoted


def alignment_uniformity(
    z0: Tensor,
    z1: Tensor,
    alpha: float = 2.0,
    t: float = 2.0,
    uniformity_weight: float = 1.0,
    *,
    normalize: bool = True,
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

    Returns:
        The loss, 0-d, in fp32 (fp64).

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> sslkern.functional.alignment_uniformity(z0, z1).backward()
    """
    uniformity_weight = check_number("uniformity_weight", uniformity_weight, 0)
    z0, z1 = promoted(z0, z1)
    pull = alignment(z0, z1, alpha, normalize=normalize)
    spread = uniformity(z0, t, normalize=normalize) + uniformity(z1, t, normalize=normalize)
    return pull + uniformity_weight / 2 * spread


def alignment(z0: Tensor, z1: Tensor, alpha: float = 2.0, *, normalize: bool = True) -> Tensor:
    """How near views of a sample are (section 4.1.1): the mean over i of |z0_i - z1_i|^alpha.

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64.
        alpha: at least 1.
        normalize: divide the rows by their norm first.

    Returns:
        0-d, in fp32 (fp64).

    Example:
        >>> z = torch.eye(4)
        >>> sslkern.functional.alignment(z, -3 * z).item()  # opposite: the square of 2
        4.0
    """
    z0, z1 = promoted(z0, z1)
    check_features("z0", z0)
    check_alike("z1", z1, "z0", z0)
    alpha = check_number("alpha", alpha, 1)
    check_flags(normalize=normalize)
    z0, z1 = (unit(z0), unit(z1)) if normalize else (z0, z1)
    distance = torch.linalg.vector_norm(wide(z0) - wide(z1), dim=1)
    if torch.compiler.is_compiling():
        alpha = constant(alpha, distance, distance.dtype)
    return mean(distance.pow(alpha))


def uniformity(z: Tensor, t: float = 2.0, *, normalize: bool = True) -> Tensor:
    """How evenly rows cover the sphere (section 4.1.2): log of the mean of exp(-t |z_i - z_j|^2) over the pairs i != j.

    The distances are never stored: with |x - y|^2 = |x|^2 + |y|^2 - 2 <x, y> it is a log-sum-exp of similarities.

    Args:
        z: [N, D], fp32, bf16, fp16 or fp64.
        t: a positive number.
        normalize: divide the rows by their norm first. Otherwise norms and dot products must not be so large that they
            leave no digits to their difference.

    Returns:
        0-d, in fp32 (fp64), between -4t and 0 for unit rows. A single row gives 0.

    Example:
        >>> z = torch.randn(256, 128, requires_grad=True)
        >>> sslkern.functional.uniformity(z).backward()
    """
    check_features("z", z)
    t = check_number("t", t, 1e-6, FLOAT32_MAX / 2)
    check_flags(normalize=normalize)
    N = z.shape[0]
    z = unit(z) if normalize else z
    if normalize:  # the shift of all rows, 2t, is taken off at the end
        row = similarity_lse(z, scale=2 * t)
    else:
        squares = dots(z, z)
        row = similarity_lse(z, scale=2 * t, k_bias=-t * squares) - t * squares
    if N == 1:
        return row.masked_fill(row == -torch.inf, 0).sum()
    whole = log_total(row)
    if normalize:
        whole = torch.logaddexp(whole - 2 * t, _with_zeros(z.detach(), t, row.dtype))
    return whole - log(N * (N - 1), row)


def _with_zeros(z: Tensor, t: float, dtype: torch.dtype) -> Tensor:
    """log of what a sum of exp(2t <z_i, z_j> - 2t) over the pairs lacks, as rows of z have the length 1 or 0: a row of
    zeros is at the distance 1 from a unit row, and at 0 from its like."""
    zeros = (torch.linalg.vector_norm(z, dim=1) < 0.5).sum().to(dtype)
    t = constant(t, zeros, dtype)
    to_units = (2 * zeros * (len(z) - zeros)).log() - t + (-torch.expm1(-t)).log()
    to_zeros = (zeros * (zeros - 1)).log() + (-torch.expm1(-2 * t)).log()
    return torch.logaddexp(to_units, to_zeros)
