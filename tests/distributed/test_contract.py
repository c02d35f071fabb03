"""The gradients of an encoder and of a learned temperature are those of one process with all rows, however the encoder
is trained: each cell of the table in docs/distributed.md."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sslkern
from sslkern.functional import nt_xent

from .agreement import COUNTS, close
from .combinations import combinations


def batch(N):
    return torch.randn(2, 2 * N, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(N)).chunk(2, 1)


def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5)).double()


class Step:
    """Two batches, the gradients of whose losses are accumulated, of the rows of a rank or of all."""

    def __init__(self, rows, N, group=None, **sharing):
        self.model, self.log_scale = encoder(), nn.Parameter(torch.tensor(1.0))
        self.batches = [x[:, rows] for x in batch(N)]
        self.sharing = dict(group=group, **sharing)

    def loss(self, z0, z1):
        return nt_xent(z0, z1, logit_scale=self.log_scale.exp(), **self.sharing)

    def plain(self, model, x):
        return self.loss(*model(x.flatten(0, 1)).chunk(2))

    def grads(self):
        return [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in self.model.parameters()]


def bare(step, group, way):
    """Whose gradients are averaged, or added up, by hand."""
    for x in step.batches:
        step.plain(step.model, x).backward()
    for p in step.model.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size() if way == "bare" else 1
    if way == "sum":
        dist.all_reduce(step.log_scale.grad, group=group)


def ddp(step, group, way):
    model = DistributedDataParallel(step.model, process_group=group)
    first, last = step.batches
    if way == "no_sync":
        with model.no_sync():
            step.plain(model, first).backward()
    elif way == "ddp, temperature":  # as a parameter of what is wrapped, whose gradients are averaged
        inner = nn.ModuleDict(dict(encoder=step.model))
        inner.log_scale = step.log_scale
        inner.forward = lambda x: (inner.encoder(x), inner.log_scale.exp())
        model = DistributedDataParallel(inner, process_group=group)
        for x in step.batches:
            z, scale = model(x.flatten(0, 1))
            nt_xent(*z.chunk(2), logit_scale=scale, **step.sharing).backward()
        return
    elif way == "cached":
        cached = sslkern.CachedLoss(model, lambda z: step.loss(*z.chunk(2)), 2)
        for x in step.batches:
            cached(x.flatten(0, 1)).backward()
        return
    else:
        step.plain(model, first).backward()
    step.plain(model, last).backward()


def scaled(step, group, way):
    """A GradScaler's factor is the same on all ranks."""
    model, scaler = DistributedDataParallel(step.model, process_group=group), torch.amp.GradScaler("cpu")
    for x in step.batches:
        scaler.scale(step.plain(model, x)).backward()
    for p in [*step.model.parameters(), step.log_scale]:
        p.grad /= scaler.get_scale()


def checkpointed(step, group, way):
    model = DistributedDataParallel(step.model, process_group=group)
    first, last = step.batches
    z = checkpoint(model, first.flatten(0, 1), use_reentrant=False)
    step.loss(*z.chunk(2)).backward()
    checkpoint(step.plain, model, last, use_reentrant=False).backward()  # the loss as well: its exchanges run again


def sharded(step, group, way):
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    for part in (step.model[0], step.model):
        fully_shard(part, mesh=mesh)
    for x in step.batches:
        if way == "fsdp, cached":
            sslkern.CachedLoss(step.model, lambda z: step.loss(*z.chunk(2)), 4)(x.flatten(0, 1)).backward()
        else:
            step.plain(step.model, x).backward()


WAYS = {
    "bare": bare,
    "sum": bare,
    "ddp": ddp,
    "no_sync": ddp,
    "ddp, temperature": ddp,
    "cached": ddp,
    "scaled": scaled,
    "checkpointed": checkpointed,
    "fsdp": sharded,
    "fsdp, cached": sharded,
}


def trained(group, way, counts, strategy):
    rank = group.rank()
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    grad_reduce = "sum" if way == "sum" else "mean"
    with sslkern.use_backend("reference"):
        step = Step(rows, sum(counts), group, strategy=strategy, grad_reduce=grad_reduce)
        WAYS[way](step, group, way)
    return [x.detach() for x in [*step.grads(), step.log_scale.grad]]


@combinations(way=list(WAYS), ranks=[2, 3, 5], rows=["even", "uneven"], strategy=["all_gather", "ring"])
def test_gradients_are_those_of_one_process(pool, way, ranks, rows, strategy):
    if way == "fsdp, cached" and rows == "uneven":
        pytest.skip("the reductions of fully_shard run for each chunk, of which every rank must have as many")
    counts = COUNTS[rows][ranks]
    with sslkern.use_backend("reference"):
        alone = Step(slice(None), sum(counts))
        for x in alone.batches:
            alone.plain(alone.model, x).backward()
    wanted = [*alone.grads(), alone.log_scale.grad]
    for grads in pool.run(trained, way, counts, strategy, ranks=ranks):
        for got, want in zip(grads, wanted, strict=True):
            close(got, want)
