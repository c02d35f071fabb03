"""Memories of which every rank holds a part: who has which rows, and what is written to them.

Rows are dealt out in turn: of W ranks rank r has the rows r, r + W, r + 2 W .. of the memory. So a batch that is pushed
onto a queue, to rows that follow each other, goes to all ranks alike: each sends its rows straight to their places.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..common.node import Operator
from .collectives import group_of, send_rows, stacked
from .contract import counts_of
from .ranks import Ranks

# The rows of a memory: a tensor, or with sharded=True a Shard. Type checkers accept both.
TensorOrShard = Tensor | Any


class Shard:
    """This rank's part of a memory, which losses take in the place of a tensor with all of its rows.

    It has the shape of the whole, and `t()` is itself: a queue is given as `memory.queue.t()`, whether it is sharded or
    not. Its rows get no gradient.
    """

    ndim, requires_grad = 2, False

    def __init__(
        self, memory: nn.Module, name: str, size: int, members: tuple[int, ...], rank: int, rows: Tensor | None = None
    ):
        self._memory, self._name, self._rows = memory, name, rows
        self.size, self.members, self.rank = size, members, rank

    @property
    def rows(self) -> Tensor:
        """Those of this rank; as the memory has them now, which may have been moved."""
        return getattr(self._memory, self._name) if self._rows is None else self._rows

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.size, *self.rows.shape[1:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.rows.dtype

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def t(self) -> "Shard":
        return self

    def to(self, dtype: torch.dtype) -> "Shard":
        return self if self.dtype == dtype else self.of(self.rows.to(dtype))

    def of(self, rows: Tensor, size: int | None = None) -> "Shard":
        """The same part of another memory, which has `size` rows."""
        size = self.size if size is None else size
        return Shard(self._memory, self._name, size, self.members, self.rank, rows)

    def same_on_all_ranks(self) -> None:
        """Its `repr` is; what `preflight` compares."""

    def __repr__(self) -> str:
        own = int(self._memory.get_buffer("shard_place")[0]) == self.rank
        whose = "its part" if own else "the part of another rank (DDP sends it: see sslkern.memory.ignored_by_ddp)"
        shape, dtype = list(self.shape), str(self.dtype)[6:]
        return f"{whose} of a memory {shape} {dtype} on {self.device.type} sharded over ranks {list(self.members)}"


def rows_and_shard(name: str, x: TensorOrShard, ranks: Ranks | None) -> tuple[Tensor, Shard | None]:
    """Of a `Shard` the rows here, and itself where there are others; of all else x."""
    if not isinstance(x, Shard):
        return x, None
    others = len(x.members) > 1
    if ranks is None:
        if not others:
            return x.rows, None
        fits, theirs = False, "this process alone"
    else:
        fits, theirs = others and len(x.members) == ranks.size, f"a group of {ranks.size}"
        if fits and not torch.compiler.is_compiling():
            members = tuple(torch.distributed.get_process_group_ranks(group_of(ranks.group)))
            fits, theirs = members == x.members, f"ranks {list(members)}"
    if not fits:
        raise ValueError(f"{name} is sharded over ranks {list(x.members)}, not over {theirs}; give the loss its group")
    return x.rows, x


def with_rows(shard: Shard | None, rows: Tensor) -> "Tensor | Shard":
    return rows if shard is None else shard.of(rows)


def rows_of_rank(size: int, rank: int, ranks: int) -> int:
    """How many of `size` rows are that rank's."""
    return (size - rank + ranks - 1) // ranks


# ---- a queue ---------------------------------------------------------------------------------------------------------


def push_rows(
    shard: Shard,
    ptr: Tensor,
    keys: Tensor,
    normalize: bool,
    ranks: Ranks,
    own_labels: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    """`ops.queue_push_` of the keys of all ranks onto a queue that is sharded over them, and of what belongs to them
    onto own_labels, the labels of the rows here. The host waits for ptr."""
    _push.registered(
        shard.rows, ptr, keys.detach(), own_labels, labels, shard.size, normalize, ranks.group, ranks.counts
    )


def _pushed(
    rows: Tensor,
    ptr: Tensor,
    keys: Tensor,
    own_labels: Tensor | None,
    labels: Tensor | None,
    size: int,
    normalize: bool,
    group: str,
    counts: Sequence[int],
) -> None:
    counts, ranks = counts_of(counts, keys.shape[0], group), group_of(group)
    W, rank = ranks.size(), ranks.rank()
    start, total = int(ptr) % size, sum(counts)
    kept = max(0, total - size)  # of a batch larger than the queue the last rows stay
    ends = [sum(counts[: r + 1]) for r in range(W)]
    # Rows are counted on round the ring, from the one that is written first: those of rank r go to `spans[r]`.
    spans = [(start + max(kept, end - count), start + max(kept, end)) for end, count in zip(ends, counts, strict=True)]
    receives = [_passed(stop, rank, W, size) - _passed(first, rank, W, size) for first, stop in spans]
    first, stop = spans[rank]
    sends = [_passed(stop, r, W, size) - _passed(first, r, W, size) for r in range(W)]
    places = torch.arange(first, stop, device=keys.device)
    order = (places % size % W).argsort(stable=True) + keys.shape[0] - (stop - first)
    here = rows.shape[0]
    place = torch.tensor([_passed(start + kept, rank, W, size) % here], dtype=torch.int64, device=ptr.device)
    if own_labels is not None and labels is not None:
        arrived = send_rows(labels[order], sends, receives, group)
        at = torch.arange(len(arrived), device=own_labels.device) + place
        own_labels.index_copy_(0, at % here, arrived)
    ops.queue_push_(rows, place, send_rows(keys[order], sends, receives, group), normalize)
    ptr.fill_((start + total) % size)


def _passed(steps: int, rank: int, ranks: int, size: int) -> int:
    """Of the first `steps` rows round the ring, from row 0 on, how many are that rank's."""
    turns, rest = divmod(steps, size)
    return turns * rows_of_rank(size, rank, ranks) + rows_of_rank(rest, rank, ranks)


# ---- a bank ----------------------------------------------------------------------------------------------------------


def update_rows(shard: Shard, index: Tensor, features: Tensor, momentum: float, ranks: Ranks) -> None:
    """`ops.bank_update_` of the samples of all ranks in a bank that is sharded over them."""
    _update.registered(shard.rows, index, features.detach(), shard.size, momentum, ranks.group, ranks.counts)


def _updated(
    rows: Tensor, index: Tensor, features: Tensor, size: int, momentum: float, group: str, counts: Sequence[int]
) -> None:
    counts_of(counts, index.shape[0], group)
    ranks = group_of(group)
    W, rank = ranks.size(), ranks.rank()
    owner = index % W
    order = owner.argsort(stable=True)
    sends = torch.cat((owner.bincount(minlength=W), outside(index, size).view(1)))
    *everyones, wrong = stacked(sends, group).t().tolist()
    raise_for_any(wrong, size)
    sends, receives = [of_rank[rank] for of_rank in everyones], everyones[rank]
    at = send_rows(index[order] // W, sends, receives, group)
    ops.bank_update_(rows, at, send_rows(features[order], sends, receives, group), momentum)


def outside(index: Tensor, size: int) -> Tensor:
    """How many of these are no rows of a bank."""
    return ((index < 0) | (index >= size)).sum()


def raise_for_any(wrong: Sequence[int], size: int) -> None:
    """Raises on all ranks where one has an index that is no row."""
    if any(wrong):
        found = ", ".join(f"{count} on rank {rank}" for rank, count in enumerate(wrong) if count)
        raise IndexError(f"index must be rows of the bank, 0 to {size - 1}; of others there are {found}")


# ----------------------------------------------------------------------------------------------------------------------


def _nothing(*inputs: Any) -> None:
    return None


_push = Operator(
    "queue_push_over_ranks_(Tensor(a!) rows, Tensor(b!) ptr, Tensor keys, Tensor(c!)? own_labels, Tensor? labels,"
    " int size, bool normalize, str group, int[] counts) -> ()",
    _pushed,
    _nothing,
)
_update = Operator(
    "bank_update_over_ranks_(Tensor(a!) rows, Tensor index, Tensor features, int size, float momentum, str group,"
    " int[] counts) -> ()",
    _updated,
    _nothing,
)
