"""Before anything else a loss over ranks asks whether they all mean the same: shapes, types, options.

A rank that meant something else would leave the others waiting in a collective. So each call begins with one exchange
of SIZE integers over the hosts: what must be equal as a checksum, and the number of rows and all dimensions as they
are. Every rank sees the same integers and comes to the same conclusion; only if it is a bad one the arguments
themselves follow, so that each rank can say what all of them have.
"""

import numbers
import os
import zlib
from collections.abc import Sequence, Set
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.arguments import check_flags
from ..common.autocast import autocast_active
from .collectives import stacked

SIZE = 64
_ON = os.environ.get("SSLKERN_PREFLIGHT", "1") != "0"


def preflight(on: bool) -> None:
    """Whether each call over a group first compares what its ranks were given; True unless SSLKERN_PREFLIGHT=0 is set.

    It costs an exchange of 512 bytes per rank between the hosts, the time of one small all-gather, and with it ranks
    may have different numbers of rows. Off, all have the same number, on their user's word. The choice must be the same
    on all ranks.

    Example:
        >>> sslkern.distributed.preflight(False)  # on every rank
        >>> sslkern.distributed.preflight(True)
    """
    check_flags(on=on)
    global _ON
    _ON = on


def compared(group: dist.ProcessGroup, rows: int, what: str, arguments: dict[str, Any]) -> tuple[int, ...]:
    """The rows of each rank; () for as many as here.

    Args:
        rows: the rows of this rank: the one number that a dimension may differ by.
        what, arguments: the function that was called, and with what. Of tensors shape and type must be the same, not
            the values; numbers and names must be equal.

    Raises:
        ValueError: on every rank, if they differ.
    """
    if not _ON:
        return ()
    equal, dims = [what, *map(str, _modes())], []
    for name, value in arguments.items():
        equal.append(f"{name}={_kind(value)}")
        dims += _dims(value)
    fit = dims[: SIZE - 2]
    equal.append(str(dims[SIZE - 2 :]))
    mine = torch.zeros(SIZE, dtype=torch.int64)
    mine[: 2 + len(fit)] = torch.tensor([zlib.crc32("; ".join(equal).encode()), rows, *fit])
    host = host_group(group)
    all_of_them = stacked(mine, host.group_name)
    counts = all_of_them[:, 1]
    differ = (all_of_them != all_of_them[0]).any(0) & (all_of_them != counts.unsqueeze(1)).any(0)
    if differ.any():
        _say(host, what, {"rows": rows} | {name: _shown(value) for name, value in arguments.items()})
    return tuple(counts.tolist())


def equal_rows(group: dist.ProcessGroup, rows: int) -> None:
    """In compiled code, whose shapes are those of as many rows on each rank: whether there are."""
    if not _ON:
        return
    counts = stacked(torch.tensor([rows]), host_group(group).group_name).view(-1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(
            f"compiled code takes as many rows on every rank, not {counts}; drop the last batch, or call it uncompiled"
        )


def _kind(value: object) -> str:
    """What of an argument is the same on all ranks."""
    if isinstance(value, Tensor):
        if value.is_nested:
            return f"{type(value).__name__} nested"
        width = value.shape[-1] if value.ndim > 1 else ""  # which are no rows, whatever their number
        of = f"{type(value).__name__} {value.ndim} {width} {value.dtype} {value.device.type} {value.layout}"
        return f"{of} {value.requires_grad}"
    if isinstance(value, (list, tuple)):
        return str([_kind(x) for x in value])
    return _named(value)


def _dims(value: object) -> list[int]:
    """The dimensions of a tensor, or of all in a list of them."""
    if isinstance(value, (list, tuple)):
        return [dim for x in value for dim in _dims(x)]
    return list(value.shape) if isinstance(value, Tensor) and not value.is_nested else []


def _named(value: object) -> str:
    """Of an object, whose `repr` may be its address, what it is."""
    if isinstance(value, Set):  # whose order is another one in each process
        return str(sorted(map(_named, value)))
    simple = value is None or isinstance(value, (bool, str, numbers.Number)) or hasattr(value, "same_on_all_ranks")
    return repr(value) if simple else getattr(value, "__qualname__", type(value).__qualname__)


def _modes() -> tuple[bool, bool]:
    """Of this rank: whether it records a graph, and whether autocast is on."""
    return torch.is_grad_enabled(), any(map(autocast_active, ("cpu", "cuda")))


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        shape = "nested" if value.is_nested else f"{list(value.shape)}"
        layout = "" if value.layout is torch.strided else f" {str(value.layout)[6:]}"
        learns = ", requires_grad" if value.requires_grad else ""
        return f"{type(value).__name__} {shape}{layout} {str(value.dtype)[6:]} on {value.device.type}{learns}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(_shown, value)) + ")"
    return _named(value)


def _say(host: dist.ProcessGroup, what: str, mine: dict[str, Any]) -> NoReturn:
    """Raises, with each rank's values of what differs."""
    everyone = [None] * host.size()
    dist.all_gather_object(everyone, (what, _modes(), mine), group=host)
    functions, modes, values = zip(*everyone, strict=True)
    if len(set(functions)) > 1:
        raise ValueError(f"the ranks of a group must call the same loss, not {_listed(functions)}")
    learns, casts = zip(*modes, strict=True)
    if len(set(learns)) > 1:
        raise ValueError(f"{what} must record a gradient on all ranks of its group or on none: see torch.no_grad")
    if len(set(casts)) > 1:
        raise ValueError(f"{what} must be inside autocast on all ranks of its group or on none")
    names = list(dict.fromkeys(name for value in values for name in value))
    differ = [name for name in names if len({value.get(name) for value in values}) > 1 and name != "rows"]
    said = "; ".join(f"{name} is {_listed([value.get(name) for value in values])}" for name in differ)
    raise ValueError(
        f"the ranks of a group must give {what} the same but for their number of rows, but {said or 'they differ'}"
    )


def _listed(values: Sequence) -> str:
    """Who has which, "A on rank 0, B on ranks 1, 2"."""
    ranks: dict[Any, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return ", ".join(f"{value} on rank{'s' * (len(of) > 1)} {', '.join(of)}" for value, of in ranks.items())


_hosts: dict[str, tuple[dist.ProcessGroup, dist.ProcessGroup]] = {}


def host_group(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group of the same ranks that takes tensors of the host: the group itself, or one beside it."""
    if any(device.type == "cpu" for device in group._device_types):
        return group
    of, host = _hosts.get(group.group_name, (None, None))
    if host is None or of is not group:
        ranks = dist.get_process_group_ranks(group)
        host = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _hosts[group.group_name] = group, host
    return host
