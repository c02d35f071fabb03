"""The losses of pairs over ranks: `ops.pair_contrast`, whose negatives are the rows of all of them."""

import functools
from collections.abc import Callable

from torch import Tensor

from ..common.autocast import cat, stack
from ..common.rows import dots, unit
from ..common.sums import pair_loss, times
from ..ops.pair_contrast import pair_contrast
from .ranks import Ranks, copies, row_ids
from .similarity_lse import parts, similarity_lse


def pair_contrast_over(ranks: Ranks) -> Callable:
    """`ops.pair_contrast` of this rank's x and y: reduction must be "none", and ids are global. A bank is the same on
    all ranks, and its negatives are nobody's rows: nothing is exchanged.

    Where there are no others a loss calls that of `ops` itself: a small batch feels each function on the way to its
    kernel.
    """
    return functools.partial(_pair_contrast, ranks)


def _pair_contrast(
    ranks: Ranks,
    x: Tensor,
    y: Tensor,
    scale: float | Tensor,
    ids: Tensor | None,
    mode: str,
    normalize: bool,
    need_best: bool,
    bank: Tensor | None = None,
    reduction: str = "none",
) -> tuple[Tensor, Tensor, Tensor | None]:
    if bank is not None:
        return pair_contrast(x, y, scale, ids, mode, normalize, need_best, bank, reduction)
    N = x.shape[0]
    if ids is None:
        ids = row_ids(N, x.device, ranks)
    if normalize:
        x, y = unit(x), unit(y)
    positive = times(dots(x, y), scale)
    if mode == "views":
        out = similarity_lse(cat((x, y)), None, scale, q_ids=ids.repeat(2), best=need_best, ranks=copies(ranks, 2))
    else:
        out = similarity_lse(x, y, scale, q_ids=ids, k_ids=ids, columns=mode == "two_way", best=need_best, ranks=ranks)
    sides, best = parts(out, need_best)
    views = 1 + (mode == "views")
    negatives = stack([view for side in sides for view in side.view(views, N)])
    return pair_loss(negatives, positive), positive.detach(), best[0].view(negatives.shape) if need_best else None
