"""The keys of all ranks, a block at a time, and what comes out for them, on its way to their owners.

"all_gather" brings all keys together first, and a block is those of several ranks; results go home together at the end.
"ring" passes keys on from rank to rank (see schedule.py), and a block is those of one; the next is on its way, and the
results of the last, while this one is computed with. What is computed is the same for both.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends.problem import Problem, keys_of
from ..common.autocast import cat
from ..common.tensors import map_given
from . import cost
from .collectives import Post, exchange_rows, gather_rows, group_of, happened
from .preflight import equal_rows
from .ranks import Ranks
from .schedule import Schedule

PLACE = "str group, int[] counts, str strategy"


def place_of(ranks: Ranks, strategy: str) -> tuple[str, tuple[int, ...], str]:
    """What an operator is told of the ranks; PLACE in its schema."""
    return ranks.group, ranks.counts, strategy


def strategy_of(ranks: Ranks, keys: Tensor, itself: bool, shard: int = 0) -> str:
    """What "auto" is; the same on all ranks. shard: where queries travel, and not the keys, how many keys stay here."""
    if ranks.strategy != "auto":
        return ranks.strategy
    if torch.compiler.is_compiling():
        return "all_gather"
    rows = max(ranks.counts, default=keys.shape[-2])
    return cost.choose(*_modelled(rows, keys, ranks.size, itself, shard))


def _modelled(rows: int, keys: Tensor, size: int, itself: bool, shard: int = 0) -> tuple[cost.Problem, cost.Device]:
    """What the cost model is asked about: nothing that differs between ranks."""
    device = cost.DEVICES.get(keys.device.type, cost.DEVICES["cuda"])
    return cost.Problem(rows, keys.shape[-1], size, itself, keys.element_size(), shard), device


class Place(NamedTuple):
    """A rank among others, and whose rows stand where."""

    group: str
    size: int
    rank: int
    counts: list[int]
    strategy: str
    dim: int  # of the rows of tensors, features [.., M, D] and vectors [.., M]

    @classmethod
    def of(cls, keys: Tensor, group: str, counts: Sequence[int], strategy: str, backward: bool = False) -> "Place":
        """backward: of what has been seen in the forward to be as many rows everywhere."""
        ranks, dim = group_of(group), keys.ndim - 2
        if not counts:
            if not backward:
                equal_rows(ranks, keys.shape[dim])
            counts = [keys.shape[dim]] * ranks.size()
        return cls(group, ranks.size(), ranks.rank(), list(counts), strategy, dim)


def by_triangle(q: Tensor, place: Place) -> bool:
    """Whether a backward of q with itself visits each pair of ranks once; the same on all ranks. "all_gather" does not:
    it would hold the gradients of all keys, twice."""
    return place.strategy == "ring" and cost.by_triangle(*_modelled(max(place.counts), q, place.size, True))


class Block:
    """The keys of the ranks `first` to `last`, without those of `last`. Who computes with them leaves in `results`, if
    the schedule has some, what is for their owners: tensors with a row for each key."""

    def __init__(self, first: int, last: int, tensors: Sequence[Any]):
        self.first, self.last, self.tensors = first, last, tensors
        self.results: Sequence[Tensor] = ()


Tensors = Sequence[Tensor | None]
Arrive = Callable[[int, Sequence[Tensor]], object]  # gets what a rank has computed for this one's keys


def keys_for_all(problem: Problem) -> Tensors:
    """What other ranks need of this one's keys."""
    ids = problem.k_ids
    if problem.k is None:
        ids = problem.q_ids
    return [keys_of(problem), ids, problem.k_bias]


def shared(tensors: Tensors, place: Place) -> Tensors:
    """What `blocks` takes, from this rank's rows."""
    if place.strategy == "ring":
        return tensors
    return gathered(tensors, place)


def gathered(tensors: Tensors, place: Place) -> Tensors:
    """The rows of all ranks: features in one exchange, and everything that has a number for each row in another."""
    dim = place.dim

    def everyones(x: Tensor) -> Tensor:
        return gather_rows(x.movedim(dim, 0), place.counts, place.group).movedim(0, dim).contiguous()

    vectors = [x for x in tensors if x is not None and x.ndim == dim + 1]
    if vectors:
        byrow = [x.movedim(dim, 0).contiguous().unsqueeze(-1).view(torch.uint8).flatten(1) for x in vectors]
        parts = gather_rows(cat(byrow, 1), place.counts, place.group).split([x.shape[1] for x in byrow], 1)
        vectors = [_rows_of(part, x, dim) for part, x in zip(parts, vectors, strict=True)]
    vectors = iter(vectors)
    return map_given(lambda x: next(vectors) if x.ndim == dim + 1 else everyones(x), *tensors)


def _rows_of(part: Tensor, like: Tensor, dim: int) -> Tensor:
    """Rows of bytes as the numbers that they are."""
    groups = like.shape[:dim]
    return part.contiguous().view(like.dtype).view(-1, *groups).movedim(0, dim).contiguous()


def none_arrive(worker: int, results: Sequence[Tensor]) -> None:
    """For blocks without results."""


def blocks(
    place: Place,
    schedule: Schedule,
    tensors: Tensors,
    apart: bool,
    results: Sequence[Tensor] = (),
    arrive: Arrive = none_arrive,
) -> Iterator[Block]:
    """Blocks of the keys that this rank computes with.

    Args:
        schedule: `ring` or `triangle`.
        tensors: for "ring" this rank's rows, for "all_gather" those of all, as they are `gathered`.
        apart: this rank's keys are a block by themselves, which has no results.
        results: of the shape and type of what is computed for this rank's keys.
        arrive: gets it from the rank that has computed it, in an order that is the same in each run.
    """
    if place.strategy == "ring":
        yield from _one_by_one(place, schedule, tensors, apart, results, arrive)
    else:
        yield from _at_once(place, schedule, tensors, apart, results, arrive)


# ---- all_gather ------------------------------------------------------------------------------------------------------


def _at_once(
    place: Place,
    schedule: Schedule,
    tensors: Tensors,
    apart: bool,
    results: Sequence[Tensor],
    arrive: Arrive,
) -> Iterator[Block]:
    dim, M = place.dim, sum(place.counts)
    visited = [step.compute for step in schedule if step.compute is not None]
    collected, alone = [], None
    if apart:
        collected = [x.new_zeros(*x.shape[:dim], M, *x.shape[dim + 1 :]) for x in results]
        alone = place.rank
    for first, last in _runs(visited, alone):
        start, size = sum(place.counts[:first]), sum(place.counts[first:last])
        block = Block(first, last, [x if x is None else x.narrow(dim, start, size) for x in tensors])
        yield block
        if not apart:  # one block of everything
            collected = block.results
        elif first != place.rank:
            for x, result in zip(collected, block.results, strict=True):
                x.narrow(dim, start, size).copy_(result)
        block.results = result = ()
    if collected:
        home = [exchange_rows(x.movedim(dim, 0), place.counts, place.group).movedim(1, dim + 1) for x in collected]
        for worker in range(place.size):
            if schedule.has_result_of(worker) and not (apart and worker == place.rank):
                arrive(worker, [x[worker] for x in home])


def _runs(ranks: list[int], apart: int | None) -> Iterator[tuple[int, int]]:
    """Ranks that follow each other, as (first, last + 1); the one that is apart by itself."""
    ranks = sorted(ranks)
    first = 0
    for i in range(1, len(ranks) + 1):
        if i == len(ranks) or ranks[i] != ranks[i - 1] + 1 or apart in (ranks[i - 1], ranks[i]):
            yield ranks[first], ranks[i - 1] + 1
            first = i


# ---- ring ------------------------------------------------------------------------------------------------------------


def _one_by_one(
    place: Place,
    schedule: Schedule,
    tensors: Tensors,
    apart: bool,
    results: Sequence[Tensor],
    arrive: Arrive,
) -> Iterator[Block]:
    packed = {"keys": _Packed(tensors, place), "result": _Packed(results, place)}
    keys, given = packed.values()
    # What this rank has for the next.
    sent: dict[str, Any] = {"keys": keys.packed(tensors, place.rank), "result": None}
    for number, step in enumerate(schedule):
        coming = [(packed[m.what].empty(m.block), m) for m in step.receives]
        happened("post", number)
        sends = [(sent[m.what], m.peer, m.what) for m in step.sends]
        post = Post(sends, [(x, m.peer, m.what) for x, m in coming], place.group)
        sent["result"] = None
        if step.compute is not None:
            block = Block(step.compute, step.compute + 1, keys.unpacked(sent["keys"], step.compute))
            happened("compute", number)
            yield block
            if results and step.compute != place.rank:
                sent["result"] = given.packed(block.results, step.compute)
            elif results and not apart:
                arrive(place.rank, block.results)
            block.results = ()
        happened("wait", number)
        post.wait()
        while coming:
            x, message = coming.pop()
            if message.what == "result":
                arrive(message.peer, given.unpacked(x, place.rank))  # type: ignore[arg-type]  # none is missing
            else:
                sent["keys"] = x
        x = post = None  # what has been sent or added up is let go before there is more


ALIGNED = 256  # bytes


class _Packed:
    """Rows of several tensors in one piece of memory, which is one message."""

    def __init__(self, like: Tensors, place: Place):
        self.like, self.place = like, place

    def _parts(self, rank: int) -> list[tuple[slice, list[int]]]:
        """Where the bytes of each tensor are, and the shape that it has for the rows of that rank."""
        parts, start, dim = [], 0, self.place.dim
        for x in self.like:
            if x is None:
                parts.append((slice(start, start), [0]))
                continue
            shape = [*x.shape[:dim], self.place.counts[rank], *x.shape[dim + 1 :]]
            stop = start + math.prod(shape) * x.element_size()
            parts.append((slice(start, stop), shape))
            start = -(-stop // ALIGNED) * ALIGNED
        return parts

    def empty(self, rank: int) -> Tensor:
        like = next(x for x in self.like if x is not None)
        return like.new_empty(self._parts(rank)[-1][0].stop, dtype=torch.uint8)

    def packed(self, tensors: Tensors, rank: int) -> Tensor:
        """The rows of that rank."""
        memory = self.empty(rank)
        for x, own in zip(tensors, self.unpacked(memory, rank), strict=True):
            if x is not None and own is not None:
                own.copy_(x)
        return memory

    def unpacked(self, memory: Tensor, rank: int) -> Tensors:
        return [
            None if x is None else memory[part].view(x.dtype).view(shape)
            for x, (part, shape) in zip(self.like, self._parts(rank), strict=True)
        ]
