"""Shuffled batch normalisation: rows are encoded by ranks that are drawn, not by those that they belong to."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.arguments import check_dense, describe
from ..common.node import Operator
from ..common.numbers import check_size
from .collectives import group_of, send_rows
from .contract import counts_of
from .ranks import Group, Ranks, ranks_of


def shuffled(encoder: Callable[[Tensor], Tensor], x: Tensor, seed: int, group: Group = "world") -> Tensor:
    """`encoder(x)` without gradient, where each rank encodes rows that are drawn from those of all: MoCo's shuffled
    batch normalisation (https://arxiv.org/abs/1911.05722, section 3.3).

    Batch normalisation mixes the samples of a process, so that a query and its key, both made there, have the
    statistics of the same samples; by these the network tells the key, and learns little. Here the keys' statistics are
    those of other samples. Rows of x go where they are encoded and their features come back, by an all-to-all each.

    In one process the rows are shuffled among themselves, which normalisation of the whole batch does not see: give it
    an encoder, and query it with one, that normalises parts of the batch, as is done on one GPU.

    Args:
        encoder: maps n rows to the features of each, as many as this rank has. Its batch normalisation is of each
            process by itself, not synchronised.
        x: [N, ...], this rank's rows of the batch; ranks may have different numbers of them.
        seed: what the order is drawn by, the same on all ranks, anew in each step. The number of the step does, and
            then a run that is resumed goes on as it would have.
        group: the processes that share the batch, as in `functional.nt_xent`.

    Returns:
        [N, ...], the features of the rows of x, in their order.

    Raises:
        ValueError: x is no batch of rows, the encoder does not return one feature for each, or the ranks differ in what
            they give.

    Example:
        >>> import copy
        >>> query_encoder = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.BatchNorm1d(4))
        >>> key_encoder = copy.deepcopy(query_encoder)
        >>> memory, images = sslkern.FeatureQueue(4, 512, group="world"), torch.randn(2, 32, 8)
        >>> for step in range(3):
        ...     key = sslkern.distributed.shuffled(key_encoder, images[1], seed=step)
        ...     query = query_encoder(images[0])
        ...     loss = sslkern.functional.moco(query, key, memory.queue.t(), group="world", ptr=memory.queue_ptr)
        ...     loss.backward()
    """
    ranks = None if group is None else ranks_of(group, "auto", "mean", "shuffled", x=x, seed=seed)
    check_dense("x", x)
    if not isinstance(x, Tensor) or x.ndim == 0:
        raise ValueError(f"x must be a tensor [N, ...] of this rank's rows, not {describe(x)}")
    seed = check_size("seed", seed, 0)
    with torch.no_grad():
        features = encoder(_in_order(x, seed, False, ranks))
        if not isinstance(features, Tensor) or features.shape[:1] != x.shape[:1]:
            raise ValueError(f"encoder must return a row for each of {x.shape[0]}, not {describe(features)}")
        return _in_order(features, seed, True, ranks)


def _in_order(x: Tensor, seed: int, back: bool, ranks: Ranks | None) -> Tensor:
    group, counts = ("", ()) if ranks is None else (ranks.group, ranks.counts)
    return _shuffle.way(x)(x, seed, back, group, counts)


def order_of(rows: int, seed: int, back: bool = False) -> Tensor:
    """Which of the rows of all ranks comes to each place of the shuffled batch; `back`: which place each row is at."""
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed), device="cpu")
    return order.argsort() if back else order


class Route(NamedTuple):
    """What a rank does so that row order[p] of all comes to place p: it sends its `rows`, to[r] of them to rank r, and
    what arrives, of[r] of rank r, belongs to its `places`."""

    rows: Tensor
    to: list[int]
    of: list[int]
    places: Tensor


def route(order: Tensor, counts: Sequence[int], rank: int) -> Route:
    """Rank r has counts[r] rows before and afterwards. Rows on one way travel in the order of their places."""
    first, size = sum(counts[:rank]), len(counts)
    owner = torch.repeat_interleave(torch.arange(size, device="cpu"), torch.tensor(counts, device="cpu"))
    source = owner[order]
    leaving = (source == rank).nonzero().squeeze(1)
    coming = source[first : first + counts[rank]]
    to, of = (torch.bincount(ranks, minlength=size).tolist() for ranks in (owner[leaving], coming))
    return Route(order[leaving] - first, to, of, coming.argsort(stable=True))


def _shuffled(x: Tensor, seed: int, back: bool, group: str, counts: Sequence[int]) -> Tensor:
    if not group:
        return torch.empty_like(x).index_copy_(0, _beside(order_of(x.shape[0], seed, not back), x), x)
    counts = counts_of(counts, x.shape[0], group)
    if x.shape[1:].numel() == 0 or sum(counts) == 0:
        return x.clone()
    return placed(x, order_of(sum(counts), seed, back), group, counts)


def placed(x: Tensor, order: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    """Of the rows x of all ranks, row order[p] at place p: those whose places are this rank's."""
    rows, to, of, places = route(order, counts_of(counts, x.shape[0], group), group_of(group).rank())
    arrived = send_rows(x.index_select(0, _beside(rows, x)), to, of, group)
    return torch.empty_like(x).index_copy_(0, _beside(places, x), arrived)


def _beside(index: Tensor, x: Tensor) -> Tensor:
    """The index on the device of x, without waiting for the work that is queued there."""
    return (index.pin_memory() if x.is_cuda else index).to(x.device, non_blocking=True)


_shuffle = Operator(
    "shuffled_rows(Tensor x, SymInt seed, bool back, str group, int[] counts) -> Tensor",
    _shuffled,
    lambda x, *_: torch.empty_like(x),
)
