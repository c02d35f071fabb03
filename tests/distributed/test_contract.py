"""The gradients of an encoder and of what a loss learns are those of one process with all rows, for every loss, however
the encoder is trained: each cell of the table in docs/distributed.md."""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import sslkern

from .agreement import COUNTS, Problem, close, weighed
from .combinations import combinations
from .problems import of_loss, of_pairs

WIDTH = 6  # of the widest features
LOSSES = [
    *("nt_xent", "info_nce two_way", "info_nce negatives", "info_nce own", "clip"),
    *(
        "dcl", "dclw", "debiased", "hard_negative", "nt_xent_multi_view joint", "sup_con", "sup_con tags", "moco stats",
        "moco_v3", "mnrl hard, all, stats", "mnrl guide, hard, two, margin", "mil_nce two, valid", "nce", "nce softmax",
        "cmc", "nnclr", "cpc all", "deep_infomax jsd", "deep_infomax infonce", "deep_infomax dv", "siglip",
        "alignment_uniformity", "alignment", "uniformity raw", "matryoshka",
    ),
]  # fmt: skip


def problem_of(N: int, loss: str, extra: str) -> Problem:
    name, _, form = loss.partition(" ")
    if name in ("nt_xent", "info_nce", "clip"):
        return of_pairs(N, name, f"{form}, {extra}", "none" if "none" in extra else "plain")
    return of_loss(N, loss, extra)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, WIDTH)).double()


class Step:
    """Two batches, the gradients of whose losses are accumulated, of the rows of a rank or of all. What a loss learns
    from goes through the encoder, all of it at once; what is the same on all ranks and learns is `learned`."""

    def __init__(self, problem: Problem, rows: slice, **sharing):
        self.problem, self.rows, self.sharing = problem, rows, sharing
        self.model = encoder()
        learning = [name for name in problem.learning() if problem.sharded.get(name, torch.empty(0)).ndim > 1]
        self.shapes = {name: problem.sharded[name][rows].shape for name in learning}
        self.learned = nn.ParameterDict(
            {name: nn.Parameter(x.double()) for name, x in problem.replicated.items() if name in problem.learning()}
        )
        self.batches = [self.batch(problem.sharded)]
        self.batches.append(self.batch({x: y.roll(1, 0) if x in learning else y for x, y in problem.sharded.items()}))

    def batch(self, sharded: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """What the encoder gets, [M, WIDTH], and what goes to the loss as it is."""
        here = {name: x[self.rows] for name, x in sharded.items()}
        features = [here.pop(name).flatten(0, -2) for name in self.shapes]
        return torch.cat([F.pad(x, (0, WIDTH - x.shape[-1])) for x in features]), here

    def loss(self, z: Tensor, given: dict[str, Tensor], learned: dict[str, Tensor] | None = None) -> Tensor:
        parts = z.split([shape[:-1].numel() for shape in self.shapes.values()])
        features = {
            name: part[:, : shape[-1]].reshape(shape)
            for part, (name, shape) in zip(parts, self.shapes.items(), strict=True)
        }
        replicated = self.problem.replicated | dict(self.learned if learned is None else learned)
        options = {name: value for name, value in self.problem.options.items() if name != "frozen"}
        out = self.problem.loss(**features, **given, **replicated, **options, **self.sharing)
        return weighed(self.problem, out[0] if isinstance(out, tuple) else out, self.rows)

    def plain(self, model: Callable, batch: tuple) -> Tensor:
        x, given = batch
        return self.loss(model(x), given)

    def grads(self) -> list[Tensor]:
        of_model = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in self.model.parameters()]
        return [x.detach() for x in of_model + [p.grad for p in self.learned.parameters()]]


def bare(step, group, way):
    """Whose gradients are averaged, or added up, by hand."""
    for batch in step.batches:
        step.plain(step.model, batch).backward()
    for p in step.model.parameters():
        dist.all_reduce(p.grad, group=group)
        p.grad /= group.size() if way == "bare" else 1
    for p in step.learned.parameters() if way == "sum" else ():
        dist.all_reduce(p.grad, group=group)


def ddp(step, group, way):
    model = DistributedDataParallel(step.model, process_group=group)
    first, last = step.batches
    if way == "no_sync":
        with model.no_sync():
            step.plain(model, first).backward()
    else:
        step.plain(model, first).backward()
    step.plain(model, last).backward()


class Whole(nn.Module):
    """An encoder, and what the loss learns."""

    def __init__(self, step):
        super().__init__()
        self.model, self.learned = step.model, step.learned

    def forward(self, x):
        return self.model(x), {name: p.view_as(p) for name, p in self.learned.items()}


def whole(step, group, way):
    """What the loss learns is a part of the model, whose gradients are averaged."""
    model = DistributedDataParallel(Whole(step), process_group=group)
    for x, given in step.batches:
        z, learned = model(x)
        step.loss(z, given, learned).backward()


def cached(step, group, way):
    model = step.model
    if way == "cached":
        model = DistributedDataParallel(model, process_group=group)
    else:
        shard(step, group)
    for x, given in step.batches:
        sslkern.CachedLoss(model, lambda z, given=given: step.loss(z, given), 5)(x).backward()


def mixed(step, group, way):
    """A GradScaler's factor is the same on all ranks; autocast leaves fp64 as it is."""
    model, scaler = DistributedDataParallel(step.model, process_group=group), torch.amp.GradScaler("cpu")
    for batch in step.batches:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = step.plain(model, batch)
        scaler.scale(loss).backward()
    for p in [*step.model.parameters(), *step.learned.parameters()]:
        p.grad /= scaler.get_scale()


def checkpointed(step, group, way):
    model = DistributedDataParallel(step.model, process_group=group)
    (x, given), last = step.batches
    step.loss(checkpoint(model, x, use_reentrant=False), given).backward()
    checkpoint(step.plain, model, last, use_reentrant=False).backward()  # the loss as well: its exchanges run again


def sharded(step, group, way):
    shard(step, group)
    for batch in step.batches:
        step.plain(step.model, batch).backward()


def shard(step, group):
    mesh = dist.DeviceMesh.from_group(group, "cpu")
    for part in (step.model[0], step.model):
        fully_shard(part, mesh=mesh)


WAYS = {
    "bare": bare,
    "sum": bare,
    "ddp": ddp,
    "no_sync": ddp,
    "ddp of all that learns": whole,
    "cached": cached,
    "amp": mixed,
    "checkpointed": checkpointed,
    "fsdp": sharded,
    "fsdp, cached": cached,
}


def trained(group, loss, extra, way, counts, strategy):
    rank = group.rank()
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    sharing = dict(group=group, strategy=strategy, grad_reduce="sum" if way == "sum" else "mean")
    with sslkern.use_backend("reference"):
        step = Step(problem_of(sum(counts), loss, extra), rows, **sharing)
        WAYS[way](step, group, way)
    return step.grads()


@combinations(
    loss=LOSSES,
    way=list(WAYS),
    extra=["learned", "ids, weights, learned, none"],
    ranks=[2, 3, 5],
    rows=list(COUNTS),
    strategy=["all_gather", "ring"],
)
def test_gradients_are_those_of_one_process(pool, loss, way, extra, ranks, rows, strategy):
    if way == "fsdp, cached" and rows != "even":
        pytest.skip("the reductions of fully_shard run for each chunk, of which every rank must have as many")
    counts = COUNTS[rows][ranks]
    with sslkern.use_backend("reference"):
        alone = Step(problem_of(sum(counts), loss, extra), slice(None))
        for batch in alone.batches:
            alone.plain(alone.model, batch).backward()
    wanted = alone.grads()
    assert any(x.abs().max() > 1e-6 for x in wanted)
    for grads in pool.run(trained, loss, extra, way, counts, strategy, ranks=ranks):
        for got, want in zip(grads, wanted, strict=True):
            close(got, want)
