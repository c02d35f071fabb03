"""NT-Xent: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), 2020."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.arguments import check_choice, check_dense, describe
from ..common.autocast import product, stack
from ..common.numbers import check_number
from ..common.rows import unit
from ..common.sums import pair_loss, times
from ..common.tensors import TensorOrTuple, wide
from ..distributed import Group, Ranks, copies, pair_contrast_over, ranks_of, similarity_lse
from ..ops.pair_contrast import pair_contrast
from ._pairs import above_mean, over_different, own_ids, two_views
from .checks import check_alike, check_features, check_ids, check_options, check_pair, check_weights, promoted, scale_of
from .formulas import at_once_of, beaten, reduce, rows_of_views, tie

POSITIVES = ("separate", "joint")


def nt_xent(
    z0: Tensor,
    z1: Tensor,
    temperature: float | Tensor = 0.5,
    *,
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    stats: bool = False,
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> TensorOrTuple:
    """The SimCLR loss (eq. 1 of https://arxiv.org/abs/2002.05709) of two views of the same N samples.

    Each of the 2N rows has the other view of its sample as positive and the 2N - 2 views of the other samples as
    negatives. The 2N x 2N similarities are never stored.

                a0 a1 a2  b0 b1 b2        a = z0, b = z1; + positive, - negative, . left out
            a0   .  -  -   +  -  -
            b1   -  +  -   -  .  -

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64; sums run in fp32 (fp64).
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        logit_scale: multiplies them instead and replaces `temperature`; already exponentiated.
        ids: int64 [N]; samples with equal ids are not negatives of each other. Default: all differ.
        normalize: divide the rows by their norm first (cosine similarity).
        reduction: "mean" or "sum" over the 2N rows, or "none".
        stats: also return the share of rows whose positive beats every negative; a tie, up to rounding, is no win, so
            that a collapsed encoder has a share of 0.
        group: the processes that share a batch, each with its own rows: None or "self" (this one), "world", a process
            group or a device mesh of one dimension. The loss is that of all their rows, the same on each; ids are
            global.
        strategy: how keys come from other processes: "all_gather", all at once; "ring", one process's at a time, in
            memory for two; "auto".
        grad_reduce: "mean" where gradients of the encoder are averaged over the group (DDP, FSDP), "sum" where they are
            added up. [Which gradient is multiplied by what](docs/distributed.md).
        weights: floating point [N], w_i for both rows of sample i: "mean" is sum w_i l_i / sum w_i.
        label_smoothing: in [0, 1), the share of the target that is spread over the positive and all negatives.

    Returns:
        The loss, 0-d, or for "none" [2N] with the rows of z0 first, in fp32 (fp64). With `stats` a pair of it and the
        share, 0-d without gradient. A row without negatives adds 0 and counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> z0, z1 = torch.randn(256, 128, requires_grad=True), torch.randn(256, 128)
        >>> loss = sslkern.functional.nt_xent(z0, z1, temperature=0.1)
        >>> loss.backward()
    """
    ranks = None
    if group is not None:
        options = dict(ids=ids, normalize=normalize, reduction=reduction, stats=stats, label_smoothing=label_smoothing)
        given = dict(z0=z0, z1=z1, temperature=temperature, logit_scale=logit_scale, weights=weights)
        ranks = ranks_of(group, strategy, grad_reduce, "nt_xent", **given, **options)
    z0, z1 = check_pair("z0", z0, "z1", z1, ranks)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize, stats=stats)
    label_smoothing = check_number("label_smoothing", label_smoothing, 0, 1)
    if weights is not None:
        check_weights(weights, z0.shape[0], z0)
    scale = scale_of(temperature, logit_scale, z0, ranks)
    if ids is not None:
        check_ids("ids", ids, z0.shape[:1], z0)
    at_once = at_once_of(reduction, weights, label_smoothing, ranks)
    contrast = pair_contrast if ranks is None else pair_contrast_over(ranks)
    loss, positive, best = contrast(z0, z1, scale, ids, "views", normalize, stats, None, at_once)
    if label_smoothing > 0:
        z, ids, cosine = two_views(z0, z1, ids, normalize, ranks)
        smooth = above_mean(cosine, *over_different(z, z, ids, ids, copies(ranks, 2)))
        loss = loss + label_smoothing * scale * smooth.view_as(loss)
    if at_once == "none":
        loss = reduce(loss, reduction, weights, ranks)
        if reduction == "none":
            loss = loss.view(-1)
    if best is not None:
        return loss, beaten(best, positive, tie(scale, z0, z1, normalize), ranks)
    return loss


def nt_xent_multi_view(
    views: Tensor | Sequence[Tensor],
    temperature: float | Tensor = 0.5,
    *,
    positives: str = "separate",
    logit_scale: float | Tensor | None = None,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
    weights: Tensor | None = None,
) -> Tensor:
    """NT-Xent of V >= 2 views of the same N samples: each of the VN rows has V - 1 positives and V(N - 1) negatives.

    "separate": the mean over its positives of -log(e^p / (e^p + sum of the negatives)): positives do not compete.
    "joint": all positives stay in every denominator, as in SupCon (eq. 2 of https://arxiv.org/abs/2004.11362). For two
    views both are `nt_xent`.

                a0 a1  b0 b1  c0 c1        V = 3, N = 2; + positive, - negative, . left out
            a0   .  -   +  -   +  -

    Args:
        views: [V, N, D], or a sequence of V tensors [N, D]; row i of each is a view of sample i.
        positives: "separate" or "joint".
        temperature, logit_scale, normalize, reduction, group, strategy, grad_reduce, weights: as in `nt_xent`.
        ids: int64 [N]; samples with equal ids are not negatives of each other. Default: all differ.

    Returns:
        The loss, 0-d, or for "none" [V, N], in fp32 (fp64). A row without negatives adds 0; with "joint" its positives
        still compete, and it adds 0 for two views only.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> views = torch.randn(4, 64, 32, requires_grad=True)  # four views of 64 samples
        >>> sslkern.functional.nt_xent_multi_view(views, temperature=0.1).backward()
    """
    ranks = None
    if group is not None:
        given = dict(views=views, temperature=temperature, positives=positives, logit_scale=logit_scale, ids=ids)
        options = dict(normalize=normalize, reduction=reduction, weights=weights)
        ranks = ranks_of(
            group, strategy, grad_reduce, "nt_xent_multi_view", rows=rows_of_views(views), **given, **options
        )
    z = _stacked(views, ranks)
    V, N, D = z.shape
    check_choice("positives", positives, *POSITIVES)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize)
    check_weights(weights, N, z)
    scale = scale_of(temperature, logit_scale, z, ranks)
    ids = own_ids(ids, z[0], ranks)
    if normalize:
        z = unit(z)
    rows = z.reshape(V * N, D)
    negative = similarity_lse(rows, scale=scale, q_ids=ids.repeat(V), ranks=copies(ranks, V)).view(V, N, 1)
    # The V x V scores within each sample, [V, N, V], and of them those of two different views.
    sample = wide(z).transpose(0, 1)
    within = times(product(sample, sample.mT).transpose(0, 1), scale)
    view = torch.arange(V, device=z.device)
    others = (view.unsqueeze(1) + view[1:]) % V
    positive = within.gather(2, others.unsqueeze(1).expand(V, N, V - 1))
    if positives == "separate":
        losses = pair_loss(negative, positive).mean(2)
    else:  # softplus(negatives - positives), exact when tiny, and how much the positives differ: for one exactly 0
        together = positive.logsumexp(2)
        losses = pair_loss(negative.squeeze(2), together) + (together - positive.mean(2))
    return reduce(losses, reduction, weights, ranks)


def _stacked(views: Tensor | Sequence[Tensor], ranks: Ranks | None) -> Tensor:
    """[V, N, D]."""
    check_dense("views", views)
    listed = isinstance(views, (list, tuple)) or isinstance(views, Tensor) and views.ndim == 3
    if not listed or len(views) < 2:
        raise ValueError(f"views must be a tensor [V, N, D] or a list of V tensors [N, D], V >= 2, not {_what(views)}")
    if isinstance(views, Tensor):
        check_features("views[0]", views[0], ranks)
        return views
    views = promoted(*views)
    check_features("views[0]", views[0], ranks)
    for i, view in enumerate(views[1:], 1):
        check_alike(f"views[{i}]", view, "views[0]", views[0])
    return stack(views)


def _what(views: object) -> str:
    if isinstance(views, (list, tuple)):
        return str(len(views))
    return describe(views)
