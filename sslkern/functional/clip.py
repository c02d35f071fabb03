"""CLIP: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", 2021."""

import math
from typing import Any

import torch
from torch import Tensor

from ..common.arguments import FLOATS, check_dense, check_own_memory
from ..common.numbers import check_number, constant
from ..common.tensors import TensorOrTuple
from ..distributed import Group, ranks_of
from .checks import check_alike, check_features, promoted, scalar
from .info_nce import info_nce


def clip(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
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
    """The CLIP loss (figure 3 of https://arxiv.org/abs/2103.00020): images find their texts and texts their images.

    The mean of two cross-entropies over the same N x N scores, logit_scale * <image_i, text_j>, one along the rows and
    one along the columns; both come from one pass and the scores are never stored.

                t0 t1 t2        rows: image -> text, columns: text -> image
            i0   +  -  -        + positive, - negative
            i1   -  +  -
            i2   -  -  +

    Args:
        image, text: [N, D], row i of both belong together. fp32, bf16, fp16 or fp64.
        logit_scale: multiplies the similarities: a number, or a tensor with one element that gets a gradient, already
            exponentiated. CLIP learns its logarithm, from log(1 / 0.07), and keeps it below log(100):
            `clamp_logit_scale_`, which also takes a lower bound.
        ids: int64 [N]; rows with equal ids (a caption's hash) are not negatives of each other. Default: all differ.
        normalize, reduction, stats, weights, label_smoothing: as in `info_nce`.
        group, strategy, grad_reduce: the processes that share a batch, as in `nt_xent`.

    Returns:
        The loss, 0-d, or for "none" [N], in fp32 (fp64); with `stats` also the share of rows and columns whose positive
        wins. A row without negatives adds 0 and counts in the mean.

    Raises:
        ValueError, TypeError: an argument does not fit, or the batch is empty; the message names it.

    Example:
        >>> log_scale = torch.tensor(1 / 0.07).log().requires_grad_()
        >>> image, text = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32, requires_grad=True)
        >>> sslkern.functional.clip(image, text, log_scale.exp()).backward()
        >>> log_scale = sslkern.functional.clamp_logit_scale_(log_scale)  # after the optimizer's step
    """
    ranks = None
    if group is not None:
        given = dict(image=image, text=text, logit_scale=logit_scale, ids=ids, weights=weights, normalize=normalize)
        options = dict(reduction=reduction, stats=stats, label_smoothing=label_smoothing)
        ranks = ranks_of(group, strategy, grad_reduce, "clip", **given, **options)
    image, text = promoted(image, text)
    check_features("image", image, ranks)
    check_alike("text", text, "image", image)
    logit_scale = scalar("logit_scale", logit_scale, image)
    return info_nce(
        image,
        text,
        two_way=True,
        logit_scale=logit_scale,
        ids=ids,
        normalize=normalize,
        reduction=reduction,
        stats=stats,
        group=ranks or group,
        strategy=strategy,
        grad_reduce=grad_reduce,
        weights=weights,
        label_smoothing=label_smoothing,
    )


@torch.no_grad()
def clamp_logit_scale_(log_scale: Tensor, max: float | None = math.log(100), min: float | None = None) -> Tensor:
    """Clamps the learned logarithm of a logit scale to at most `max` and at least `min`, in place, outside of autograd;
    returns it.

    CLIP does so after each step (section 2.5): scales above 100 made its training unstable. It has no lower bound;
    OpenCLIP's is `min=0.0`, a scale of 1. None: no bound on that side.

    Example:
        >>> log_scale = torch.nn.Parameter(torch.tensor(7.0))
        >>> round(sslkern.functional.clamp_logit_scale_(log_scale, min=0.0).exp().item(), 3)
        100.0
    """
    check_dense("log_scale", log_scale)
    if not isinstance(log_scale, Tensor) or log_scale.dtype not in FLOATS:
        raise TypeError("log_scale must be a floating-point tensor, the logarithm of the logit scale")
    check_own_memory("log_scale", log_scale)
    if max is not None:
        max = check_number("max", max, -math.inf)
    if min is not None:
        min = check_number("min", min, -math.inf)
    if max is not None and min is not None and min > max:
        raise ValueError(f"min must not exceed max, the logarithms of the bounds of the scale, but {min} > {max}")
    if max is None and min is None:
        return log_scale
    return log_scale.clamp_(min=_bound(min, log_scale), max=_bound(max, log_scale))


def _bound(value: float | None, like: Tensor) -> Any:
    """value, which may be too large for the type of `like`, as an argument of its `clamp_`."""
    if value is None:
        return None
    if torch.compiler.is_compiling():  # which would compile anew for each bound that is a number
        return constant(value, like, like.dtype)
    most = torch.finfo(like.dtype).max
    return sorted((-most, value, most))[1]
