"""The contract on gradients, in these functions and nowhere else.

The loss is that of the batch of all ranks. What multiplies its gradients is W, the number of ranks, or 1:

                                                  grad_reduce="mean"            "sum"
    features and all that has a row per sample    W times their gradient        their gradient
    replicated: temperature, scale, parameters    the gradient, on every rank   this rank's share of it

"mean" is for DDP and FSDP, which average the gradients of the encoder over the ranks; "sum" for who adds them up.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..common.node import Node, Operator
from ..common.tensors import wide
from .collectives import gather_rows, group_of, summed, summed_rows
from .preflight import equal_rows
from .ranks import Ranks

T = TypeVar("T")


def over_ranks(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum over ranks with which a loss ends, in the order of the ranks: the same bits on all of them.

    What a rank does with the sum all ranks do, and so the gradient that arrives is the same everywhere.
    """
    if ranks is None:
        return x
    return _over_ranks.way(True, x)(x, ranks.group, _factor(ranks))


def own_rows(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The rows with which a loss ends that is not reduced."""
    return x if ranks is None or ranks.grad_reduce == "sum" else _own_rows.way(True, x)(x, _factor(ranks))


def replicated(x: T, ranks: Ranks | None) -> T:
    """A tensor that is the same on all ranks, at the beginning of a loss. Numbers pass as they are."""
    if ranks is None or ranks.grad_reduce == "sum" or not isinstance(x, Tensor) or not x.requires_grad:
        return x
    return _replicated.way(True, x)(x, ranks.group, ranks.size)


def total_of(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The sum over ranks of what has the same shape on all of them, within a loss: what each of them makes of it may
    differ, and so the gradients are summed as well."""
    return x if ranks is None else _total_of.way(True, x)(x, ranks.group)


def gather(x: Tensor, ranks: Ranks | None) -> Tensor:
    """The rows x [N, ...] of all ranks, in their order. Each rank gets the sum of what all make of its rows."""
    return x if ranks is None else _gather.way(True, x)(x, ranks.group, ranks.counts)


def _factor(ranks: Ranks) -> float:
    return float(ranks.size) if ranks.grad_reduce == "mean" else 1.0


def counts_of(counts: Sequence[int], rows: int, name: str) -> list[int]:
    """The rows of each rank, in an operator that was given those of `ranks`."""
    if counts:
        return list(counts)
    group = group_of(name)
    equal_rows(group, rows)
    return [rows] * group.size()


# ---- as operators ----------------------------------------------------------------------------------------------------


def _summed(x: Tensor, group: str) -> Tensor:
    return summed(wide(x), group).to(x.dtype)


def _summed_fake(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x)


def _gathered(x: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    return gather_rows(x, counts_of(counts, x.shape[0], group), group)


def gathered_rows(rows: int, counts: Sequence[int], group: str) -> int:
    """How many rows all ranks have where this one has `rows`."""
    return sum(counts) if counts else rows * group_of(group).size()


def _gathered_fake(x: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    return x.new_empty(gathered_rows(x.shape[0], counts, group), *x.shape[1:])


def _brought_home(x: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    counts = counts or [x.shape[0] // group_of(group).size()] * group_of(group).size()
    return summed_rows(wide(x), counts, group).to(x.dtype)


def _brought_home_fake(x: Tensor, group: str, counts: Sequence[int]) -> Tensor:
    ranks = group_of(group)
    return x.new_empty(counts[ranks.rank()] if counts else x.shape[0] // ranks.size(), *x.shape[1:])


def _backward_of_own_rows(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return g * ctx.factor, None


def _backward_of_replicated(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    return _sum.way_back(ctx, g)(g, ctx.group) / ctx.size, None, None


def _backward_of_total(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
    return _sum.way_back(ctx, g)(g, ctx.group), None


def _backward_of_gather(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
    return _bring_home.way_back(ctx, g)(g, ctx.group, ctx.counts), None, None


def _keeps(*names: str) -> Callable[[Any, tuple[Any, ...], Tensor], None]:
    """Saves the last inputs under these names."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        for name, value in zip(names, inputs[1:], strict=True):
            setattr(ctx, name, value)

    return save


_sum = Operator("sum_over_ranks(Tensor x, str group) -> Tensor", _summed, _summed_fake)
_bring_home = Operator("sum_of_rows(Tensor x, str group, int[] counts) -> Tensor", _brought_home, _brought_home_fake)
_over_ranks = Node(
    Operator(
        "loss_over_ranks(Tensor x, str group, float factor) -> Tensor",
        lambda x, group, _: _summed(x, group),
        lambda x, *_: torch.empty_like(x),
    ),
    _keeps("group", "factor"),
    lambda ctx, g: (g * ctx.factor, None, None),
)
_total_of = Node(
    Operator("total_of_ranks(Tensor x, str group) -> Tensor", _summed, _summed_fake),
    _keeps("group"),
    _backward_of_total,
)
_gather = Node(
    Operator("gather_rows(Tensor x, str group, int[] counts) -> Tensor", _gathered, _gathered_fake),
    _keeps("group", "counts"),
    _backward_of_gather,
)
_own_rows = Node(lambda x, factor: x.view_as(x), _keeps("factor"), _backward_of_own_rows, name="own_rows")
_replicated = Node(
    lambda x, group, size: x.view_as(x), _keeps("group", "size"), _backward_of_replicated, name="replicated"
)
