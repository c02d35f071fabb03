"""SupCon: Khosla et al., "Supervised Contrastive Learning", 2020."""

from typing import Any

import torch
from torch import Tensor

from ..common.arguments import check_choice, check_dense, check_device, describe
from ..common.autocast import product, stack
from ..common.rows import dots, unit
from ..common.sums import softplus
from ..common.tensors import wide
from ..distributed import (
    Group,
    Ranks,
    copies,
    gather,
    ranks_of,
    row_ids,
    similarity_lse,
    sum_of_equal,
    total_of,
    within,
)
from ..ops.pair_contrast import pair_labels
from .checks import check_features, check_ids, check_options, check_weights, scale_of
from .formulas import at_once_of, reduce

FORMS = ("out", "in")


def sup_con(
    z: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Supervised contrastive loss: the other rows of the same label are the positives P of a row.

        out:  - 1/|P| sum_p log(exp(s_p) / sum_a exp(s_a))        eq. 2 of https://arxiv.org/abs/2004.11362
        in:   - log(1/|P| sum_p exp(s_p) / sum_a exp(s_a))        eq. 3

    where a runs over all rows but the own one, positives included. "out" is the better one by the paper. SupContrast,
    the authors' code, multiplies by temperature / base_temperature, which is 1 by default.

    With several labels for each sample, [N, C], every label is a task of its own, as in MulSupCon
    (https://doi.org/10.1609/aaai.v38i15.29619): the loss of a row is the mean of "out" over those of its labels that
    another row has, with the rows of that label as P. So what shares more labels, and rarer ones, is pulled harder:

        mean over labels k of row i of  - 1/|P_k| sum_(p in P_k) log(exp(s_ip) / sum_a exp(s_ia))

    The paper's sum over pairs of rows and labels is `weights=labels.sum(1).float()`; to have only rows of exactly the
    same set as positives, number the sets: `torch.unique(labels, dim=0, return_inverse=True)[1]`. No N x N mask is
    made: memory is O(N C + N D + C D), and the products of labels and features add 4 N C D flop each way to the time.
    "in" has no such form: its sums of exponentials do not split by label.

                a0 a1  b0 b1 b2  c0        labels a, a, b, b, b, c
            a0   .  +   -  -  -   -        + positive, - negative, . left out
            b0   -  -   .  +  +   -
            c0   -  -   -  -  -   .        no positive: adds 0

    A batch of one label has no negatives, and the formulas hold: positives compete with each other, so that "out" of N
    such rows is log(N - 1) or more, least where all scores are equal, and "in" is log(N - 1), without a gradient.

    Args:
        z: [N, D], or V views of each sample, [N, V, D]. fp32, bf16, fp16 or fp64.
        labels: int64 [N], any values; or bool [N, C], which of C labels a sample has, any number of them. All views of
            a sample have its labels. May be left out for [N, V, D]: then the views of a sample are each other's
            positives, and no others.
        form: "out" or "in"; for labels [N, C] "out".
        temperature, logit_scale, normalize, reduction, weights: as in `nt_xent`.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`; labels are compared over all of
            them.

    Returns:
        The loss, 0-d, or for "none" [N] or [N, V], in fp32 (fp64). A row without positives adds exactly 0 and counts in
        the mean. Positives compete: a row without negatives adds 0 only if it has one positive.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z, labels = torch.randn(256, 128, requires_grad=True), torch.randint(10, (256,))
        >>> sslkern.functional.sup_con(z, labels, temperature=0.1).backward()
        >>> tags = torch.rand(256, 20) < 0.1  # some of 20 for each sample
        >>> loss = sslkern.functional.sup_con(z, tags, temperature=0.1)
    """
    ranks = None
    if group is not None:
        given = dict(z=z, labels=labels, temperature=temperature, logit_scale=logit_scale, weights=weights)
        options: dict[str, Any] = dict(form=form, normalize=normalize, reduction=reduction)
        ranks = ranks_of(group, strategy, grad_reduce, "sup_con", **given, **options)
    if isinstance(z, Tensor) and z.ndim == 3:
        check_dense("z", z)
        N, V, D = z.shape
        check_features("z", z.reshape(N * V, D), ranks)
        if labels is None:
            labels = row_ids(N, z.device, ranks)
        _check_labels(labels, N, z, form)
        check_weights(weights, N, z)
        check_options(reduction, group, strategy, grad_reduce, normalize=normalize)
        scale = scale_of(temperature, logit_scale, z, ranks)
        at_once = at_once_of(reduction, weights, 0.0, ranks)
        options = dict(form=form, logit_scale=scale, normalize=normalize, reduction=at_once)
        options |= dict(group=copies(within(ranks), V) or group)
        losses = sup_con(z.reshape(N * V, D), labels.repeat_interleave(V, 0), **options)
        if at_once != "none":
            return losses
        losses = losses.view(N, V)
        return reduce(losses.t(), reduction, weights, ranks).t()
    if not isinstance(z, Tensor) or z.ndim != 2:
        raise ValueError(f"z must be a tensor [N, D] or [N, V, D], not {describe(z)}")
    check_features("z", z, ranks)
    N, D = z.shape
    if labels is None:
        raise ValueError("labels must be given for z [N, D]: without labels it takes several views, [N, V, D]")
    _check_labels(labels, N, z, form)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize)
    check_weights(weights, N, z)
    scale = scale_of(temperature, logit_scale, z, ranks)
    if labels.ndim == 1 and form == "out" and weights is None and ranks is None:
        loss = pair_labels(z, scale, labels, normalize, reduction)
        if loss is not None:
            return loss
    if normalize:
        z = unit(z)
    if labels.ndim == 1:
        losses = _one_label(z, labels, scale, form, ranks)
    else:
        losses = _several_labels(z, labels, scale, ranks)
    return reduce(losses, reduction, weights, ranks)


def _one_label(z: Tensor, labels: Tensor, scale: float | Tensor, form: str, ranks: Ranks | None) -> Tensor:
    """[N] losses: the log-sum-exp over all others minus the mean score of the positives ("out"), or minus the logarithm
    of the mean of their exponentials ("in")."""
    # Sorted by label, rows meet their positives near the diagonal only: the pass over the positives costs next to
    # nothing, and keeping them apart from the negatives keeps the digits of tiny losses.
    labels, order = labels.sort()
    z = z.gather(0, order.unsqueeze(1).expand_as(z))  # whose backward is faster than that of z[order]
    negative = similarity_lse(z, scale=scale, q_ids=labels, ranks=ranks)
    positive = similarity_lse(z, scale=scale, q_ids=labels, pairs="same", ranks=ranks)
    of_label, count = sum_of_equal(z, labels, labels, ranks)
    count = count - 1
    alone, twins = count == 0, count == 1
    losses = softplus((negative - positive).masked_fill(alone, -torch.inf))
    if form == "in":
        losses = losses + count.clamp_min(1).to(losses.dtype).log()
    else:
        mean = dots(z, of_label - wide(z)) * scale / count.clamp_min(1)
        losses = losses + (positive - mean).masked_fill(alone | twins, 0)
    return torch.zeros_like(losses).scatter(0, order, losses)


def _several_labels(z: Tensor, labels: Tensor, scale: float | Tensor, ranks: Ranks | None) -> Tensor:
    """[N] losses: the log-sum-exp over all others minus the mean score, over labels and then over their rows."""
    if labels.shape[1] == 0:
        labels = labels.new_zeros(z.shape[0], 1)
    has = labels.to(wide(z).dtype)
    count = total_of(has.sum(0), ranks)
    shared = count > 1
    each = (count - 1).clamp_min(1).reciprocal().masked_fill(~shared, 0)  # [C], what one of a label's rows weighs
    tasks, own = product(has, stack((shared.to(has.dtype), each), 1)).unbind(1)
    alone = tasks == 0
    of_labels = product(has, each.unsqueeze(1) * total_of(product(has.mT, wide(z)), ranks))
    own = own.unsqueeze(1) * wide(z)  # a row is none of its own positives
    positive = (of_labels - own) / tasks.clamp_min(1).unsqueeze(1)

    # Two rows that have no positive but each other stay out of the sum, so that a tiny loss keeps its digits. With more
    # positives it is never tiny: at least the entropy of their weights. (The loss of a row whose only positive has
    # others can be, and is right to the rounding of its scores only.)
    row = row_ids(z.shape[0], z.device, ranks)
    twin, pair = _twins(labels, shared, count, row, ranks)
    if ranks is None:
        of_pair = wide(z).gather(0, pair.unsqueeze(1).expand_as(z))
    else:
        of_pair, _ = sum_of_equal(wide(z), torch.where(twin, pair, -1), row, ranks)
    positive = positive.where(~twin.unsqueeze(1), of_pair)
    negative = similarity_lse(z, scale=scale, q_ids=torch.where(twin, torch.minimum(row, pair), row), ranks=ranks)
    gap = (negative - dots(z, positive) * scale).masked_fill(alone, -torch.inf)
    return torch.where(twin | alone, softplus(gap), gap)


def _twins(labels: Tensor, shared: Tensor, count: Tensor, row: Tensor, ranks: Ranks | None) -> tuple[Tensor, Tensor]:
    """Which rows [N] have one positive that has no other either, and which [N] it is, of the rows of all ranks; 0 for
    the others."""
    both = total_of((labels * row.unsqueeze(1)).sum(0), ranks)  # [C], the two rows of a label that has two, summed
    both = torch.where(labels & shared, both, -1)  # [N, C]
    most = both.amax(1, keepdim=True)
    one = ((both == most) & (count == 2) | (both == -1)).all(1) & (most.squeeze(1) >= 0)
    pair = torch.where(one, most.squeeze(1) - row, 0)
    twin = one & gather(one, ranks)[pair]  # the positive of a row of one, if it has one as well, is that row
    return twin, pair


def _check_labels(labels: Tensor, N: int, like: Tensor, form: str) -> None:
    check_choice("form", form, *FORMS)
    check_dense("labels", labels)
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return check_ids("labels", labels, (N,), like)
    if labels.dtype != torch.bool:
        raise TypeError(
            f"labels must be int64 [N], or bool [N, C] for several labels of a sample, not {labels.dtype} in two"
            " dimensions; convert them with labels > 0, or class numbers with .flatten()"
        )
    if labels.shape[0] != N:
        raise ValueError(f"labels must be a bool tensor [{N}, C], one row for each sample, not {describe(labels)}")
    check_device("labels", labels, like)
    if form != "out":
        raise ValueError("form must be 'out' for labels [N, C]: 'in' does not split by label")
