"""Losses over ranks by the kernels: within twice the error of the dense formula in the same type."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F

from sslkern.functional import (
    clip,
    dcl,
    debiased,
    hard_negative,
    moco_v3,
    nt_xent,
    nt_xent_multi_view,
    siglip,
    sup_con,
)

from ..functional import test_clip, test_dcl, test_debiased, test_moco, test_nt_xent_multi_view, test_sup_con
from ..functional.agreement import product, rounds_as, unit
from .agreement import COUNTS, Problem, of_rank, of_rank_by
from .combinations import combinations

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dense_nt_xent(z0, z1, temperature):
    """[2N] losses as cross-entropy over all other rows."""
    z, N = unit(torch.cat((z0, z1))), len(z0)
    s = (product(z, z) / temperature).fill_diagonal_(-torch.inf)
    return F.cross_entropy(s, torch.arange(2 * N).roll(N), reduction="none")


def of_clip(image, text, temperature, **options):
    return clip(image, text, 1 / temperature, **options)


def of_siglip(image, text, temperature, **options):
    return siglip(image, text, 1 / temperature, BIAS, **options)


def dense_siglip(image, text, temperature):
    """[N] losses: -log sigmoid of all logits, signed."""
    s = product(unit(image), unit(text)) / temperature + BIAS
    return F.softplus(s * (1 - 2 * torch.eye(len(s)))).sum(1)


def of_views(a, b, c, temperature, **options):
    return nt_xent_multi_view([a, b, c], temperature, positives="joint", **options)


def dense_views(a, b, c, temperature):
    return test_nt_xent_multi_view.dense(torch.stack((a, b, c)), temperature, "joint").flatten()


def labels_of(N):
    return torch.arange(N) * 2 // 3 % 7


def dense_labels(z, temperature):
    return test_sup_con.dense(z, temperature, labels_of(len(z)))


def of_moco_v3(query0, query1, keys, temperature, **options):
    return moco_v3(query0, query1, *keys.to(query0.dtype).unbind(1), temperature, times_2t=False, **options)


def keys_of(N):
    """[N, 2, D], numbers that every type holds."""
    return torch.randn(N, 2, D, generator=torch.Generator().manual_seed(N + 1)).bfloat16().float()


def dense_moco_v3(query0, query1, temperature):
    return test_moco.dense_v3(query0, query1, temperature, keys_of(len(query0)).unbind(1), times_2t=False)


class Loss(NamedTuple):
    """A loss over ranks, its dense formula for all rows, and what both are given."""

    loss: Callable
    dense: Callable
    names: tuple[str, ...]  # of features that learn
    views: int = 1
    scores: int | None = 2  # of which a row's loss consists; None: one for each row
    frozen: dict[str, Callable] = {}  # what else has a row for each sample
    coldest: float = 0.01  # temperature, whose inverse the dense formula can exponentiate


D, BIAS = 33, -2.0
PAIR = "z0", "z1"
LOSSES = {
    "nt_xent": Loss(nt_xent, dense_nt_xent, PAIR, 2),
    "clip": Loss(of_clip, test_clip.dense, ("image", "text")),
    "dcl": Loss(dcl, test_dcl.dense, PAIR, 2),
    "debiased": Loss(debiased, test_debiased.dense, PAIR, 2, coldest=0.1),
    "hard_negative": Loss(hard_negative, partial(test_debiased.dense, beta=1.0), PAIR, 2, 4, coldest=0.1),
    "nt_xent_multi_view": Loss(of_views, dense_views, ("a", "b", "c"), 3, 3),
    "sup_con": Loss(sup_con, dense_labels, ("z",), frozen=dict(labels=labels_of)),
    "moco_v3": Loss(of_moco_v3, dense_moco_v3, ("query0", "query1"), frozen=dict(keys=keys_of)),
    "siglip": Loss(of_siglip, dense_siglip, ("image", "text"), scores=None),
}


def features(N, count):
    generator = torch.Generator().manual_seed(N)
    return [torch.randn(N, D, generator=generator) for _ in range(count)]


def make(N, name, temperature):
    of = LOSSES[name]
    sharded = dict(zip(of.names, features(N, len(of.names)), strict=True)) | {x: f(N) for x, f in of.frozen.items()}
    replicated, options = dict(temperature=torch.tensor(temperature)), dict(reduction="none", frozen=tuple(of.frozen))
    return Problem(of.loss, sharded, replicated, options, of.views)


@combinations(
    name=list(LOSSES),
    temperature=[0.5, 0.01],
    dtype=list(DTYPES),
    strategy=["all_gather", "ring"],
    ranks=[2, 3, 5],
    rows=["uneven", "empty"],
)
def test_dense(pool, name, temperature, dtype, strategy, ranks, rows):
    check(pool, name, temperature, dtype, strategy, ranks, rows)


@combinations(
    triangular=[True, False],
    name=["nt_xent", "dcl", "nt_xent_multi_view", "sup_con"],
    temperature=[0.5, 0.01],
    dtype=list(DTYPES),
    ranks=[2, 3, 5],
    rows=["uneven", "empty"],
)
def test_dense_by_either_backward(pool, triangular, name, temperature, dtype, ranks, rows):
    check(pool, name, temperature, dtype, "ring", ranks, rows, partial(of_rank_by, triangular))


def check(pool, name, temperature, dtype, strategy, ranks, rows, of_rank=of_rank):
    counts, dtype, of = [9 * count for count in COUNTS[rows][ranks]], DTYPES[dtype], LOSSES[name]
    temperature, mean = max(temperature, of.coldest), ranks == 2  # of 3 or 5 times a number the rounding is another
    sharing = dict(strategy=strategy, grad_reduce="mean" if mean else "sum")
    results = pool.run(of_rank, make, (name, temperature), counts, dtype, "auto", sharing, ranks=ranks)
    losses, _, grads = zip(*results, strict=True)
    loss = torch.cat([x.view(of.views, -1) for x in losses], 1).view(-1)
    of_features = [torch.cat([of_rank[name] for of_rank in grads]) / (ranks if mean else 1) for name in of.names]
    of_temperature = [of_rank["temperature"] for of_rank in grads]
    assert not mean or torch.equal(*of_temperature)
    got, N = [loss, *of_features, of_temperature[0] if mean else sum(of_temperature)], sum(counts)
    rounds_as(got, of.dense, features(N, len(of.names)), temperature, dtype, N if of.scores is None else of.scores)
