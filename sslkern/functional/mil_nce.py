"""MIL-NCE: Miech et al., "End-to-End Learning of Visual Representations from Uncurated Instructional Videos", 2020."""

import math
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import check_dense, check_device, describe
from ..common.rows import unit
from ..common.sums import softplus, times
from ..common.tensors import wide
from ..distributed import Group, copies, ranks_of, similarity_lse
from ..ops import logsumexp
from ._pairs import own_ids
from .checks import check_alike, check_features, check_options, check_weights, promoted, scale_of
from .formulas import logaddexp, reduce


def mil_nce(
    anchor: Tensor,
    positives: Tensor,
    temperature: float | Tensor = 1.0,
    *,
    two_way: bool = False,
    valid: Tensor | None = None,
    ids: Tensor | None = None,
    logit_scale: float | Tensor | None = None,
    normalize: bool = False,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """MIL-NCE (eq. 1 of https://arxiv.org/abs/1912.06430): each anchor has P positives, of which some are false.

    A video clip has the P sentences said around it as candidates, not all of which are about what it shows: together
    they are to outweigh the negatives. With s_ijp = <anchor_i, positives_jp> / temperature:

        loss_i = - log(sum_p exp(s_iip) / (sum_p exp(s_iip) + sum of exp over the negatives of i))

        one way      s_ijp of all j != i: the candidates of other anchors, for this anchor
        two ways     also s_jip: the other anchors, for its candidates; both in one denominator, as in the paper

                p00 p01  p10 p11  p20 p21        N = 3, P = 2, row i = 0: + positive, - negative, | negative of two ways
            a0   +   +    -   -    -   -
            a1   |   |
            a2   |   |

    The authors' code has the positives twice in the denominator of two ways, once for each: its loss is log(1 + exp(l))
    of the l computed here, `F.softplus(mil_nce(..., two_way=True, reduction="none")).mean()`.

    Args:
        anchor: [N, D], fp32, bf16, fp16 or fp64; sums run in fp32 (fp64).
        positives: [N, P, D], the candidates of each anchor.
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        two_way: see above.
        valid: bool [N, P], False: there is no such candidate, so that it is neither positive nor negative. Default: all
            are there.
        ids: int64 [N]; anchors with equal ids (clips of one video) are no negatives of each other. Default: all differ.
        logit_scale: multiplies the similarities instead and replaces `temperature`; already exponentiated.
        normalize: divide all rows by their norm first (cosine similarity); the paper does not.
        reduction: "mean" or "sum" over the N anchors, or "none".
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.
        weights: floating point [N], w_i for anchor i: "mean" is sum w_i l_i / sum w_i.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64). An anchor without negatives, or without candidates, adds 0 and
        counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> clips, sentences = torch.randn(64, 32, requires_grad=True), torch.randn(64, 5, 32)
        >>> sslkern.functional.mil_nce(clips, sentences, temperature=0.1, two_way=True, normalize=True).backward()
    """
    ranks = None
    if group is not None:
        given: dict[str, Any] = dict(
            anchor=anchor, positives=positives, temperature=temperature, two_way=two_way, valid=valid, ids=ids
        )
        given |= dict(logit_scale=logit_scale, normalize=normalize, reduction=reduction, weights=weights)
        ranks = ranks_of(group, strategy, grad_reduce, "mil_nce", **given)
    anchor, positives = promoted(anchor, positives)
    check_features("anchor", anchor, ranks)
    check_alike("positives", positives, "anchor", anchor, "[N, P, D]")
    N, D = anchor.shape
    if positives.ndim != 3 or positives.shape[0] != N:
        raise ValueError(f"positives must be [{N}, P, {D}], P for each anchor, not {describe(positives)}")
    P = positives.shape[1]
    check_options(reduction, group, strategy, grad_reduce, two_way=two_way, normalize=normalize)
    check_weights(weights, N, anchor)
    scale = scale_of(temperature, logit_scale, anchor, ranks)
    if valid is not None:
        _check_valid(valid, positives)
    ids = own_ids(ids, anchor, ranks)

    if normalize:
        anchor, positives = unit(anchor), unit(positives)
    own = times((wide(anchor).unsqueeze(1) * wide(positives)).sum(2), scale)  # [N, P]
    k_bias = None
    if valid is not None:
        own = own.masked_fill(~valid, -math.inf)
        k_bias = torch.zeros_like(own).masked_fill(~valid, -math.inf).detach().flatten()
    # Kept apart from the positives, the negatives leave a tiny loss its digits.
    of_anchor, of_candidate = ids, ids.repeat_interleave(P)
    options: dict[str, Any] = dict(
        q_ids=of_anchor, k_ids=of_candidate, k_bias=k_bias, columns=two_way, ranks=copies(ranks, P)
    )
    negative = similarity_lse(anchor, positives.flatten(0, 1), scale, **options)
    if two_way:
        negative, column = negative
        negative = logaddexp(negative, logsumexp(column.view(N, P)))
    positive = logsumexp(own)
    nothing = positive == -math.inf
    losses = softplus((negative - positive.masked_fill(nothing, 0)).masked_fill(nothing, -math.inf))
    return reduce(losses, reduction, weights, ranks)


def _check_valid(valid: Tensor, positives: Tensor) -> None:
    shape = list(positives.shape[:2])
    check_dense("valid", valid)
    if not isinstance(valid, Tensor) or list(valid.shape) != shape:
        raise ValueError(f"valid must be a bool tensor {shape}, one for each candidate, not {describe(valid)}")
    if valid.dtype != torch.bool:
        raise TypeError(f"valid must be bool, not {valid.dtype}; convert it with .bool()")
    check_device("valid", valid, positives)
