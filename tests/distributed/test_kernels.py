"""Losses over ranks by the kernels: within twice the error of the dense formula in the same type."""

import torch
import torch.nn.functional as F

from sslkern.functional import clip, nt_xent

from ..functional import test_clip
from ..functional.agreement import product, rounds_as, unit
from .agreement import COUNTS, Problem, of_rank
from .combinations import combinations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dense_nt_xent(z0, z1, temperature):
    """[2N] losses as cross-entropy over all other rows."""
    z, N = unit(torch.cat((z0, z1))), len(z0)
    s = (product(z, z) / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(2 * N).roll(N), reduction="none")


def of_clip(image, text, temperature, **options):
    return clip(image, text, 1 / temperature, **options)


LOSSES = {
    "nt_xent": (nt_xent, dense_nt_xent, ("z0", "z1"), 2),
    "clip": (of_clip, test_clip.dense, ("image", "text"), 1),
}


def features(N):
    generator = torch.Generator().manual_seed(N)
    return [torch.randn(N, 33, generator=generator) for _ in range(2)]


def make(N, name, temperature):
    loss, _, names, views = LOSSES[name]
    sharded, replicated = dict(zip(names, features(N), strict=True)), dict(temperature=torch.tensor(temperature))
    return Problem(loss, sharded, replicated, dict(reduction="none"), views)


@combinations(
    name=list(LOSSES),
    temperature=[0.5, 0.01],
    dtype=list(DTYPES),
    strategy=["all_gather", "ring"],
    ranks=[2, 3, 5],
    rows=["uneven", "empty"],
)
def test_dense(pool, name, temperature, dtype, strategy, ranks, rows):
    counts, dtype = [9 * count for count in COUNTS[rows][ranks]], DTYPES[dtype]
    sharing = dict(strategy=strategy, grad_reduce="mean")
    results = pool.run(of_rank, make, (name, temperature), counts, dtype, "auto", sharing, ranks=ranks)
    losses, _, grads = zip(*results, strict=True)
    _, dense, names, views = LOSSES[name]
    loss = torch.cat([x.view(views, -1) for x in losses], 1).view(-1)
    of_features = [torch.cat([of_rank[name] for of_rank in grads]) / ranks for name in names]
    assert all(torch.equal(of_rank["temperature"], grads[0]["temperature"]) for of_rank in grads)
    got = [loss, *of_features, grads[0]["temperature"]]
    rounds_as(got, dense, features(sum(counts)), temperature, dtype)
