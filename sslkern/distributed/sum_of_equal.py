"""`sum_of_equal`: sums of the keys that share an id, over the keys of all ranks."""

from torch import Tensor

from ..common import equal
from .contract import gather
from .ranks import Ranks


def sum_of_equal(k: Tensor, q_ids: Tensor, k_ids: Tensor, ranks: Ranks | None = None) -> tuple[Tensor, Tensor]:
    """The sum [N, D] of the rows of k [M, D] whose ids equal each of q_ids [N], and how many they are [N]. ranks: how
    the rows of k are spread, of which this rank has M."""
    return equal.sum_of_equal(gather(k, ranks), q_ids, gather(k_ids, ranks))
