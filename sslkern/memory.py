"""Features kept from earlier batches, to serve as negatives.

With `group=` a memory is the same on all processes of the group: what is pushed is the rows of all of them, in the
order of the ranks, and what it begins with is drawn from a seed that counts the memories of the process, so that all
that make theirs in the same order have the same. Nothing else is exchanged, and nothing has to be broadcast.
"""

import itertools

import torch
from torch import Tensor, nn

from .common.arguments import FLOATS, check_dense, check_devices, check_flags, describe
from .common.numbers import check_number, check_size
from .common.rows import unit
from .distributed import Group, Ranks, check_group, gather, ranks_of
from .ops import bank_update_, queue_push_

_numbers = itertools.count()


class FeatureQueue(nn.Module):
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

    Example:
        >>> memory = sslkern.FeatureQueue(dim=128, size=4096)
        >>> query, key = torch.randn(32, 128, requires_grad=True), torch.randn(32, 128)
        >>> loss = sslkern.functional.info_nce(query, key, memory.queue.t(), temperature=0.07)
        >>> memory.push(key)  # also allowed before the backward
        >>> loss.backward()
    """

    queue: Tensor
    queue_ptr: Tensor

    def __init__(self, dim: int, size: int = 65536, normalize: bool = True, group: Group = None):
        super().__init__()
        dim, size = check_size("dim", dim), check_size("size", size)
        check_flags(normalize=normalize)
        check_group(group)
        self.normalize, self.group = normalize, group
        self.register_buffer("queue", _first_rows(size, dim, group).t())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def push(self, keys: Tensor) -> None:
        """Writes keys [B, dim] over the oldest; of a batch larger than the queue the last rows stay."""
        given = dict(keys=keys, queue=self.queue, normalize=self.normalize)
        push_of(_ranks(self.group, "FeatureQueue.push", **given), self, keys)

    def extra_repr(self) -> str:
        return f"dim={self.queue.shape[0]}, size={self.queue.shape[1]}, normalize={self.normalize}"


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
    count: Tensor

    def __init__(self, dim: int, size: int = 8192, normalize: bool = True, group: Group = None):
        super().__init__(dim, size, normalize, group)
        self.register_buffer("labels", torch.zeros(size, dtype=torch.long))
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))

    @torch.no_grad()
    def push(self, keys: Tensor, labels: Tensor) -> None:
        """Writes keys [B, dim] and their labels int64 [B] over the oldest."""
        given = dict(keys=keys, labels=labels, queue=self.queue, normalize=self.normalize)
        ranks = _ranks(self.group, "CrossBatchMemory.push", **given)
        _check_rows("keys", keys, self.queue.shape[0])
        check_dense("labels", labels)
        if not isinstance(labels, Tensor) or labels.shape != keys.shape[:1] or labels.dtype != torch.int64:
            raise ValueError(f"labels must be an int64 tensor {list(keys.shape[:1])}, one for each key")
        check_devices("the queue", self.labels, labels=labels)
        keys, labels = gather(keys, ranks), gather(labels, ranks)
        size, B = self.labels.shape[0], labels.shape[0]
        last = torch.arange(max(0, B - size), B, device=self.labels.device)
        place = (last + self.queue_ptr % size) % size
        push_of(None, self, keys)
        self.labels.index_copy_(0, place, labels[-size:].clone())  # which may be some of them
        self.count += B

    def contents(self) -> tuple[Tensor, Tensor]:
        """The keys pushed so far and still there, [n, dim] and their labels [n]. The host waits for the count."""
        n = min(int(self.count), self.labels.shape[0])
        return self.queue.t()[:n], self.labels[:n]


class MemoryBank(nn.Module):
    """A unit vector for each sample of the data (https://arxiv.org/abs/1805.01978, section 3.2), a moving average.

    It goes with the module through `state_dict`, `.to()` and `deepcopy` as the buffer `bank` (size, dim), at first
    random unit vectors.

    Args:
        size: samples in the data.
        dim: features per sample.
        momentum: how much of a vector stays when it is updated, 0 to 1.
        group: the processes that keep the same bank, as in `functional.nt_xent`; each updates its own samples.

    Example:
        >>> memory = sslkern.MemoryBank(size=50_000, dim=32)
        >>> query, sample = torch.randn(64, 32, requires_grad=True), torch.randint(50_000, (64,))
        >>> loss = sslkern.functional.nce(query, memory.bank, memory.sample(sample, 4096))
        >>> memory.update(sample, query)  # also allowed before the backward
        >>> loss.backward()
    """

    bank: Tensor

    def __init__(self, size: int, dim: int, momentum: float = 0.5, group: Group = None):
        super().__init__()
        size, dim = check_size("size", size), check_size("dim", dim)
        self.momentum = check_number("momentum", momentum, 0, 1, closed=True)
        check_group(group)
        self.group = group
        self.register_buffer("bank", _first_rows(size, dim, group))

    def update(self, index: Tensor, features: Tensor) -> None:
        """Moves the vectors of samples index int64 [B] towards features [B, dim]; of equal samples the last counts."""
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
        options = {} if generator is None else dict(generator=generator)  # compiled code wants it named or left out
        others = torch.randint(max(1, size - 1), (index.shape[0], negatives), device=index.device, **options)
        return torch.cat((own, others.add_((others >= own).long())), 1)

    def extra_repr(self) -> str:
        return f"size={self.bank.shape[0]}, dim={self.bank.shape[1]}, momentum={self.momentum}"


# ---- what a loss does that has its ranks already ---------------------------------------------------------------------


@torch.no_grad()
def push_of(ranks: Ranks | None, memory: FeatureQueue, keys: Tensor) -> None:
    if ranks is not None:
        _check_rows("keys", keys, memory.queue.shape[0])
        keys = gather(keys, ranks)
    queue_push_(memory.queue.t(), memory.queue_ptr, keys, memory.normalize)


@torch.no_grad()
def update_of(ranks: Ranks | None, memory: MemoryBank, index: Tensor, features: Tensor) -> None:
    _check_rows("features", features, memory.bank.shape[1])
    bank_update_(memory.bank, gather(index, ranks), gather(unit(features), ranks), memory.momentum)


# ----------------------------------------------------------------------------------------------------------------------


def ignored_by_ddp(model: nn.Module) -> nn.Module:
    """Has `DistributedDataParallel(model)` leave the memories in model alone: it broadcasts all other buffers before
    each forward, and these are the same on every process already.

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


def _first_rows(size: int, dim: int, group: Group) -> Tensor:
    """Random unit vectors, with a group the same on all of its processes."""
    if group is None:
        return unit(torch.randn(size, dim))
    generator = torch.Generator().manual_seed(next(_numbers))
    rows = torch.randn(size, dim, generator=generator, device="cpu")
    return unit(rows.to(torch.empty(0).device))  # the one that a module is being made on


def _ranks(group: Group, what: str, **given) -> Ranks | None:
    return None if group is None else ranks_of(group, "auto", "mean", what, **given)


def _check_rows(name: str, x: Tensor, width: int) -> None:
    check_dense(name, x)
    if not isinstance(x, Tensor) or x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{name} must be a tensor [B, {width}], not {describe(x)}")
    if x.dtype not in FLOATS:
        raise TypeError(f"{name} must be floating point, not {x.dtype}; convert it with .float()")
