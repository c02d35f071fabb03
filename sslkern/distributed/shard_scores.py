"""What losses ask of a memory that is sharded over ranks (shards.py). Queries travel, and what comes out for them comes
home; the keys of a memory, of which there are many more, stay where they are.

    lse_over_shards        the log-sum-exp of each query over all rows, with the mean of the rows, of which its gradient
                           is made: nothing is left to do in the backward, and the memory may be written to before it
    nearest_over_shards    the row that is nearest to each
    sampled_similarity     the scores with the rows that a query names: the names go to the ranks that have them, each
                           of which gets lists of the same length
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..backends import chosen, load, resolve, use_backend
from ..backends.problem import Problem, tensors_of
from ..common.node import Node, Operator
from ..common.rows import unit
from ..common.tensors import TensorOrTuple, accumulator, transformed
from ..ops.problem import SCHEMA, checked_problem, options
from ..ops.similarity_lse import frozen_backward, frozen_save
from .blocks import PLACE, Place, blocks, gathered, place_of, strategy_of
from .collectives import exchange_rows, gather_rows, send_rows, stacked, summed_rows
from .ranks import Ranks
from .schedule import ring
from .shards import Shard, outside, raise_for_any
from .similarity_lse import mean_of_both, merged

# ---- all rows --------------------------------------------------------------------------------------------------------


def lse_over_shards(
    q: Tensor,
    shard: Shard,
    scale: float | Tensor,
    *,
    q_ids: Tensor | None = None,
    k_ids: Shard | None = None,
    best: bool = False,
    ranks: Ranks,
) -> TensorOrTuple:
    """`ops.similarity_lse` of this rank's queries over all rows of a memory, which get no gradient.

    Args:
        q, scale, q_ids, best: as there.
        shard, k_ids: the keys and their ids.
        ranks: how the queries are spread.
    """
    ids = None if k_ids is None else k_ids.rows
    problem = checked_problem(q, shard.rows, scale, q_ids, ids, "different", None, None)
    scale_tensor = problem.scale_tensor
    learns = q.requires_grad or scale_tensor is not None and scale_tensor.requires_grad
    learns = learns and torch.is_grad_enabled() or transformed()
    place = *_place_of(ranks, q, shard), chosen()
    row, _, best_scores = _lse.way(learns, *tensors_of(problem))(*problem, best, learns, *place)
    return (row, best_scores) if best else row


def _place_of(ranks: Ranks, q: Tensor, shard: Shard) -> tuple[str, tuple[int, ...], str]:
    return place_of(ranks, strategy_of(ranks, q, itself=False, shard=-(-shard.size // ranks.size)))


def _forward(*inputs: Any) -> tuple[Tensor, ...]:
    *problem, need_best, learns, group, counts, strategy, backend = inputs
    problem = Problem(*problem)
    q, place = problem.q, Place.of(problem.q, group, counts, strategy)
    sums = q.new_empty(q.shape[:-1], dtype=accumulator(q))
    results = [sums] * (1 + need_best) + [torch.empty_like(q, dtype=accumulator(q))] * learns
    rows, row, mean = {}, None, None

    def arrive(worker: int, theirs: Sequence[Tensor]) -> None:
        nonlocal row, mean
        rows[worker] = [x.clone() for x in theirs[: 1 + need_best]]  # or all that came with them would be kept
        if learns:
            row, mean = mean_of_both(row, mean, rows[worker][0], theirs[-1].clone() if mean is None else theirs[-1])

    shared = [q, problem.q_ids]
    shared = shared if strategy == "ring" else gathered(shared, place)
    order = ring(place.rank, place.size, results=True)
    with torch.no_grad(), use_backend(backend):
        for block in blocks(place, order, shared, False, results, arrive):
            of_block, ids = block.tensors
            part = problem._replace(q=of_block, q_ids=ids)
            of = load(resolve("similarity_lse", of_block, frozen=learns, **options(part)), "similarity_lse")
            if learns:
                lse, of_rows, best = of.similarity_lse_frozen_fwd(part, need_best)
            else:
                lse, _, best, _ = of.similarity_lse_fwd(part, False, need_best, 0)
            block.results = [lse, *([best] if need_best else []), *([of_rows] if learns else [])]
            lse = of_rows = best = None
    row, best = merged(rows, need_best)
    return row, mean, best


def _fake(*inputs: Any) -> tuple[Tensor, ...]:
    *_, need_best, learns, _, _, _, _ = inputs
    q = inputs[0]
    row, mean = q.new_empty(q.shape[:-1], dtype=accumulator(q)), torch.empty_like(q, dtype=accumulator(q))
    return row, mean.contiguous() if learns else row.new_empty(0), row.new_empty(q.shape[:-1] if need_best else 0)


def _backward(ctx: Any, g: Tensor, *_: None) -> tuple[Tensor, ...]:
    return *frozen_backward(ctx, g), *(None,) * 4


_lse = Node(
    Operator(
        f"similarity_lse_over_shards({SCHEMA}, bool need_best, bool learns, {PLACE}, str backend)"
        " -> (Tensor row, Tensor mean, Tensor best)",
        _forward,
        _fake,
    ),
    frozen_save,
    _backward,
    outputs=1,
)


# ---- the nearest -----------------------------------------------------------------------------------------------------


def nearest_over_shards(q: Tensor, shard: Shard, normalize: bool, ranks: Ranks) -> Tensor:
    """The row of a memory with the largest dot product with each of q, by its direction where `normalize` says so; of
    equal ones the first, and for a q with NaN the last."""
    inputs = q.detach(), shard.rows, shard.size, normalize, *_place_of(ranks, q, shard), chosen()
    return _nearest.registered(*inputs)


def _found(
    q: Tensor,
    rows: Tensor,
    size: int,
    normalize: bool,
    group: str,
    counts: Sequence[int],
    strategy: str,
    backend: str,
) -> Tensor:
    place = Place.of(q, group, counts, strategy)
    best = q.new_full((q.shape[0],), -math.inf, dtype=accumulator(q))
    index, found = torch.full_like(best, -1, dtype=torch.int64), torch.empty_like(q)

    def arrive(worker: int, theirs: Sequence[Tensor]) -> None:
        value, at, row = theirs
        first_of_equal = (value == best) & torch.where(value > -math.inf, at < index, at > index)
        better = (value > best) | first_of_equal
        best.copy_(torch.where(better, value, best))
        index.copy_(torch.where(better, at, index))
        found.copy_(torch.where(better.unsqueeze(1), row, found))

    keys = unit(rows) if normalize else rows
    shared = [q] if strategy == "ring" else gathered([q], place)
    order = ring(place.rank, place.size, results=True)
    with torch.no_grad(), use_backend(backend):
        for block in blocks(place, order, shared, False, [best, index, found], arrive):
            value, at = (x[:, 0] for x in ops.similarity_topk(block.tensors[0], keys, 1))
            value = value.masked_fill(at < 0, -math.inf)
            block.results = [value, at.remainder(len(rows)) * place.size + place.rank, rows[at]]
    return found


_nearest = Operator(
    f"nearest_over_shards(Tensor q, Tensor rows, int size, bool normalize, {PLACE}, str backend) -> Tensor",
    _found,
    lambda q, *_: torch.empty_like(q),
)


# ---- the rows that are named -----------------------------------------------------------------------------------------


def sampled_similarity(q: Tensor, bank: "Tensor | Shard", index: Tensor, ranks: Ranks | None) -> Tensor:
    """`ops.sampled_similarity`; of a `Shard` without gradient."""
    if not isinstance(bank, Shard):
        return ops.sampled_similarity(q, bank, index)
    return _scores.registered(q.detach(), bank.rows, index, bank.size, ranks.group, ranks.counts, chosen())


def sampled_similarity_bwd(q: Tensor, bank: "Tensor | Shard", index: Tensor, g: Tensor, ranks: Ranks | None) -> Tensor:
    """The gradient of `ops.sampled_similarity` by q."""
    if not isinstance(bank, Shard):
        return ops.sampled_similarity_bwd(q, bank, index, g, need_bank=False)[0]
    inputs = q.detach(), bank.rows, index, g, bank.size, ranks.group, ranks.counts, chosen()
    return _gradient.registered(*inputs)


class _Lists:
    """The names [N, T] as a list for each query and rank, of one length L for all of them: entry t of query i stands
    at `cell[i, t]` of [W, L]."""

    def __init__(self, index: Tensor, size: int, place: Place):
        W, (N, T) = place.size, index.shape
        self.place, owner = place, index % place.size
        order = owner.argsort(dim=1, stable=True)
        number = torch.zeros(N, W, dtype=torch.int64, device=index.device).scatter_add_(
            1, owner, torch.ones_like(owner)
        )
        longest = number.amax() if number.numel() else number.sum()
        everyones, wrong = stacked(torch.stack((longest, outside(index, size))), place.group).t().tolist()
        raise_for_any(wrong, size)
        self.length = max(everyones)
        owner = owner.gather(1, order)
        within = torch.arange(T, device=index.device) - (number.cumsum(1) - number).gather(1, owner)
        self.cell = torch.empty_like(index).scatter_(1, order, owner * self.length + within)

    def sent(self, x: Tensor, rest: int) -> Tensor:
        """What belongs to the names [N, T], to the ranks that have them: [M, L] of the queries of all. rest stands
        where a list has ended."""
        W, N, L, counts = self.place.size, x.shape[0], self.length, self.place.counts
        lists = x.new_full((N, W * L), rest).scatter_(1, self.cell, x).view(N, W, L).transpose(0, 1).flatten(0, 1)
        return send_rows(lists, [N] * W, counts, self.place.group) if L else x.new_empty(sum(counts), 0)

    def home(self, x: Tensor) -> Tensor:
        """And what came out for them: [M, L] to [N, T]."""
        lists = exchange_rows(x, self.place.counts, self.place.group)  # [W, N, L]
        return lists.transpose(0, 1).flatten(1).gather(1, self.cell)


def _named(index: Tensor, size: int, q: Tensor, group: str, counts: Sequence[int]) -> tuple[_Lists, Tensor, Tensor]:
    """The lists, the rows here that queries name [M, L], and which of them name none [M, 1]. Where a list has ended
    stands what is named first: of other rows a query takes nothing, NaN neither."""
    place = Place.of(q, group, counts, "all_gather")
    lists = _Lists(index, size, place)
    names = lists.sent((index // place.size).int(), -1).long()
    first = names[:, :1]
    return lists, torch.where(names < 0, first, names).clamp_(min=0), first < 0


def _scores_of(
    q: Tensor, rows: Tensor, index: Tensor, size: int, group: str, counts: Sequence[int], backend: str
) -> Tensor:
    lists, names, _ = _named(index, size, q, group, counts)
    with use_backend(backend):
        return lists.home(ops.sampled_similarity(gather_rows(q, lists.place.counts, group), rows, names))


def _gradient_of(
    q: Tensor, rows: Tensor, index: Tensor, g: Tensor, size: int, group: str, counts: Sequence[int], backend: str
) -> Tensor:
    lists, names, none = _named(index, size, q, group, counts)
    like = q.new_empty(names.shape[0], q.shape[1])  # of which only the shape is asked
    with use_backend(backend):
        dq, _ = ops.sampled_similarity_bwd(like, rows, names, lists.sent(g, 0), need_bank=False)
    return summed_rows(dq.masked_fill_(none, 0), lists.place.counts, group)


_scores = Operator(
    "sampled_similarity_over_shards(Tensor q, Tensor rows, Tensor index, int size, str group, int[] counts,"
    " str backend) -> Tensor",
    _scores_of,
    lambda q, rows, index, *_: q.new_empty(index.shape, dtype=accumulator(q)),
)
_gradient = Operator(
    "sampled_similarity_over_shards_bwd(Tensor q, Tensor rows, Tensor index, Tensor g, int size, str group,"
    " int[] counts, str backend) -> Tensor",
    _gradient_of,
    lambda q, *_: torch.empty_like(q, dtype=accumulator(q)),
)
