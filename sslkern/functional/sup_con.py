"""SupCon: Khosla et al., "Supervised Contrastive Learning", 2020."""

import torch
from torch import Tensor

from ..ops import similarity_lse
from ._common import (
    check_features,
    check_ids,
    check_options,
    check_weights,
    describe,
    dots,
    reduce,
    scale_of,
    softplus,
    unit,
    wide,
)
from ._pairs import sum_of_equal


def sup_con(
    z: Tensor,
    labels: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    *,
    form: str = "out",
    logit_scale: float | Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """Supervised contrastive loss: the other rows of the same label are the positives P of a row.

        out:  - 1/|P| sum_p log(exp(s_p) / sum_a exp(s_a))        eq. 2 of https://arxiv.org/abs/2004.11362
        in:   - log(1/|P| sum_p exp(s_p) / sum_a exp(s_a))        eq. 3

    where a runs over all rows but the own one, positives included. "out" is the better one by the paper. SupContrast,
    the authors' code, multiplies by temperature / base_temperature, which is 1 by default.

                a0 a1  b0 b1 b2  c0        labels a, a, b, b, b, c
            a0   .  +   -  -  -   -        + positive, - negative, . left out
            b0   -  -   .  +  +   -
            c0   -  -   -  -  -   .        no positive: adds 0

    Args:
        z: [N, D], or V views of each sample, [N, V, D]. fp32, bf16, fp16 or fp64.
        labels: int64 [N], any values; all views of a sample have its label. May be left out for [N, V, D]: then the
            views of a sample are each other's positives, and no others.
        form: "out" or "in".
        temperature, logit_scale, normalize, reduction, weights: as in `nt_xent`.

    Returns:
        The loss, 0-d, or for "none" [N] or [N, V], in fp32 (fp64). A row without positives adds exactly 0 and counts in
        the mean. Positives compete: a row without negatives adds 0 only if it has one positive.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z, labels = torch.randn(256, 128, requires_grad=True), torch.randint(10, (256,))
        >>> sslkern.functional.sup_con(z, labels, temperature=0.1).backward()
    """
    if isinstance(z, Tensor) and z.ndim == 3:
        N, V, D = z.shape
        check_features("z", z.reshape(N * V, D))
        if labels is None:
            labels = torch.arange(N, device=z.device)
        check_ids("labels", labels, (N,), z)
        check_weights(weights, N, z)
        options = dict(form=form, logit_scale=logit_scale, normalize=normalize, reduction="none")
        losses = sup_con(z.reshape(N * V, D), labels.repeat_interleave(V), temperature, **options).view(N, V)
        check_options(reduction)
        return reduce(losses.t(), reduction, weights).t()
    if not isinstance(z, Tensor) or z.ndim != 2:
        raise ValueError(f"z must be a tensor [N, D] or [N, V, D], not {describe(z)}")
    check_features("z", z)
    N, D = z.shape
    if labels is None:
        raise ValueError("labels must be given for z [N, D]: without labels it takes several views, [N, V, D]")
    check_ids("labels", labels, (N,), z)
    check_options(reduction)
    check_weights(weights, N, z)
    if form not in ("out", "in"):
        raise ValueError(f"form must be 'out' or 'in', not {form!r}")
    scale = scale_of(temperature, logit_scale, z.device)

    # Sorted by label, rows meet their positives near the diagonal only: the pass over the positives costs next to
    # nothing, and keeping them apart from the negatives keeps the digits of tiny losses.
    labels, order = labels.sort()
    z = unit(z) if normalize else z
    z = z.gather(0, order.unsqueeze(1).expand(N, D))  # whose backward is faster than that of z[order]
    negative = similarity_lse(z, scale=scale, q_ids=labels)
    positive = similarity_lse(z, scale=scale, q_ids=labels, pairs="same")
    of_label, count = sum_of_equal(z, labels, labels)
    count = count - 1
    alone, twins = count == 0, count == 1
    losses = softplus((negative - positive).masked_fill(alone, -torch.inf))
    if form == "in":
        losses = losses + count.clamp_min(1).to(losses.dtype).log()
    else:
        mean = dots(z, of_label - wide(z)) * scale / count.clamp_min(1)
        losses = losses + (positive - mean).masked_fill(alone | twins, 0)
    losses = torch.zeros_like(losses).scatter(0, order, losses)
    return reduce(losses, reduction, weights)
