"""Sums over rows of equal ids."""

import torch
from torch import Tensor

from .tensors import wide


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
