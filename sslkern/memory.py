"""Features kept from earlier batches, to serve as negatives.

With `group=` a memory is the same on all processes of the group: what is pushed is the rows of all of them, in the
order of the ranks, and what it begins with is drawn from a seed made of its sizes. Nothing else is exchanged, and
nothing has to be broadcast.

With `sharded=True` each process has a part of it instead, rows r, r + W, r + 2 W .. of W processes, and losses take it
as they take the whole: `memory.queue.t()`, `memory.bank`. The buffers are `queue_shard` (or `bank_shard`) [n, dim] with
the rows here, and `shard_place` int64 (3,): whose they are, of how many processes, of how many rows. A `state_dict` is
that of one process; `joined` makes one of those of all, which any number of processes loads.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .common.arguments import FLOATS, check_dense, check_devices, check_flags, describe
from .common.numbers import check_number, check_size
from .common.rows import unit
from .distributed import (
    Group,
    Ranks,
    Shard,
    TensorOrShard,
    all_rows,
    check_group,
    gather,
    members_of,
    push_rows,
    ranks_of,
    rows_and_shard,
    rows_of_rank,
    update_rows,
)
from .ops import bank_update_, queue_push_
from .ops.queue_push import check_push


class _Memory(nn.Module):
    """Rows [size, dim], all of them or a part; see above. `normalize` and the like are of those who inherit."""

    _NAME: str
    _sharded: Shard | None = None  # the rows, where they are

    def __init__(self, size: int, dim: int, group: Group, sharded: bool):
        super().__init__()
        check_flags(sharded=sharded)
        check_group(group)
        if sharded and group is None:
            raise ValueError("sharded=True needs group=, the processes of which each has a part, such as 'world'")
        self.group = group
        if not sharded:
            return
        members, rank = members_of(group)
        if size < len(members):
            raise ValueError(f"size must be at least {len(members)}, a row for each process of the group, not {size}")
        here = rows_of_rank(size, rank, len(members))
        self._sharded = Shard(self, f"{self._NAME}_shard", size, members, rank)
        self.register_buffer(f"{self._NAME}_shard", _first_rows(here, dim, group, rank, len(members)))
        self.register_buffer("shard_place", torch.tensor([rank, len(members), size]))

    def _load_from_state_dict(
        self, state: dict, prefix: str, metadata: dict, strict: bool, missing: list, unexpected: list, errors: list
    ) -> None:
        place = state.get(prefix + "shard_place")
        if self._sharded is not None:
            rank, ranks = self._sharded.rank, len(self._sharded.members)
            for name in _SHARDED:
                if prefix + name in state:  # a whole one, of which this is cut
                    rows = state.pop(prefix + name).t() if name == "queue" else state.pop(prefix + name)
                    state[f"{prefix}{name}_shard"] = rows[rank::ranks].contiguous()
                    place = state[prefix + "shard_place"] = torch.tensor([rank, ranks, rows.shape[0]])
            if place is not None and place.tolist() != [rank, ranks, self._sharded.size]:
                errors.append(_says(prefix, place, f"{self._sharded.size} rows on rank {rank} of {ranks}"))
                return
        elif place is not None:
            errors.append(_says(prefix, place, "a whole one"))
            return
        super()._load_from_state_dict(state, prefix, metadata, strict, missing, unexpected, errors)


_SHARDED = "queue", "labels", "bank"


def _says(prefix: str, place: Tensor, here: str) -> str:
    rank, ranks, size = place.tolist()
    of = prefix.rstrip(".") or "the state"
    return (
        f"{of} is what rank {rank} of {ranks} has of a memory of {size} rows, and this is {here};"
        " load what sslkern.memory.joined makes of the states of all ranks"
    )


class FeatureQueue(_Memory):
    """The queue of MoCo (https://arxiv.org/abs/1911.05722, section 3.2): the keys of the last batches, in a ring.

    Buffers have the names and shapes of MoCo's, and go with the module through `state_dict`, `.to()` and `deepcopy`:
    `queue` (dim, size), at first random unit vectors, and `queue_ptr` int64 (1,), the column to write next. The
    memory of `queue` is laid out by key, so that `queue.t()` [size, dim] costs nothing; safetensors wants it
    `.contiguous()`.

    Args:
        dim: features per key.
        size: keys kept; it need not be a multiple of the batch size.
        normalize: divide keys by their norm when they are pushed.
        group: the processes that keep the same queue, as in `functional.nt_xent`; each pushes its own keys.
        sharded: each of them keeps a part of it, and `queue` is a `sslkern.distributed.Shard`, for which losses ask all
            of them.

    Example:
        >>> memory = sslkern.FeatureQueue(dim=128, size=4096)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss = sslkern.functional.info_nce(query, key, memory.queue.t(), temperature=0.07)
        >>> memory.push(key)  # also allowed before the backward
        >>> loss.backward()
    """

    _NAME = "queue"
    queue: TensorOrShard
    queue_shard: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int, size: int = 65536, normalize: bool = True, group: Group = None, sharded: bool = False):
        dim, size = check_size("dim", dim), check_size("size", size)
        check_flags(normalize=normalize)
        super().__init__(size, dim, group, sharded)
        self.normalize = normalize
        if sharded:
            self.queue = self._sharded
        else:
            self.register_buffer("queue", _first_rows(size, dim, group).t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def push(self, keys: Tensor) -> None:
        """Writes keys [B, dim] over the oldest; of a batch larger than the queue the last rows stay."""
        given = dict(keys=keys, queue=self.queue, normalize=self.normalize)
        push_of(_ranks(self.group, "FeatureQueue.push", **given), self, keys)

    def extra_repr(self) -> str:
        size, dim = self.queue.t().shape
        return f"dim={dim}, size={size}, normalize={self.normalize}"


class CrossBatchMemory(FeatureQueue):
    """The cross-batch memory of XBM (https://arxiv.org/abs/1912.06798): a queue that knows the label of each key.

    Buffers as in `FeatureQueue`, and `labels` int64 (size,) and `count` int64 (1,), how many keys were ever pushed.

    Example:
        >>> memory = sslkern.CrossBatchMemory(dim=32, size=4096)
        >>> z0, z1, labels = torch.randn(64, 32, requires_grad=True), torch.randn(64, 32), torch.randint(9, (64,))
        >>> memory.push(z1, labels)
        >>> keys, ids = memory.contents()
        >>> loss = sslkern.functional.info_nce(z0, z1, keys, ids=labels, negative_ids=ids, in_batch=True)
        >>> loss.backward()
    """

    labels: Tensor
    labels_shard: Tensor
    count: Tensor

    def __init__(self, dim: int, size: int = 8192, normalize: bool = True, group: Group = None, sharded: bool = False):
        super().__init__(dim, size, normalize, group, sharded)
        here = self.queue_shard.shape[0] if sharded else size
        self.register_buffer("labels_shard" if sharded else "labels", torch.zeros(here, dtype=torch.long))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:  # type: ignore[override]  # each key has a label
        """Writes keys [B, dim] and their labels int64 [B] over the oldest."""
        given = dict(keys=keys, labels=labels, queue=self.queue, normalize=self.normalize)
        ranks = _ranks(self.group, "CrossBatchMemory.push", **given)
        _check_rows("keys", keys, self.queue.t().shape[1])
        check_dense("labels", labels)
        if not isinstance(labels, Tensor) or labels.shape != keys.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be an int64 tensor {list(keys.shape[:1])}, one for each key")
        check_devices("the queue", self.queue_ptr, labels=labels)
        B = all_rows(labels.shape[0], ranks)
        of_keys = self.labels if self._sharded is None else self.labels_shard
        _, shard = rows_and_shard("the memory", self.queue.t(), ranks)
        if ranks is None or shard is None:
            keys, labels = gather(keys, ranks), gather(labels, ranks)
            size = of_keys.shape[0]
            last = torch.arange(max(0, B - size), B, device=of_keys.device)
            place = (last + self.queue_ptr % size) % size
            push_of(None, self, keys)
            of_keys.index_copy_(0, place, labels[-size:].clone())  # which may be some of them
        else:
            push_rows(shard, self.queue_ptr, keys, self.normalize, ranks, of_keys, labels)
        self.count += B

    def contents(self) -> tuple[TensorOrShard, TensorOrShard]:
        """The keys pushed so far and still there, [n, dim] and their labels [n]. The host waits for the count."""
        n = min(int(self.count), self.queue.t().shape[0])
        if self._sharded is None:
            return self.queue.t()[:n], self.labels[:n]
        here = rows_of_rank(n, self._sharded.rank, len(self._sharded.members))
        return self._sharded.of(self.queue_shard[:here], n), self._sharded.of(self.labels_shard[:here], n)


class MemoryBank(_Memory):
    """A unit vector for each sample of the data (https://arxiv.org/abs/1805.01978, section 3.2), a moving average.

    It goes with the module through `state_dict`, `.to()` and `deepcopy` as the buffer `bank` (size, dim), at first
    random unit vectors.

    Args:
        size: samples in the data.
        dim: features per sample.
        momentum: how much of a vector stays when it is updated, 0 to 1.
        group: the processes that keep the same bank, as in `functional.nt_xent`; each updates its own samples.
        sharded: each of them keeps a part of it, and `bank` is a `sslkern.distributed.Shard`, for which losses ask all
            of them.

    Example:
        >>> memory = sslkern.MemoryBank(size=50_000, dim=32)
        >>> query, sample = torch.randn(64, 32, requires_grad=True), torch.randint(50_000, (64,))
        >>> loss = sslkern.functional.nce(query, memory.bank, memory.sample(sample, 4096))
        >>> memory.update(sample, query)  # also allowed before the backward
        >>> loss.backward()
    """

    _NAME = "bank"
    bank: TensorOrShard

    def __init__(self, size: int, dim: int, momentum: float = 0.5, group: Group = None, sharded: bool = False):
        size, dim = check_size("size", size), check_size("dim", dim)
        momentum = check_number("momentum", momentum, 0, 1, closed=True)
        super().__init__(size, dim, group, sharded)
        self.momentum = momentum
        if sharded:
            self.bank = self._sharded
        else:
            self.register_buffer("bank", _first_rows(size, dim, group))

    def update(self, index: Tensor, features: Tensor) -> None:
        """Moves the vectors of samples index int64 [B] towards features [B, dim]; of equal samples the last counts.

        Features are divided by their norm first, as by the networks of the papers: how long a row is does not change
        how far its vector moves.
        """
        given = dict(index=index, features=features, bank=self.bank, momentum=self.momentum)
        update_of(_ranks(self.group, "MemoryBank.update", **given), self, index, features)

    def sample(self, index: Tensor, negatives: int, generator: torch.Generator | None = None) -> Tensor:
        """Rows of the bank for `functional.nce`, int64 [B, 1 + negatives]: index [B] and, uniformly and with
        repetition, rows other than it."""
        size = self.bank.shape[0]
        check_dense("index", index)
        if not isinstance(index, Tensor) or index.ndim != 1 or index.dtype != torch.int64:
            raise ValueError("index must be an int64 tensor [B], the samples of the batch")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator or None, not {describe(generator)}")
        negatives = check_size("negatives", negatives, 0)
        if size < 2 and negatives:
            raise ValueError("negatives must be 0 for a bank of one sample: there is no other")
        own = index.unsqueeze(1)
        # Compiled code wants it named or left out.
        options: dict[str, Any] = {} if generator is None else dict(generator=generator)
        others = torch.randint(max(1, size - 1), (index.shape[0], negatives), device=index.device, **options)
        return torch.cat((own, others.add_((others >= own).long())), 1)

    def extra_repr(self) -> str:
        size, dim = self.bank.shape
        return f"size={size}, dim={dim}, momentum={self.momentum}"


# ---- what a loss does that has its ranks already ---------------------------------------------------------------------


@torch.no_grad()
def push_of(ranks: Ranks | None, memory: FeatureQueue, keys: Tensor) -> None:
    queue, shard = rows_and_shard("the memory", memory.queue.t(), ranks)
    if ranks is not None:
        check_push(queue, memory.queue_ptr, keys, memory.normalize)
    if ranks is None or shard is None:
        queue_push_(queue, memory.queue_ptr, gather(keys, ranks), memory.normalize)
    else:
        push_rows(shard, memory.queue_ptr, keys, memory.normalize, ranks)


@torch.no_grad()
def update_of(ranks: Ranks | None, memory: MemoryBank, index: Tensor, features: Tensor) -> None:
    bank, shard = rows_and_shard("the memory", memory.bank, ranks)
    _check_rows("features", features, bank.shape[1])
    if ranks is None or shard is None:
        bank_update_(bank, gather(index, ranks), gather(unit(features), ranks), memory.momentum)
        return
    check_dense("index", index)
    if not isinstance(index, Tensor) or index.shape != features.shape[:1] or index.dtype != torch.int64:
        raise ValueError(f"index must be an int64 tensor {list(features.shape[:1])}, a sample for each of features")
    check_devices("bank", bank, index=index, features=features)
    update_rows(shard, index, unit(features), memory.momentum, ranks)


# ----------------------------------------------------------------------------------------------------------------------


def ignored_by_ddp(model: nn.Module) -> nn.Module:
    """Has `DistributedDataParallel(model)` leave the memories in model alone: it broadcasts all other buffers before
    each forward, and these are the same on every process already, or a part that is its own.

    Example:
        >>> model = torch.nn.ModuleDict(dict(encoder=torch.nn.Linear(8, 4), loss=sslkern.MoCoLoss(4, 64)))
        >>> parallel = sslkern.memory.ignored_by_ddp(model)  # and then DistributedDataParallel(model)
    """
    ignored = list(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))
    for path, module in model.named_modules():
        if isinstance(module, (FeatureQueue, MemoryBank)):
            ignored += [f"{path}.{name}".lstrip(".") for name, _ in module.named_buffers(recurse=False)]
    nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return model


def joined(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What `load_state_dict` takes on any number of processes, of the states of a model on all of those that shared its
    memories: these are whole, as if they had not been sharded, and all else is that of the first.

    Args:
        states: the `state_dict` of every rank, in any order.

    Raises:
        ValueError: they are not those of all ranks.

    Example:
        >>> memory = sslkern.FeatureQueue(dim=128, size=4096, group="world", sharded=True)
        >>> states = [memory.state_dict()]  # from the files that all ranks have written
        >>> memory.load_state_dict(sslkern.memory.joined(states))
        <All keys matched successfully>
    """
    whole = dict(states[0])
    for key in [key for key in whole if key.endswith("shard_place")]:
        prefix = key.removesuffix("shard_place")
        places = [state[key].tolist() for state in states]
        _, ranks, size = places[0]
        if sorted(places) != [[rank, ranks, size] for rank in range(ranks)]:
            given = [rank for rank, _, _ in places]
            raise ValueError(f"states must be those of all {ranks} ranks, one of each, not of ranks {given}")
        del whole[key]
        for name in _SHARDED:
            part = whole.pop(f"{prefix}{name}_shard", None)
            if part is not None:
                rows = part.new_empty(size, *part.shape[1:])
                for (rank, _, _), state in zip(places, states, strict=True):
                    rows[rank::ranks] = state[f"{prefix}{name}_shard"]
                whole[prefix + name] = rows.t() if name == "queue" else rows
    return whole


def _first_rows(size: int, dim: int, group: Group, *part: int) -> Tensor:
    """Random unit vectors, with a group the same on all of its processes, whatever these have made before; of a part of
    a memory those of this part."""
    if group is None:
        return unit(torch.randn(size, dim))
    generator = torch.Generator().manual_seed(zlib.crc32(repr((size, dim, part)).encode()))
    rows = torch.randn(size, dim, generator=generator, device="cpu")
    return unit(rows.to(torch.empty(0).device))  # the one that a module is being made on


def _ranks(group: Group, what: str, **given: Any) -> Ranks | None:
    return None if group is None else ranks_of(group, "auto", "mean", what, **given)


def _check_rows(name: str, x: Tensor, width: int) -> None:
    check_dense(name, x)
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{name} must be a tensor [B, {width}], not {describe(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
