"""SigLIP: Zhai et al., "Sigmoid Loss for Language Image Pre-Training", 2023."""

from torch import Tensor

from ..common.node import past_dispatcher
from ..common.rows import dots, row_numbers
from ..common.sums import softplus, times, total
from ..distributed import Group, all_rows, over_ranks, own_rows, ranks_of, replicated, row_ids, similarity_softplus
from ..ops.pair_contrast import pair_sigmoid
from ..ops.unit_pairs import unit_pairs
from .checks import check_alike, check_features, check_ids, check_options, promoted, scalar


def siglip(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    normalize: bool = True,
    reduction: str = "mean",
    group: Group = None,
    strategy: str = "auto",
    grad_reduce: str = "mean",
) -> Tensor:
    """The sigmoid loss (section 3.2 of https://arxiv.org/abs/2303.15343) of N pairs of image and text.

    Each of the N x N pairs is a question of its own, whether the two belong together. With the logits
    `l_ij = logit_scale * <image_i, text_j> + logit_bias`, which are never stored:

        loss_i = softplus(-l_ii) + sum_(j != i) softplus(l_ij)

                text 0  1  2  3
        image 0      +  -  -  -
        image 1      -  +  -  -      + positive, - negative
        image 2      -  -  +  -
        image 3      -  -  -  +

    Args:
        image, text: [N, D], row i of both belong together. fp32, bf16, fp16 or fp64; sums run in fp32 (fp64).
        logit_scale: multiplies the similarities: a number or a tensor with one element, which gets a gradient. Already
            exponentiated; the paper learns its logarithm, from log(10) on.
        logit_bias: added to them, likewise; the paper learns it, from -10 on.
        ids: int64 [N]; rows with equal ids are not negatives of each other (a caption's hash, a label), nor positives,
            of which each row has one. Default: all differ.
        normalize: divide the rows by their norm first (cosine similarity).
        reduction: "mean" or "sum" over the N rows, or "none", which takes one pass over the logits more.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64). A row without negatives has the loss of its positive.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> image, text = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
        >>> log_scale, bias = torch.tensor(2.3, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
        >>> sslkern.functional.siglip(image, text, log_scale.exp(), bias).backward()
    """
    ranks = None
    if group is not None:
        given = dict(image=image, text=text, logit_scale=logit_scale, logit_bias=logit_bias, ids=ids)
        ranks = ranks_of(group, strategy, grad_reduce, "siglip", **given, normalize=normalize, reduction=reduction)
    image, text = promoted(image, text)
    check_features("image", image, ranks)
    check_alike("text", text, "image", image)
    check_options(reduction, group, strategy, grad_reduce, normalize=normalize)
    scale, bias = scalar("logit_scale", logit_scale, image), scalar("logit_bias", logit_bias, image)
    scale, bias = replicated(scale, ranks), replicated(bias, ranks)
    N = image.shape[0]
    if ids is not None:
        check_ids("ids", ids, (N,), image)
    if ranks is None:
        loss = pair_sigmoid(image, text, scale, bias, ids, normalize, reduction)
        if loss is not None:
            return loss
    if ids is None and ranks is None:
        ids = row_numbers(N, 1, image.device, keep=past_dispatcher())
    elif ids is None:
        ids = row_ids(N, image.device, ranks)
    if normalize:
        image, text, cosine = unit_pairs(image, text)
    else:
        cosine = dots(image, text)
    positives = softplus(-(times(cosine, scale) + bias))
    if reduction == "none":
        rows = similarity_softplus(image, text, scale, bias, q_ids=ids, k_ids=ids, rows=True, ranks=ranks)
        return own_rows(positives + rows, ranks)
    share = total(positives) + similarity_softplus(image, text, scale, bias, q_ids=ids, k_ids=ids, ranks=ranks)
    loss = over_ranks(share, ranks)
    if reduction == "mean":
        return loss / all_rows(N, ranks)
    return loss
