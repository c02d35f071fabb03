"""One loss of the rows of many processes: who shares a batch, what they exchange, and the primitives over all of it.

A loss asks `ranks_of` first, and is then the code that it is for one process: what is row by row stays here, and what
looks across rows is one of the functions below, with `ranks` as last argument. With `ranks=None` each of them is what
it is named after in `sslkern.ops`, or does nothing.
"""

from .collectives import recorded
from .contract import gather, over_ranks, own_rows, replicated, total_of
from .pair_contrast import pair_contrast_over
from .preflight import preflight
from .ranks import (
    GRAD_REDUCES,
    STRATEGIES,
    Group,
    Ranks,
    all_rows,
    alone,
    check_group,
    copies,
    first_row,
    members_of,
    one_each,
    ranks_of,
    row_ids,
    rows_here,
    within,
)
from .shard_scores import lse_over_shards, nearest_over_shards, sampled_similarity, sampled_similarity_bwd
from .shards import Shard, TensorOrShard, push_rows, rows_and_shard, rows_of_rank, update_rows, with_rows
from .shuffled import shuffled
from .similarity_lse import similarity_lse
from .similarity_softplus import similarity_softplus
from .similarity_topk import similarity_topk
from .sum_of_equal import sum_of_equal

__all__ = [
    "GRAD_REDUCES",
    "STRATEGIES",
    "Group",
    "Ranks",
    "Shard",
    "TensorOrShard",
    "all_rows",
    "alone",
    "check_group",
    "copies",
    "first_row",
    "gather",
    "lse_over_shards",
    "members_of",
    "nearest_over_shards",
    "one_each",
    "over_ranks",
    "own_rows",
    "pair_contrast_over",
    "preflight",
    "push_rows",
    "ranks_of",
    "recorded",
    "replicated",
    "row_ids",
    "rows_and_shard",
    "rows_here",
    "rows_of_rank",
    "sampled_similarity",
    "sampled_similarity_bwd",
    "shuffled",
    "similarity_lse",
    "similarity_softplus",
    "similarity_topk",
    "sum_of_equal",
    "total_of",
    "update_rows",
    "with_rows",
    "within",
]
