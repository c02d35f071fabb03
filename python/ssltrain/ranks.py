"""A run of several processes, as `torchrun` starts them: who does what, and on what they have to agree.

Every process, a rank, loads the data, holds the method, and takes its share of each batch. Losses and batch statistics
are those of the whole batch and gradients those of all, so that the weights stay the same everywhere. What is printed
and written, is by the first rank. In a process that `torchrun` has not started there is nothing to agree on, and all
this does nothing.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from inspect import signature
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ssltrain import UsageError
from ssltrain.methods._method import Method


def launched() -> bool:
    """Whether `torchrun` has started this process."""
    return dist.is_available() and dist.is_torchelastic_launched()


def restarted() -> bool:
    """Whether it has done so in place of one that failed."""
    return launched() and int(os.environ["TORCHELASTIC_RESTART_COUNT"]) > 0


def size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def local_device(device: str) -> str:
    """The device of this rank: of several on a machine, cuda means for each the GPU of its own number."""
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if launched() else 1
    if here == 1 or not device.startswith("cuda"):
        return device
    if device != "cuda":
        raise UsageError(f"--device {device}: is one GPU for {here} processes; say cuda, and each takes its own.")
    if torch.cuda.device_count() < here:
        raise UsageError(
            f"--device cuda: there are {torch.cuda.device_count()} GPUs for {here} processes; start as many as there "
            "are GPUs, or pass --device cpu."
        )
    return f"cuda:{os.environ['LOCAL_RANK']}"


@contextmanager
def joined() -> Iterator[None]:
    """The ranks find each other; all but the first print nothing."""
    if not launched():
        yield
        return
    store, number, count = next(dist.rendezvous("env://"))
    # a store that serves all attempts still has the addresses of those that are gone
    store = dist.PrefixStore(f"attempt {os.environ['TORCHELASTIC_RESTART_COUNT']} of {count}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=number, world_size=count)
    if rank() == 0:
        yield
        return
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        yield
    except UsageError:  # as in the first rank, which tells it: `torchrun` ends all when one ends
        time.sleep(5)
        raise SystemExit(2) from None


def wait() -> None:
    """Until all are here: `torchrun` ends all when one ends by a mistake."""
    agree()


def leave() -> None:
    """What follows is done by each for itself."""
    wait()
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_voice() -> Iterator[None]:
    """What all do alike is told by the first rank, and a mistake that only some make by all."""
    if size() == 1:
        yield
        return
    mistake = None
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere if rank() else sys.stderr):
        try:
            yield
        except UsageError as error:
            mistake = str(error)
    mistakes: list[str | None] = [None] * size()
    dist.all_gather_object(mistakes, mistake)
    told = [(i, mistake) for i, mistake in enumerate(mistakes) if mistake is not None]
    if told:
        where = "" if len(told) == size() or told[0][0] == 0 else f"in process {told[0][0]}: "
        raise UsageError(where + told[0][1])


def of_first(value: Any) -> Any:
    """What the first rank has; tensors of the CPU, too."""
    if size() == 1:
        return value
    values = [value if rank() == 0 else None]
    dist.broadcast_object_list(values)
    return values[0]


def check_same(what: str, about: Any) -> None:
    """Raises `UsageError` if some rank has other `about`."""
    if size() > 1:
        found: list[Any] = [None] * size()
        dist.all_gather_object(found, about)
        for i, other in enumerate(found):
            if other != found[0]:
                raise UsageError(f"{what} of process {i} are others than those of process 0; give all the same.")


def agree(stop: bool = False, due: bool = False, seconds: float = 0.0) -> tuple[bool, bool, float]:
    """Whether any rank is asked to stop; whether a checkpoint is due and what the clock says in the first one."""
    if size() == 1:
        return stop, due, seconds
    first = rank() == 0
    said = torch.tensor([stop, due and first, seconds if first else 0.0], dtype=torch.float64)
    dist.all_reduce(said, dist.ReduceOp.MAX)
    stop, due, seconds = said.tolist()
    return bool(stop), bool(due), seconds


def share(start: int, stop: int) -> slice:
    """The part of the rows `start` to `stop` that is this rank's, at most one more or fewer than another's."""
    rows = stop - start
    return slice(start + rank() * rows // size(), start + (rank() + 1) * rows // size())


def loss_of(method: Method) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """`method.loss`, whose backward leaves the gradients of the whole batch in every rank."""
    if size() == 1:
        return method.loss
    ddp, device = nn.parallel.DistributedDataParallel, next(method.parameters()).device
    where = [device] if device.type == "cuda" else None
    # buffers are the same everywhere as it is; newer versions of torch have another name for that
    named = "forward_sync_buffers" if "forward_sync_buffers" in signature(ddp).parameters else "broadcast_buffers"
    keep: dict[str, Any] = {named: False}
    return ddp(_Loss(method), device_ids=where, **keep)


class _Loss(nn.Module):
    """The loss of a method as a forward, which is where DDP is at work."""

    def __init__(self, method: Method):
        super().__init__()
        self.method = method

    def forward(self, views: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.method.loss(views)


# ---- Batch normalisation ---------------------------------------------------------------------------------------------


def normalise(method: nn.Module, device: torch.device, parts: int | None) -> None:
    """Batch normalisation by the statistics of all ranks, or of each of so many parts of the batch of all, in place; no
    name in a checkpoint changes."""
    if parts is not None:
        if parts % size():
            raise UsageError(
                f"--shuffle-bn {parts}: there are {size()} processes; choose a multiple of that, for each normalises "
                "as many parts."
            )
        _replace_norms(method, functools.partial(SplitBatchNorm.of, parts=parts), "leave --shuffle-bn out")
    elif size() > 1:
        synced = nn.SyncBatchNorm.convert_sync_batchnorm if device.type == "cuda" else SyncBatchNorm.of
        _replace_norms(method, synced, "train in one process")


def _replace_norms(method: nn.Module, replacement: Callable[[Any], nn.Module], otherwise: str) -> None:
    for parent in list(method.modules()):
        for name, child in parent.named_children():
            if type(child) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
                setattr(parent, name, replacement(child))
            elif isinstance(child, _BatchNorm) and not isinstance(child, (_Replaced, nn.SyncBatchNorm)):
                raise UsageError(
                    f"--encoder: {type(child).__name__} has no form that works over several processes or parts; choose "
                    f"another encoder, or {otherwise}."
                )


class _Replaced(_BatchNorm):
    """In the place of a batch normalisation, for inputs of any dimensions."""

    num_batches_tracked: Tensor  # these three only where statistics run
    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def of(cls, norm: _BatchNorm, **own: int) -> _Replaced:
        """The same with parameters and buffers that are those of `norm`, and attributes of its own."""
        replaced = cls(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
        replaced._parameters, replaced._buffers, replaced.training = norm._parameters, norm._buffers, norm.training
        vars(replaced).update(own)
        return replaced

    def _check_input_dim(self, x: Tensor) -> None:
        """Any that has a batch and channels."""

    def _rate(self) -> float:
        """What running statistics take of those of this batch, which is counted."""
        self.num_batches_tracked += 1
        return 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum


class SplitBatchNorm(_Replaced):
    """Batch normalisation of `parts` parts of the batch of all ranks, each by itself, as if each were a GPU's: rows
    that follow one another, as many in each. Running statistics take the mean of theirs."""

    parts: int

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        rows = x.chunk(self.parts // size())
        if not self.track_running_stats:
            return torch.cat([self._normalised(part, None, None, 0.0) for part in rows])
        rate, running = self._rate(), torch.stack([self.running_mean, self.running_var])
        seen = [running.clone() for _ in rows]  # which each part moves on its own
        out = torch.cat([self._normalised(part, own[0], own[1], rate) for part, own in zip(rows, seen, strict=True)])
        mean = torch.stack(seen).mean(0)
        if size() > 1:
            dist.all_reduce(mean)
            mean /= size()
        self.running_mean.copy_(mean[0])
        self.running_var.copy_(mean[1])
        return out

    def _normalised(self, x: Tensor, mean: Tensor | None, var: Tensor | None, rate: float) -> Tensor:
        return nn.functional.batch_norm(x, mean, var, self.weight, self.bias, True, rate, self.eps)


class SyncBatchNorm(_Replaced):
    """Batch normalisation over the ranks of a group, by default all, for devices where torch's refuses.

    Exact where the ranks have different numbers of samples, forward and backward, as the gradient of each rank is that
    of a loss of all of them.
    """

    group: dist.ProcessGroup | None = None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype = x.dtype if x.dtype == torch.float64 else torch.float32
        mean, var, count = _Moments.apply(x.to(dtype), self.group)
        if self.track_running_stats:
            with torch.no_grad():
                weight = self._rate()
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), weight)
                self.running_var.lerp_((var * (count / (count - 1))).to(self.running_var.dtype), weight)
        scale = (var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        along = [1, -1] + [1] * (x.ndim - 2)
        return torch.addcmul(shift.view(along), x.to(dtype), scale.view(along)).to(x.dtype)


class _Moments(torch.autograd.Function):
    """Mean and biased variance by channel over the batches of all ranks, and how many values that are of each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
        ctx.group = group
        own = x.new_tensor([x.numel() // x.shape[1]])
        var, mean = torch.var_mean(x, [0, *range(2, x.ndim)], correction=0)
        gathered = [torch.empty(1 + 2 * len(mean), dtype=x.dtype) for _ in range(dist.get_world_size(group))]
        dist.all_gather(gathered, torch.cat([own, mean, var]), group)
        count, mean, var = torch.stack(gathered).split([1, len(mean), len(var)], 1)
        part = count / count.sum()
        whole = (part * mean).sum(0)
        var = (part * (var + (mean - whole) ** 2)).sum(0)
        total = count.sum()
        ctx.save_for_backward(x, whole, total)
        ctx.mark_non_differentiable(total)
        return whole, var, total

    @staticmethod
    def backward(ctx: Any, by_mean: Tensor, by_var: Tensor, _: Tensor) -> tuple[Tensor, None]:
        x, mean, count = ctx.saved_tensors
        both = torch.stack([by_mean, by_var])
        dist.all_reduce(both, group=ctx.group)
        along = [1, -1] + [1] * (x.ndim - 2)
        by_mean, by_var = (both / count).view(2, *along)
        return by_mean + 2 * by_var * (x - mean.view(along)), None
