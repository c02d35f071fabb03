"""Primitives over ranks: those of one process with all rows."""

from functools import partial

import pytest
import torch

from sslkern import distributed
from sslkern.functional.formulas import reduce

from .agreement import COUNTS, Problem, agrees, by_triangle, of_rank, of_rank_by
from .combinations import combinations

SHARING = dict(ranks=[2, 3, 5, 8], rows=list(COUNTS), strategy=["all_gather", "ring"], grad_reduce=["mean", "sum"])


def draw(N, *shape, seed=0):
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(N * 7 + seed))


def over(primitive, q, k, group=None, strategy="auto", grad_reduce="mean", scale=1.0, bias=None, n=None, **options):
    """Its rows, as those of a loss that is not reduced. Two keys for each row of q."""
    ranks = distributed.ranks_of(group, strategy, grad_reduce, "over", q=q, k=k, scale=scale, bias=bias, n=n, **options)
    scale, bias = distributed.replicated(scale, ranks), distributed.replicated(bias, ranks)
    of_keys = ranks
    if k is not None:
        k, of_keys = k.flatten(0, 1), distributed.copies(ranks, 2)
        options = {name: x.flatten() if name in ("k_ids", "k_bias") else x for name, x in options.items()}
    if bias is not None:
        options["bias"] = bias
    options |= dict(scale=scale, ranks=of_keys)
    if primitive == "sum_of_equal":
        sums, count = distributed.sum_of_equal(k, options["q_ids"], options["k_ids"], of_keys)
        return reduce(sums.tanh().sum(1) + count, "none", ranks=ranks)
    if primitive == "similarity_topk":
        values, index = distributed.similarity_topk(q, k, n, **options)
        kept = (index >= 0).to(values.dtype)
        return reduce((values.masked_fill(index < 0, 0).tanh() * (1 + index % 97) * kept).sum(1), "none", ranks=ranks)
    if primitive == "similarity_softplus":
        options["rows"] = True
    out = getattr(distributed, primitive)(q, k, **options)
    if options.get("columns"):
        row, col, *best = out
        out = row.tanh() + col.view(-1, 2).tanh().sum(1)
        out = out + best[0][: len(row)].tanh() if best else out
    elif options.get("best"):
        out = out[0] + out[1]
    return reduce(out.masked_fill(out == -torch.inf, 0), "none", ranks=ranks)


def make(N, primitive, itself, extra):
    options = {}
    sharded, replicated = dict(q=draw(N, 5)), {}
    if not itself:
        sharded["k"] = draw(N, 2, 5, seed=1)
    if "ids" in extra or primitive == "sum_of_equal":
        sharded["q_ids"] = torch.arange(N) * 2 // 3
        if not itself:
            sharded["k_ids"] = torch.stack((torch.arange(N) * 2 // 3, torch.arange(N) % 3), 1)
    if "same" in extra:
        options["pairs"] = "same"
    if "k_bias" in extra:
        sharded["k_bias"] = draw(N, *(() if itself else (2,)), seed=2)
    if "limit" in extra:
        sharded["q_limit"] = draw(N, seed=3)
        options["frozen"] = ("q_limit",)
    if "frozen" in extra and not itself:
        options["frozen"] = ("k",)
    if "learned" in extra:
        replicated["scale"] = torch.tensor(1.5)
    if "columns" in extra and not itself:
        options["columns"] = True
    if "best" in extra and primitive == "similarity_lse":
        options["best"] = True
    if primitive == "similarity_softplus":
        options["sign"] = -1
        replicated["bias"] = torch.tensor(-0.5)
    if primitive == "similarity_topk":
        options["n"] = 3
    options["primitive"] = primitive
    if itself:
        options["k"] = None
    return Problem(over, sharded, replicated, options)


def check(pool, primitive, itself, extra, ranks, rows, strategy, grad_reduce, of_rank=of_rank):
    sharing = dict(counts=COUNTS[rows][ranks], strategy=strategy, grad_reduce=grad_reduce)
    agrees(pool, make, primitive, itself, extra, **sharing, of_rank=of_rank)


EXTRAS = ["", "ids", "ids, same, learned", "limit", "learned"]


OF_LSE = ["k_bias", "k_bias, limit, ids", "best", "columns, best", "frozen", "frozen, ids, learned, best"]


@combinations(itself=[True, False], extra=[*EXTRAS, *OF_LSE], **SHARING)
def test_similarity_lse(pool, itself, extra, ranks, rows, strategy, grad_reduce):
    check(pool, "similarity_lse", itself, extra, ranks, rows, strategy, grad_reduce)


@combinations(
    triangular=[True, False],
    extra=[*EXTRAS, "best"],
    **{name: choices for name, choices in SHARING.items() if name != "strategy"},
)
def test_similarity_lse_by_either_backward(pool, triangular, extra, ranks, rows, grad_reduce):
    check(pool, "similarity_lse", True, extra, ranks, rows, "ring", grad_reduce, partial(of_rank_by, triangular))


def both_ways(group, counts):
    """The gradients of this rank's rows, and of the scale: twice by a triangle, then by owners of rows."""
    mine = slice(sum(counts[: group.rank()]), sum(counts[: group.rank() + 1]))
    found = []
    for triangular in (True, True, False):
        q, scale = draw(sum(counts), 5)[mine].float().requires_grad_(), torch.tensor(1.5, requires_grad=True)
        with by_triangle(triangular):
            over("similarity_lse", q, None, group, "ring", scale=scale).square().sum().backward()
        found.append(torch.cat((q.grad.flatten(), scale.grad.view(1))))
    return found


def test_a_triangle_repeats_its_bits(pool):
    for once, again, owners in pool.run(both_ways, [9, 3, 12, 7, 1], ranks=5):
        assert torch.equal(once, again) and torch.allclose(once, owners, rtol=1e-4, atol=1e-5)
        assert not torch.equal(once, owners)  # whose sums are in another order


@combinations(itself=[True, False], extra=[*EXTRAS, "k_bias"], **SHARING)
def test_similarity_softplus(pool, itself, extra, ranks, rows, strategy, grad_reduce):
    check(pool, "similarity_softplus", itself, extra, ranks, rows, strategy, grad_reduce)


@combinations(itself=[True, False], extra=EXTRAS, **SHARING)
def test_similarity_topk(pool, itself, extra, ranks, rows, strategy, grad_reduce):
    check(pool, "similarity_topk", itself, extra, ranks, rows, strategy, grad_reduce)


@combinations(extra=[""], **SHARING)
def test_sum_of_equal(pool, extra, ranks, rows, strategy, grad_reduce):
    check(pool, "sum_of_equal", False, extra, ranks, rows, strategy, grad_reduce)


@pytest.mark.parametrize("itself", [True, False])
@pytest.mark.parametrize("primitive", ["similarity_lse", "similarity_softplus", "similarity_topk", "sum_of_equal"])
def test_auto(pool, primitive, itself):
    if primitive == "sum_of_equal" and itself:
        pytest.skip("it has keys")
    check(pool, primitive, itself, "ids, learned", 3, "uneven", "auto", "mean")


def gathered_and_totalled(x, group=None, strategy="auto", grad_reduce="mean"):
    """Sums over all rows within a loss, of which each rank makes something else."""
    ranks = distributed.ranks_of(group, strategy, grad_reduce, "gathered", x=x)
    everyones, mean = distributed.gather(x, ranks), distributed.total_of(x.sum(0), ranks) / 100
    return reduce((x @ everyones.tanh().T).sum(1) + (x * mean.exp()).sum(1), "none", ranks=ranks)


def make_gathered(N):
    return Problem(gathered_and_totalled, dict(x=draw(N, 5)), {}, {})


@combinations(**SHARING)
def test_gather_and_total_of(pool, ranks, rows, strategy, grad_reduce):
    agrees(pool, make_gathered, counts=COUNTS[rows][ranks], strategy=strategy, grad_reduce=grad_reduce)


def compiled_by_triangle(*args):
    with by_triangle(True):
        return compiled(*args)


def compiled(group, primitive, itself, strategy):
    """The results and gradients of this rank's rows, eager and compiled."""
    torch.compiler.reset()
    problem = make(4, primitive, itself, "ids, learned, best" + ", frozen" * (primitive == "similarity_lse"))
    given = problem.sharded | problem.replicated
    options = {name: value for name, value in problem.options.items() if name != "frozen"}
    results = []
    for call in (over, torch.compile(over, fullgraph=True, backend="aot_eager")):
        leaves = {name: given[name].clone().requires_grad_() for name in problem.learning()}
        rows = call(**given | leaves, **options, group=group, strategy=strategy)
        results.append([rows, *torch.autograd.grad(rows.sum(), list(leaves.values()), allow_unused=True)])
    return [[None if x is None else x.detach() for x in result] for result in results]


@pytest.mark.slow
@pytest.mark.parametrize("itself, strategy", [(True, "all_gather"), (False, "ring")])
@pytest.mark.parametrize("primitive", ["similarity_lse", "similarity_softplus", "similarity_topk", "sum_of_equal"])
def test_compiles(pool, primitive, itself, strategy):
    if primitive == "sum_of_equal" and itself:
        pytest.skip("it has keys")
    same(pool.run(compiled, primitive, itself, strategy, ranks=3))


@pytest.mark.slow
def test_a_triangle_compiles(pool):
    same(pool.run(compiled_by_triangle, "similarity_lse", True, "ring", ranks=3))


def same(of_ranks):
    for eager, traced in of_ranks:
        pairs = zip(eager, traced, strict=True)
        assert all(a is b is None or torch.allclose(a, b, atol=1e-9) for a, b in pairs)
