"""What processes exchange. Rows travel as bytes, so that every type does on every backend, and nothing is added on the
way: sums are made here, in the order of the ranks, so that they have the same bits on every rank and in every run.

Everything goes through this file. `recorded` counts the payload and keeps a log of what happened when.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.autocast import cat


def group_of(name: Any) -> dist.ProcessGroup:
    """The process group of that name: operators take no objects."""
    return dist.distributed_c10d._resolve_process_group(name)


# ---- what has been exchanged -----------------------------------------------------------------------------------------


class Record:
    """Bytes of payload that this process sent to and received from others, and the events of a ring: ("post", step),
    ("compute", step), ("wait", step)."""

    def __init__(self) -> None:
        self.sent, self.received = 0, 0
        self.events: list[tuple[str, int]] = []


_records: list[Record] = []


@contextlib.contextmanager
def recorded() -> Iterator[Record]:
    """What this process exchanges in the block, from whichever thread.

    Example:
        >>> z0, z1 = torch.randn(256, 128), torch.randn(256, 128)
        >>> with sslkern.distributed.recorded() as record:
        ...     loss = sslkern.functional.nt_xent(z0, z1, group="world")
        >>> record.received  # bytes: none without other processes
        0
    """
    record = Record()
    _records.append(record)
    try:
        yield record
    finally:
        _records.remove(record)


def _count(sent: int, received: int) -> None:
    for record in _records:
        record.sent, record.received = record.sent + sent, record.received + received


def happened(event: str, step: int) -> None:
    for record in _records:
        record.events.append((event, step))


# ---- rows ------------------------------------------------------------------------------------------------------------


def gather_rows(x: Tensor, counts: Sequence[int], name: str) -> Tensor:
    """Rows x [N, ...] of all ranks, counts[r] of rank r, in the order of the ranks: [M, ...]."""
    shape, most = x.shape[1:], max(counts)
    if shape.numel() == 0 or most == 0:
        return x.new_empty(sum(counts), *shape)
    if min(counts) == most:
        return _sent_to_all(x, group_of(name)).flatten(0, 1)
    padded = x.new_zeros(most, *shape)
    padded[: x.shape[0]] = x
    everyone = _sent_to_all(padded, group_of(name))
    return cat([rows[:count] for rows, count in zip(everyone, counts, strict=True)])


def exchange_rows(x: Tensor, counts: Sequence[int], name: str) -> Tensor:
    """Of x [M, ...], of which counts[r] rows belong to rank r: what every rank has of this one's, [W, N, ...]."""
    group, shape = group_of(name), x.shape[1:]
    size, own = group.size(), counts[group.rank()]
    if shape.numel() == 0 or max(counts) == 0:
        return x.new_empty(size, own, *shape)
    return send_rows(x, counts, [own] * size, name).view(size, own, *shape)


def send_rows(x: Tensor, to: Sequence[int], of: Sequence[int], name: str) -> Tensor:
    """Rows x [N, ...], of which the first to[0] are for rank 0, the next to[1] for rank 1 and so on: what comes here,
    of[r] rows of rank r, in the order of the ranks."""
    group, rank = group_of(name), group_of(name).rank()
    arriving = x.new_empty(sum(of), *x.shape[1:])
    there, here = _through(group, x.contiguous()), _through(group, arriving)
    row = x.shape[1:].numel() * x.element_size()
    _count((sum(to) - to[rank]) * row, (sum(of) - of[rank]) * row)
    with _explained(group):
        incoming, outgoing = _bytes(here).view(-1), _bytes(there).view(-1)
        splits = [n * row for n in of], [n * row for n in to]
        group.alltoall_base(incoming, outgoing, *splits, dist.AllToAllOptions()).wait()
    return here.to(x.device)


def stacked(x: Tensor, name: str) -> Tensor:
    """x of every rank, of the same shape everywhere: [W, ...]."""
    return _sent_to_all(x, group_of(name)) if x.numel() else x.new_empty(group_of(name).size(), *x.shape)


def summed(x: Tensor, name: str) -> Tensor:
    """The sum over the ranks of x, which has the same shape everywhere."""
    size = group_of(name).size()
    if x.numel() < LARGE:
        return in_order(stacked(x, name))
    # Each rank adds up its part, lest all of it be here as often as there are ranks.
    flat = x.reshape(-1)
    parts = [flat.numel() * (r + 1) // size - flat.numel() * r // size for r in range(size)]
    return gather_rows(summed_rows(flat, parts, name), parts, name).view(x.shape)


LARGE = 2**16  # numbers


def summed_rows(x: Tensor, counts: Sequence[int], name: str) -> Tensor:
    """The sum over the ranks of x [M, ...], of which each rank gets its own rows."""
    return in_order(exchange_rows(x, counts, name))


def in_order(parts: Tensor) -> Tensor:
    """The sum over the first dimension."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total


# ---- messages --------------------------------------------------------------------------------------------------------


class Post:
    """Messages on their way: (bytes, rank, what) to send and to receive into, which `wait` waits for.

    On a GPU NCCL moves them on a stream of its own, beside what is computed until then.
    """

    def __init__(
        self, sends: Sequence[tuple[Tensor, int, str]], receives: Sequence[tuple[Tensor, int, str]], name: str
    ):
        self.group = group = group_of(name)
        sends, receives = ([m for m in messages if m[0].numel()] for messages in (sends, receives))
        self._arriving = [(_through(group, x), x) for x, _, _ in receives]
        _count(sum(x.numel() for x, _, _ in sends), sum(x.numel() for x, _, _ in receives))
        with _explained(group):
            to = [self._message(dist.isend, _through(group, x), peer, what) for x, peer, what in sends]
            receives = zip(self._arriving, receives, strict=True)
            of = [self._message(dist.irecv, here, peer, what) for (here, _), (_, peer, what) in receives]
            self._works = dist.batch_isend_irecv(to + of) if to or of else []

    def _message(self, function: Callable, x: Tensor, peer: int, what: str) -> "dist.P2POp":
        return dist.P2POp(function, x, dist.get_global_rank(self.group, peer), self.group, _TAGS[what])

    def wait(self) -> None:
        with _explained(self.group):
            for work in self._works:
                work.wait()
        for here, x in self._arriving:
            if here is not x:
                x.copy_(here)


_TAGS = {"keys": 1, "result": 2, "rows": 3}


# ---- the ways there --------------------------------------------------------------------------------------------------


def _sent_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    size, each = group.size(), x.numel() * x.element_size()
    here = _through(group, x.contiguous())
    everyone = here.new_empty(size, *x.shape)
    if each >= DIRECTLY and _is_gloo(group, here):
        others = [rank for rank in range(size) if rank != group.rank()]
        sends = [(_bytes(here).view(-1), rank, "rows") for rank in others]
        Post(sends, [(_bytes(everyone[rank]), rank, "rows") for rank in others], group.group_name).wait()
        everyone[group.rank()] = here
        return everyone.to(x.device)
    _count((size - 1) * each, (size - 1) * each)
    with _explained(group):
        group._allgather_base(_bytes(everyone).view(-1), _bytes(here).view(-1)).wait()
    return everyone.to(x.device)


DIRECTLY = 2**18  # bytes: as much is sent to each rank, as Gloo's all-gather would hold all of it twice


def _bytes(x: Tensor) -> Tensor:
    return x.reshape(-1).view(torch.uint8)


def _through(group: dist.ProcessGroup, x: Tensor) -> Tensor:
    """x where the group can send it from: Gloo's rows go through the host."""
    return x.cpu() if x.device.type != "cpu" and _is_gloo(group, x) else x


def _is_gloo(group: dist.ProcessGroup, x: Tensor) -> bool:
    return group._get_backend(x.device).name() == "gloo"


@contextlib.contextmanager
def _explained(group: dist.ProcessGroup) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"an exchange of rank {group.rank()} with the others of its group of {group.size()} failed: one of them"
            " died, stalled beyond the timeout of the group, or made another call; their own output says which"
        ) from error
