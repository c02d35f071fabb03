"""Every loss over ranks: that of one process with all rows."""

import pytest
import torch

import sslkern

from .agreement import COUNTS, agrees, result
from .combinations import combinations
from .problems import CASES, OPTIONS, of_loss, of_pairs

# Of one rank: test_ranks.py; "auto", which is one of the two: test_primitives.py.
SHARING = dict(ranks=[2, 3, 5, 8], rows=list(COUNTS), strategy=["all_gather", "ring"], grad_reduce=["mean", "sum"])


@combinations(extra=["", "ids", "weights", "ids, learned"], options=list(OPTIONS), **SHARING)
def test_nt_xent(pool, extra, options, ranks, rows, strategy, grad_reduce):
    agrees(
        pool,
        of_pairs,
        "nt_xent",
        extra,
        options,
        counts=COUNTS[rows][ranks],
        strategy=strategy,
        grad_reduce=grad_reduce,
    )


@combinations(
    extra=["", "ids", "weights", "learned", "two_way", "negatives, ids", "bank, learned", "own"],
    options=list(OPTIONS),
    **SHARING,
)
def test_info_nce(pool, extra, options, ranks, rows, strategy, grad_reduce):
    counts = COUNTS[rows][ranks]
    agrees(pool, of_pairs, "info_nce", extra, options, counts=counts, strategy=strategy, grad_reduce=grad_reduce)


@combinations(extra=["", "ids", "weights"], options=list(OPTIONS), **SHARING)
def test_clip(pool, extra, options, ranks, rows, strategy, grad_reduce):
    counts = COUNTS[rows][ranks]
    agrees(pool, of_pairs, "clip", extra, options, counts=counts, strategy=strategy, grad_reduce=grad_reduce)


@combinations(case=CASES, extra=["", "ids, none", "weights, learned", "ids, sum, learned", "none, weights"], **SHARING)
def test_loss(pool, case, extra, ranks, rows, strategy, grad_reduce):
    counts = COUNTS[rows][ranks]
    agrees(pool, of_loss, case, extra, counts=counts, strategy=strategy, grad_reduce=grad_reduce)


def compiled(group, case, extra, strategy):
    """The loss, the share of winners and the gradients of this rank's rows, eager and compiled without a break."""
    torch.compiler.reset()
    rows, sharing = slice(4 * group.rank(), 4 * group.rank() + 4), dict(group=group, strategy=strategy)
    problem = of_loss(4 * group.size(), case, extra)
    traced = problem._replace(loss=torch.compile(problem.loss, fullgraph=True, backend="aot_eager"))
    found = []
    for of in (problem, traced):
        with sslkern.use_backend("reference"):
            loss, share, grads = result(of, rows, torch.float64, **sharing)
        found.append([loss, share, *grads.values()])
    return found


SOME = {"sup_con tags", "moco smooth", "mnrl guide, hard, all, stats", "cpc sample", "deep_infomax dv"}
COMPILED = [
    pytest.param(case, marks=pytest.mark.slow if case in SOME else [pytest.mark.slow, pytest.mark.long])
    for case in CASES
]


@pytest.mark.parametrize("case", COMPILED)
def test_compiles(pool, case):
    number = CASES.index(case)
    extra, strategy = ("learned", "ids, weights, none")[number % 2], ("all_gather", "ring", "auto")[number % 3]
    for eager, traced in pool.run(compiled, case, extra, strategy, ranks=2, within=120):
        for a, b in zip(eager, traced, strict=True):
            assert (a is None) == (b is None) and (a is None or torch.allclose(a, b, rtol=1e-9, atol=1e-12))
