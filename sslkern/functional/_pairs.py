"""Positives and negatives beyond `contrast`: two views stacked, counts and sums over ids, label smoothing."""

import torch
from torch import Tensor

from ..common.arguments import check_flags
from ..common.autocast import cat
from ..common.rows import dots, unit
from ..common.tensors import wide
from .checks import check_alike, check_features, check_ids, promoted


def two_views(z0: Tensor, z1: Tensor, ids: Tensor | None, normalize: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Checks and stacks two views: z [2N, D], their ids [2N], and cosine [2N] of each row with its other view."""
    z0, z1 = promoted(z0, z1)
    check_features("z0", z0)
    check_alike("z1", z1, "z0", z0)
    check_flags(normalize=normalize)
    if ids is None:
        ids = torch.arange(z0.shape[0], device=z0.device)
    else:
        check_ids("ids", ids, z0.shape[:1], z0)
    z0, z1 = (unit(z0), unit(z1)) if normalize else (z0, z1)
    return cat((z0, z1)), ids.repeat(2), dots(z0, z1).repeat(2)


def equal_ids(q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where in the sorted k_ids the equals of each q_id begin [N], how many they are [N], and a bucket [M] in which
    each k_id falls together with its equals: that of their first."""
    # Sorting knows the shapes beforehand, as torch.unique does not: nothing waits for the device, and it compiles.
    k_sorted, q_ids = k_ids.sort().values, q_ids.contiguous()
    first = torch.searchsorted(k_sorted, q_ids)
    count = torch.searchsorted(k_sorted, q_ids, right=True) - first
    return first, count, torch.searchsorted(k_sorted, k_ids.contiguous())


def sum_of_equal(k: Tensor, q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sum [N, D] of the rows of k [M, D] whose ids equal each of q_ids [N], and how many they are [N]."""
    first, count, bucket = equal_ids(q_ids, k_ids)
    M, D = k.shape
    sums = wide(k).new_zeros(M + 1, D).scatter_add(0, bucket.unsqueeze(1).expand(M, D), wide(k))
    return sums.gather(0, first.unsqueeze(1).expand(-1, D)).masked_fill((count == 0).unsqueeze(1), 0), count


def over_different(q: Tensor, k: Tensor, q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor]:
    """sum_j <q_i, k_j> over the pairs with different ids, and their number: one dot product per row."""
    equal, count = sum_of_equal(k, q_ids, k_ids)
    count = k.shape[0] - count
    return dots(q, wide(k).sum(0) - equal).masked_fill(count == 0, 0), count


def above_mean(positive: Tensor, total: Tensor, count: Tensor) -> Tensor:
    """positive - the mean score of all classes: the positive and `count` others, which sum to `total`.

    Cross-entropy with label smoothing e is (1 - e)(lse - positive) + e (lse - mean): the plain loss plus e times this.
    """
    return (count * positive - total) / (1 + count)
