"""Positives and negatives beyond `pair_contrast`: two views stacked, rows and their best, sums over ids, smoothing."""

from typing import Any

from torch import Tensor

from ..common.arguments import check_flags
from ..common.autocast import cat
from ..common.rows import dots, unit
from ..common.tensors import wide
from ..distributed import Ranks, all_rows, row_ids, similarity_lse, sum_of_equal, total_of
from .checks import check_alike, check_features, check_ids, promoted


def two_views(
    z0: Tensor, z1: Tensor, ids: Tensor | None, normalize: bool, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Checks and stacks two views: z [2N, D], their ids [2N], and cosine [2N] of each row with its other view."""
    z0, z1 = promoted(z0, z1)
    check_features("z0", z0, ranks)
    check_alike("z1", z1, "z0", z0)
    check_flags(normalize=normalize)
    ids = own_ids(ids, z0, ranks)
    if normalize:
        z0, z1 = unit(z0), unit(z1)
    return cat((z0, z1)), ids.repeat(2), dots(z0, z1).repeat(2)


def own_ids(ids: Tensor | None, x: Tensor, ranks: Ranks | None) -> Tensor:
    """The ids of rows x [N, D], checked; where none are given numbers that all differ."""
    if ids is None:
        return row_ids(x.shape[0], x.device, ranks)
    check_ids("ids", ids, x.shape[:1], x)
    return ids


def row_and_best(
    q: Tensor, k: Tensor | None, scale: float | Tensor, *, need_best: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """`similarity_lse` of the rows and, where needed, the best score of each, else None."""
    out = similarity_lse(q, k, scale, best=need_best, **options)
    return (out[0], out[1]) if need_best else (out, None)


def over_different(
    q: Tensor, k: Tensor, q_ids: Tensor, k_ids: Tensor, ranks: Ranks | None = None
) -> tuple[Tensor, Tensor]:
    """sum_j <q_i, k_j> over the pairs with different ids, and their number: one dot product per row. ranks: how the
    rows of k are spread."""
    equal, count = sum_of_equal(k, q_ids, k_ids, ranks)
    count = all_rows(k.shape[0], ranks) - count
    return dots(q, total_of(wide(k).sum(0), ranks) - equal).masked_fill(count == 0, 0), count


def above_mean(positive: Tensor, total: Tensor, count: Tensor | int) -> Tensor:
    """positive - the mean score of all classes: the positive and `count` others, which sum to `total`.

    Cross-entropy with label smoothing e is (1 - e)(lse - positive) + e (lse - mean): the plain loss plus e times this.
    """
    return (count * positive - total) / (1 + count)
