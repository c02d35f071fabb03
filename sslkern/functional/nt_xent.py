"""NT-Xent: Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations" (SimCLR), 2020."""

from torch import Tensor

from ._common import beaten, check_alike, check_features, check_ids, check_options, contrast, reduce, scale_of


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
    group: None = None,
    strategy: str = "all_gather",
) -> Tensor | tuple[Tensor, Tensor]:
    """The SimCLR loss (eq. 1 of https://arxiv.org/abs/2002.05709) of two views of the same N samples.

    Each of the 2N rows has the other view of its sample as positive and the 2N - 2 views of the other samples as
    negatives. The 2N x 2N similarities are never stored.

    Args:
        z0, z1: [N, D], row i of both is a view of sample i. fp32, bf16, fp16 or fp64; sums run in fp32 (fp64).
        temperature: divides the similarities: a nonzero number, or a tensor with one element that gets a gradient.
        logit_scale: multiplies them instead and replaces `temperature`; already exponentiated.
        ids: int64 [N]; samples with equal ids are not negatives of each other. Default: all differ.
        normalize: divide the rows by their norm first (cosine similarity).
        reduction: "mean" or "sum" over the 2N rows, or "none".
        stats: also return the share of rows whose positive beats every negative.
        group, strategy: the processes that share a batch; only None, this process, so far.

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
    check_features("z0", z0)
    check_alike("z1", z1, "z0", z0)
    check_options(reduction, group, strategy)
    scale = scale_of(temperature, logit_scale, z0.device)
    if ids is not None:
        check_ids("ids", ids, z0.shape[:1], z0)
    losses, positive, best = contrast(z0, z1, scale, ids, "views", normalize, stats)
    loss = reduce(losses.view(-1), reduction)
    return (loss, beaten(best, positive)) if stats else loss
