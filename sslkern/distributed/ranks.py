"""Who shares a batch: the `group=` of a loss, and how its rows are spread over the ranks."""

import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.arguments import check_choice, describe
from .preflight import compared

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

Group = Union[None, str, "dist.ProcessGroup", "DeviceMesh", "Ranks"]  # what a loss takes
STRATEGIES = "auto", "all_gather", "ring"
GRAD_REDUCES = "mean", "sum"


class Ranks(NamedTuple):
    """The ranks of a group that share a batch. Functions, as the compiler of torch 2.6 knows no properties of those."""

    group: str  # its name, which is what operators take
    size: int
    rank: int
    counts: tuple[int, ...]  # rows of each rank; () for as many as here, which is what compiled code is made for
    strategy: str
    grad_reduce: str


def ranks_of(
    group: Group, strategy: str, grad_reduce: str, what: str, /, *, rows: Any = None, **arguments: Any
) -> Ranks | None:
    """The ranks that share the batch of a loss; None where this process is alone with it.

    The first thing that a loss does, as what it checks by itself may raise on one rank while others wait.

    Args:
        group, strategy, grad_reduce: as every loss takes them. A loss that calls another gives it its ranks as group.
        what: the name of the loss.
        rows: its samples on this rank. None: the first dimension of the first argument.
        arguments: everything else that it was given.

    Raises:
        ValueError: the ranks differ in what they give, on all of them.
        TypeError, ValueError: group is nothing that ranks could share.
    """
    if group is None or isinstance(group, Ranks):
        return group
    name, size, rank = _place(group)
    if size == 1:
        return None
    counts = ()
    if not torch.compiler.is_compiling():
        if rows is None:
            first = next(iter(arguments.values()))
            rows = first.shape[0] if isinstance(first, Tensor) and not first.is_nested and first.ndim else 0
        said = dict(strategy=strategy, grad_reduce=grad_reduce)
        counts = compared(group_object(group), rows, what, arguments | said)
    check_choice("strategy", strategy, *STRATEGIES)
    check_choice("grad_reduce", grad_reduce, *GRAD_REDUCES)
    for argument, x in arguments.items():
        if hasattr(type(x), "to_local"):
            raise TypeError(f"{argument} must be a plain tensor of this rank's rows; pass {argument}.to_local()")
    return Ranks(name, size, rank, counts, strategy, grad_reduce)


def check_group(group: object) -> None:
    """group: None, "world", "self", a process group that holds this process, or a one-dimensional device mesh."""
    if group is None or isinstance(group, Ranks) or isinstance(group, str) and group in ("world", "self"):
        return
    if dist.is_available() and group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group does not hold this process; call the loss on its members only")
    if hasattr(group, "get_group") and hasattr(group, "ndim"):
        if group.ndim != 1:
            raise ValueError(f"group must be a device mesh of one dimension, not {group.ndim}; pass mesh['name']")
    elif not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        given = repr(group) if isinstance(group, str) else describe(group)
        wanted = "None, 'world', 'self', a process group or a device mesh of one dimension"
        raise TypeError(f"group must be {wanted}, not {given}")


def group_object(group: Any) -> dist.ProcessGroup:
    if isinstance(group, str):
        return dist.group.WORLD  # type: ignore[return-value]  # there is one, or this process is alone
    return group.get_group() if hasattr(group, "get_group") else group


def _place(group: Group) -> tuple[str, int, int]:
    """Name, size and own rank; a constant in compiled code."""
    check_group(group)
    if isinstance(group, str) and (group == "self" or not (dist.is_available() and dist.is_initialized())):
        return "", 1, 0
    group = group_object(group)
    return group.group_name, group.size(), group.rank()


def members_of(group: Group) -> tuple[tuple[int, ...], int]:
    """The ranks of a group by their number in the world, and the place of this one among them."""
    _, size, rank = _place(group)
    return tuple(dist.get_process_group_ranks(group_object(group))) if size > 1 else (0,), rank


_place._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler.assume_constant_result, which imports the compiler


_warned = False
_available = dist.is_available()


def alone() -> None:
    """A loss without a group in a process among others: to torch, None means all of them. Said once."""
    global _warned
    if _warned or not (_available and dist.is_initialized()) or dist.get_world_size() == 1:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in ("sslkern", "torch"):
        frame, level = frame.f_back, level + 1  # to whoever called the loss, or made a module of it
    _warned = True
    warnings.warn(
        "group=None is the loss of this process's rows alone, and its process is one of"
        f" {dist.get_world_size()}; pass group='world' for the loss of the rows of all, or group='self' if it is meant",
        stacklevel=level,
    )


# ---- where rows stand ------------------------------------------------------------------------------------------------


def copies(ranks: Ranks | None, n: int) -> Ranks | None:
    """The ranks of n rows for each sample, which stand together: the views of a rank's samples."""
    return None if ranks is None else ranks._replace(counts=tuple(n * count for count in ranks.counts))


def one_each(ranks: Ranks) -> Ranks:
    """The ranks of one row each."""
    return ranks._replace(counts=(1,) * ranks.size)


def within(ranks: Ranks | None) -> Ranks | None:
    """The ranks for a loss by row that is only a step on the way to another, which has the factors of the contract."""
    return None if ranks is None else ranks._replace(grad_reduce="sum")


def first_row(ranks: Ranks, rows: int) -> int:
    """The number, among those of all ranks, of the first of this rank's `rows`."""
    return sum(ranks.counts[: ranks.rank]) if ranks.counts else ranks.rank * rows


def all_rows(rows: int, ranks: Ranks | None) -> int:
    """How many there are of what there are `rows` here."""
    if ranks is None:
        return rows
    return sum(ranks.counts) if ranks.counts else ranks.size * rows


def rows_here(x: Tensor, rows: int, ranks: Ranks | None) -> Tensor:
    """This rank's `rows` of x, which has those of all."""
    return x if ranks is None else x.narrow(0, first_row(ranks, rows), rows)


def row_ids(rows: int, device: torch.device, ranks: Ranks | None) -> Tensor:
    """Of each row its number among those of all ranks: ids that all differ."""
    ids = torch.arange(rows, device=device)
    return ids if ranks is None else ids + first_row(ranks, rows)
