import itertools
import math
import sys

import pytest
import torch
import torch.nn.functional as F

import sslkern
from sslkern.functional import info_nce, mnrl
from tests.ops.dense import within

N, H, D = 9, 2, 6
ALL = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
BOTH = ("query_to_doc", "doc_to_query")
IDS = torch.tensor([0, 1, 2, 3, 0, 1, 9, 8, 7]) * 2**40
HARD_IDS = torch.tensor([[0, 5], [6, 1], [7, 7], [3, 0], [4, 2], [1, 1], [5, 5], [6, 8], [9, 7]]) * 2**40


def dense(
    anchor,
    positive,
    negatives=None,
    temperature=0.05,
    *,
    directions=("query_to_doc",),
    partition="joint",
    ids=None,
    negative_ids=None,
    margin=None,
    margin_strategy="absolute",
    guide=None,
    normalize=True,
):
    """[N] losses and [N] whether the positive wins, from stored matrices and boolean masks."""
    N, rows = len(anchor), torch.arange(len(anchor))
    wide = torch.promote_types(anchor.dtype, torch.float32)
    sides = [anchor, positive] + ([] if negatives is None else list(negatives.unbind(1)))
    sides = [F.normalize(x.to(wide), dim=1).to(anchor.dtype) for x in sides] if normalize else sides
    judges = sides if guide is None else [guide[0], guide[1], *(guide[2].unbind(1) if negatives is not None else ())]
    judges = [F.normalize(x, dim=1) if guide is not None else x for x in judges]
    threshold = None
    if margin is not None or guide is not None:
        threshold = (judges[0] * judges[1]).to(wide).sum(1)
        threshold = threshold + (margin or 0) * (threshold.abs() if margin_strategy == "relative" else 1)
    same = rows[:, None] == rows
    equal = same if ids is None else ids[:, None] == ids
    false = [None, None] + [
        torch.zeros(N, N, dtype=torch.bool) if negative_ids is None else ids[:, None] == negative_ids[:, h]
        for h in range(len(sides) - 2)
    ]

    def scores(a, b, out):
        s = (sides[a] @ sides[b].T).to(wide) / temperature
        if threshold is not None:
            out = out | ((judges[a] @ judges[b].T).to(wide).detach() > threshold[:, None].detach())
        return s.masked_fill(out, -math.inf)

    hard = range(2, len(sides))
    blocks = {
        "query_to_doc": [scores(0, 1, equal)] + [scores(0, h, false[h]) for h in hard],
        "query_to_query": [scores(0, 0, equal)],
        "doc_to_query": [scores(1, 0, equal)],
        "doc_to_doc": [scores(1, 1, equal)] + [scores(1, h, same) for h in hard],
    }
    toward = ((sides[0] * sides[1]).to(wide).sum(1) / temperature)[:, None]
    joined = [torch.cat(blocks[name], 1) for name in directions]
    if partition == "joint":
        joined = [torch.cat(joined, 1)]
        if set(BOTH) <= set(directions):
            alone = (joined[0] == -math.inf).all(1, keepdim=True)
            joined = [torch.cat((toward.masked_fill(alone, -math.inf), *joined), 1)]
    target = torch.zeros(N, dtype=torch.long)
    losses = [F.cross_entropy(torch.cat((toward, x), 1), target, reduction="none") for x in joined]
    wins = [toward[:, 0] > x.masked_fill(x == toward, -math.inf).amax(1) for x in joined]
    return sum(losses) / len(losses), torch.stack(wins).float().mean()


CASES = {
    "plain": {},
    "two way": dict(directions=BOTH, partition="per_direction"),
    "two way, joint": dict(directions=BOTH),
    "queries": dict(directions=ALL[:2]),
    "all": dict(directions=ALL),
    "qwen": dict(directions=("query_to_doc", "query_to_query", "doc_to_doc"), margin=0.1),
    "margin": dict(directions=ALL, margin=-0.2, margin_strategy="relative"),
    "margin, two way": dict(directions=BOTH, partition="per_direction", margin=0.05),
    "guide": dict(guide=True),
    "gist": dict(directions=("query_to_doc", "query_to_query", "doc_to_doc"), guide=True, temperature=0.01),
    "guide, relative": dict(directions=ALL, guide=True, margin=-0.1, margin_strategy="relative"),
    "guide, two way": dict(directions=BOTH, partition="per_direction", guide=True, margin=0.1),
}


def problem(case, hard, with_ids, dtype=torch.float32, temperature=None):
    options = dict(CASES[case])
    tensors = [torch.randn(N, D), torch.randn(N, D)] + ([torch.randn(N, H, D)] if hard else [])
    tensors[1] += tensors[0] / 2
    if "guide" in options:
        options["guide"] = [torch.randn(N, 4), torch.randn(N, 4)] + ([torch.randn(N, H, 4)] if hard else [])
        options["guide"][1] += options["guide"][0]
    if with_ids:
        options["ids"] = IDS
        if hard and "doc_to_doc" not in options.get("directions", ()):
            options["negative_ids"] = HARD_IDS
    T = torch.tensor(temperature or options.pop("temperature", 0.2), requires_grad=True)
    return [x.to(dtype).requires_grad_() for x in tensors], T, options


def as_double(options):
    return options | ({"guide": [x.double() for x in options["guide"]]} if "guide" in options else {})


@pytest.mark.parametrize("case, hard, with_ids", list(itertools.product(CASES, [False, True], [False, True])))
def test_equals_dense_in_float64(case, hard, with_ids):
    tensors, T, options = problem(case, hard, with_ids, torch.float64)
    T, options = T.detach().double().requires_grad_(), as_double(options)
    negatives = tensors[2] if hard else None
    losses, share = mnrl(*tensors[:2], negatives, T, reduction="none", stats=True, **options)
    expected, expected_share = dense(*tensors[:2], negatives, T, **options)
    assert torch.allclose(losses, expected, rtol=1e-10, atol=1e-10) and torch.allclose(share, expected_share)
    weight = torch.linspace(1, 2, N).double()
    got = torch.autograd.grad(losses @ weight, (*tensors, T))
    for ours, theirs in zip(got, torch.autograd.grad(expected @ weight, (*tensors, T)), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["plain", "two way, joint", "all", "guide"])
@pytest.mark.parametrize("temperature", [0.2, 0.01])
def test_within_the_bound(backend, case, dtype, temperature):
    tensors, T, options = problem(case, True, "doc_to_doc" not in case, dtype, temperature)
    normalised = [F.normalize(x.detach().float(), dim=-1).to(dtype).requires_grad_() for x in tensors]
    results = []
    for function, kind in ((mnrl, dtype), (dense, torch.float64), (dense, dtype)):
        inputs = [x.detach().to(kind).requires_grad_() for x in normalised]
        t = T.detach().to(kind if kind == torch.float64 else torch.float32).requires_grad_()
        extra = as_double(options) if kind == torch.float64 else options
        if function is mnrl:
            losses = mnrl(*inputs, t, reduction="none", normalize=False, **extra)
        else:
            losses, _ = dense(*inputs, t, normalize=False, **extra)
        results.append((losses.detach(), *torch.autograd.grad(losses.mean(), (*inputs, t))))
    scales = {"loss": 1 / temperature, "dT": 1 / temperature**3}  # a weight carries the rounding of its score
    for name, result, exact, plain in zip(("loss", "danchor", "dpositive", "dnegatives", "dT"), *results, strict=True):
        within(result, exact, plain, name, scale=scales.get(name, 1 / temperature**2 / N))


def test_margin_drops_the_pairs_above_it(backend):
    anchor = torch.eye(3, 4).requires_grad_()
    positive = torch.tensor([[0.5, 0, 0, 1], [0.9, 0.5, 0, 1], [0.55, 0, 0.5, 1]]).requires_grad_()
    losses = mnrl(anchor, positive, margin=0.1, temperature=1.0, normalize=False, reduction="none")
    # row 0: 0.9 > 0.5 + 0.1 drops out, 0.55 stays; rows 1 and 2 keep their zeros
    expected = [math.log1p(math.exp(0.05)), math.log1p(2 * math.exp(-0.5)), math.log1p(2 * math.exp(-0.5))]
    assert torch.allclose(losses, torch.tensor(expected))
    losses[0].backward()
    assert (positive.grad[1] == 0).all() and positive.grad[2, 0] > 0


@pytest.mark.parametrize("guided", [False, True])
def test_pairs_without_negatives_add_nothing(backend, guided):
    tensors, _, _ = problem("plain", True, False)
    options = dict(ids=torch.zeros(N, dtype=torch.long), negative_ids=torch.zeros(N, H, dtype=torch.long))
    if guided:
        options["guide"] = [torch.randn(N, 4), torch.randn(N, 4), torch.randn(N, H, 4)]
    for directions, partition in (("query_to_doc",), "joint"), (BOTH, "joint"), (BOTH, "per_direction"):
        loss, share = mnrl(*tensors, directions=directions, partition=partition, stats=True, **options)
        grads = torch.autograd.grad(loss, tensors, allow_unused=True)
        assert loss == 0 and share == 1 and all(g is None or (g == 0).all() for g in grads)


def test_empty_hard_negatives_and_one_pair(backend):
    a, p = torch.randn(4, D), torch.randn(4, D)
    assert torch.allclose(mnrl(a, p, torch.randn(4, 0, D)), mnrl(a, p))
    assert mnrl(a[:1], p[:1], directions=ALL) == 0


def test_is_info_nce_where_they_meet(backend):
    a, p, n = torch.randn(N, D), torch.randn(N, D), torch.randn(N, H, D)
    assert torch.equal(mnrl(a, p), info_nce(a, p, temperature=0.05))
    flat = info_nce(a, p, n.flatten(0, 1), temperature=0.05, in_batch=True)
    assert torch.allclose(mnrl(a, p, n), flat) and torch.allclose(mnrl(a, p, list(n.unbind(1))), flat)


def test_the_order_of_directions_says_nothing():
    """That of a set is another one in each process."""
    z = torch.randn(4, N, D)
    for guide in (None, list(z[2:])):
        losses = {mnrl(z[0], z[1], directions=names, guide=guide).item() for names in itertools.permutations(ALL)}
        losses |= {mnrl(z[0], z[1], directions=set(ALL), guide=guide).item()}
        assert len(losses) == 1


def test_guide_works_in_blocks(monkeypatch):
    tensors, T, options = problem("guide, relative", True, False)
    expected = mnrl(*tensors, T, **options)
    want = torch.autograd.grad(expected, (*tensors, T))
    monkeypatch.setattr(sys.modules[mnrl.__module__], "BLOCK", 4 * N)  # four rows, two with the hard negatives
    got = mnrl(*tensors, T, **options)
    assert torch.allclose(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, (*tensors, T)), want, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("case", ["all", "margin", "guide, relative"])
def test_gradcheck(case):
    tensors, T, options = problem(case, True, False, torch.float64)
    options = as_double(options)
    tensors = [x[:4].detach().requires_grad_() for x in tensors]
    if "guide" in options:
        options["guide"] = [x[:4] for x in options["guide"]]
    T = T.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: mnrl(*x, reduction="none", **options), (*tensors, T))


@pytest.mark.parametrize("case", ["two way", "all", "qwen", "gist"])
def test_compiles_without_a_break(case):
    torch.compiler.reset()
    tensors, T, options = problem(case, True, False)
    compiled = torch.compile(mnrl, fullgraph=True, backend="aot_eager")
    got, want = compiled(*tensors, T, **options), mnrl(*tensors, T, **options)
    assert torch.allclose(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got, (*tensors, T)), torch.autograd.grad(want, (*tensors, T)), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_module():
    a, p, n = torch.randn(N, D), torch.randn(N, D), torch.randn(N, H, D)
    criterion = sslkern.MultipleNegativesRankingLoss(directions=ALL, margin=0.1)
    assert torch.equal(criterion(a, p, n), mnrl(a, p, n, directions=ALL, margin=0.1))
    assert torch.equal(criterion(a, p, logit_scale=3.0), mnrl(a, p, logit_scale=3.0, directions=ALL, margin=0.1))


def test_bad_arguments_are_named():
    a, p, n, ids = torch.randn(4, 3), torch.randn(4, 3), torch.randn(4, 2, 3), torch.arange(4)
    guide = [torch.randn(4, 5), torch.randn(4, 5), torch.randn(4, 2, 5)]
    cases = [
        ("anchor must", (a[0], p), {}),
        ("anchor is empty", (a[:0], p[:0]), {}),
        ("positive must", (a, p[:3]), {}),
        ("negatives must", (a, p, a), {}),
        ("negatives must", (a, p, n[:3]), {}),
        ("negatives must", (a, p, []), {}),
        ("negatives must", (a, p, [a, a[:3]]), {}),
        ("negatives must", (a, p, n.half()), {}),
        ("directions must", (a, p), {"directions": "query_to_doc"}),
        ("directions must", (a, p), {"directions": ("doc_to_query",)}),
        ("directions must", (a, p), {"directions": ("query_to_doc", "doc_to_docs")}),
        ("directions must", (a, p), {"directions": ("query_to_doc", "query_to_doc")}),
        ("partition must", (a, p), {"partition": "separate"}),
        ("partition='per_direction' needs", (a, p), {"partition": "per_direction", "directions": ALL}),
        ("ids must", (a, p), {"ids": ids[:3]}),
        ("negative_ids needs", (a, p, n), {"negative_ids": torch.zeros(4, 2, dtype=torch.long)}),
        ("negative_ids must", (a, p, n), {"ids": ids, "negative_ids": ids}),
        ("negative_ids cannot", (a, p, n), {"ids": ids, "negative_ids": ids, "directions": ALL}),
        ("margin must", (a, p), {"margin": math.inf}),
        ("margin needs", (a, p), {"margin": 0.1, "temperature": -0.1}),
        ("margin_strategy must", (a, p), {"margin_strategy": "percent"}),
        ("guide must", (a, p, n), {"guide": guide[:2]}),
        ("guide must", (a, p), {"guide": torch.randn(2, 4, 5)}),
        ("guide must", (a, p), {"guide": [guide[0], guide[1][:3]]}),
        ("guide must", (a, p), {"guide": [guide[0], guide[1][:, :2]]}),
        ("guide must", (a, p), {"guide": [guide[0], guide[1].long()]}),
        ("temperature must not be 0", (a, p), {"temperature": 0}),
    ]
    for message, args, options in cases:
        with pytest.raises((ValueError, TypeError), match=message) as error:
            mnrl(*args, **options)
        assert "\n" not in str(error.value)
